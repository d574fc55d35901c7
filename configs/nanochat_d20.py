"""nanochat's own 20 layers as of November 2025, the baseline for ablations.   nanojax train configs/nanochat_d20.py --data.path DIR"""

from nanojax.config import Config, OptimConfig, TrainConfig, nanochat

config = Config(
    model=nanochat(depth=20, vocab_size=65536),
    train=TrainConfig(tokens_per_param=20.0, batch_tokens=2**19, micro_batch=16),
    optim=OptimConfig(warmup_steps=0, warmdown=0.2, final_lr=0.0),
)
