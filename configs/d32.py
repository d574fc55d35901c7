"""32 layers, 1.9 B parameters; shard it over the GPUs of a host.   nanojax train configs/d32.py --mesh fsdp=8 --data.path DIR"""

from nanojax.config import Config, ModelConfig, TrainConfig

config = Config(model=ModelConfig(depth=32), train=TrainConfig(micro_batch=8, remat=True))
