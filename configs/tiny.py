"""4 layers on 2 CPU cores."""

from nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(depth=4, d_model=128, head_dim=32, d_ffn=384, seq_len=256, vocab_size=4096),
    train=TrainConfig(steps=300, batch_tokens=2048, eval_every=100, eval_tokens=2**15, save_every=0, loss_blocks=1),
    optim=OptimConfig(warmup_steps=10),
    data=DataConfig(packing="concat"),
)
