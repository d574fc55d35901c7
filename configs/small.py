"""6 layers on CPU cores or any GPU, on the embedded corpus.   nanojax train configs/small.py"""

from nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(depth=6, d_model=256, head_dim=64, d_ffn=768, seq_len=256, vocab_size=4096),
    train=TrainConfig(steps=1000, batch_tokens=4096, eval_every=250, eval_tokens=2**16, save_every=250, loss_blocks=1),
    optim=OptimConfig(warmup_steps=20, reference_batch=None),
    data=DataConfig(packing="concat", val_fraction=0.05),
)
