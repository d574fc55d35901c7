"""4 layers on 2 CPU cores, for a first look and for tests."""

from nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(depth=4, d_model=128, head_dim=64, d_ffn=384, seq_len=128, vocab_size=4096),
    train=TrainConfig(steps=360, batch_tokens=1024, eval_every=90, eval_tokens=2**16, save_every=180, loss_blocks=1),
    optim=OptimConfig(warmup_steps=10, reference_batch=None),
    data=DataConfig(packing="concat", val_fraction=0.05),
)
