"""20 layers, 490 M parameters, on one 80 GB GPU.   nanojax train configs/d20.py --data.path DIR"""

from nanojax.config import Config, ModelConfig, TrainConfig

config = Config(model=ModelConfig(depth=20), train=TrainConfig(batch_tokens=2**19, micro_batch=16))
