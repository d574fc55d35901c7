"""What follows from a config by arithmetic: parameters, FLOPs, memory, batch and steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from nanojax.checks import nearest_divisor, round_up
from nanojax.config import VOCAB_MULTIPLE, Config, ModelConfig
from nanojax.errors import UserError

MICRO_BATCH_TOKENS = 2**16
MICRO_BATCH_ROWS = 32
FULL_RECIPE_SKIPS = 0.15  # of the blocks, the last ones: NVIDIA 2025, arXiv:2509.25149, section 4.1


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by kind."""

    embedding: int
    head: int
    matrices: int
    gains: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.gains

    @property
    def scaling(self) -> int:
        """Those that the length of a run is measured by: matrices of the blocks and the head."""
        return self.matrices + self.head


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameter counts of a model, from its sizes alone."""
    d, h, f = model.width, model.head_dim, model.hidden
    attention = 2 * d * model.n_head * h + 2 * d * model.kv_heads * h
    ffn = (3 if model.ffn == "swiglu" else 2) * d * f
    gains = 0
    if model.norm == "learnable":
        gains = model.depth * (2 * d + (2 * h if model.qk_norm else 0)) + d
    return Parameters(embedding=model.vocab_size * d, head=model.vocab_size * d, matrices=model.depth * (attention + ffn), gains=gains)


def flops_per_token(model: ModelConfig) -> int:
    """FLOPs of forward and backward for one token: 6 a parameter outside the embedding, 12 a layer, width and key seen.

    Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B; like nanochat it counts the keys of a full row, not its causal half.
    """
    counts = count_parameters(model)
    return 6 * (counts.total - counts.embedding) + 12 * model.width * sum(model.spans)


def state_bytes(model: ModelConfig) -> int:
    """Bytes of parameters and optimizer moments, in float32: one moment for Muon's matrices, two for AdamW's rest."""
    counts = count_parameters(model)
    return 4 * (counts.total + counts.matrices + 2 * (counts.total - counts.matrices))


def step_bytes(model: ModelConfig) -> int:
    """Bytes that a step holds besides state and activations: fp32 gradients and bf16 copies of the matrices and the head."""
    counts = count_parameters(model)
    return 4 * counts.total + 2 * counts.scaling


def resolve(config: Config, vocab_size: int) -> Config:
    """The config with every derived size and length filled in, for a tokenizer of `vocab_size` tokens.

    Batch: 2**19 tokens at depth 12, growing with the length of the run to the power 0.383, to the nearest power of two
    (nanochat's scripts/base_train.py, after arXiv:2505.13738). Steps: tokens_per_param times the scaling parameters over the batch.
    """
    model = dataclasses.replace(config.model, vocab_size=round_up(vocab_size, VOCAB_MULTIPLE))
    model = dataclasses.replace(model, d_model=model.width, n_kv_head=model.kv_heads, d_ffn=model.hidden)
    train, scaling = config.train, count_parameters(model).scaling
    batch = train.batch_tokens
    if batch is None:
        reference = count_parameters(dataclasses.replace(model, depth=12, d_model=None, n_kv_head=None, d_ffn=None, head_dim=128)).scaling
        batch = round_up(2 ** round(math.log2(2**19 * (scaling / reference) ** 0.383)), model.seq_len)
    steps = train.steps or max(1, round(train.tokens_per_param * scaling / batch))
    if train.fp4_until < 1 and not 0 < (switch := round(train.fp4_until * steps)) < steps:
        raise UserError(f"fp4_until={train.fp4_until} of {steps} steps is after step {switch}, and must be in their midst; try 0.82")
    last = skipped_last(model, train.fp4_recipe) if train.fp4_skip_last is None else train.fp4_skip_last
    return dataclasses.replace(config, model=model, train=dataclasses.replace(train, batch_tokens=batch, steps=steps, fp4_skip_last=last))


def skipped_last(model: ModelConfig, recipe: str) -> int:
    """Last blocks that a 4-bit recipe leaves out unless told otherwise; at least one block stays in it."""
    return min(model.depth - 1, math.ceil(FULL_RECIPE_SKIPS * model.depth)) if recipe == "full" else 0


def micro_batch(config: Config, replicas: int) -> int:
    """Rows that each of `replicas` batch shards takes at a time, for a resolved config.

    Raises UserError when the rows of a step cannot be dealt out evenly.
    """
    train, t = config.train, config.model.seq_len
    rows = config.batch_tokens // t
    if rows % replicas:
        raise UserError(
            f"a step has {rows} rows (batch_tokens={train.batch_tokens} / seq_len={t}), which {replicas} devices along data and fsdp "
            f"cannot share evenly; try --batch-tokens {round_up(rows, replicas) * t}"
        )
    share = rows // replicas
    if train.micro_batch is None:
        most = max(1, min(MICRO_BATCH_ROWS, MICRO_BATCH_TOKENS // t))
        return max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    if share % train.micro_batch:
        raise UserError(
            f"micro_batch={train.micro_batch} must divide the {share} rows that each device takes a step; "
            f"try --micro-batch {nearest_divisor(share, train.micro_batch)}"
        )
    return train.micro_batch
