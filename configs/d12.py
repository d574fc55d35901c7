"""12 layers, 135 M parameters, on one GPU.   nanojax train configs/d12.py --data.path DIR"""

from nanojax.config import Config, ModelConfig

config = Config(model=ModelConfig(depth=12))
