"""Bits per byte on the validation documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from nanojax.data.loader import validation_batches
from nanojax.data.packing import load_or_make
from nanojax.data.shards import Prepared
from nanojax.mesh import batch_sharding, replicated
from nanojax.program import Program
from nanojax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Validation:
    """Sums over the validation rows."""

    bpb: float
    """Nats of the targets that stand for bytes, over ln 2 times those bytes; special tokens count for neither."""
    loss: float
    """Mean nats of all targets."""
    targets: int


def evaluate(eval_step: Callable, weights: dict[str, Array], batches: Iterable[Any], bytes_V: Array) -> Validation:
    """Run `eval_step` (program.Program's) over batches and add up in float64 on the host. Waits for each batch."""
    sums = {"nats": 0.0, "bytes": 0.0, "all_nats": 0.0, "targets": 0.0}
    for batch in batches:
        for name, value in eval_step(weights, batch, bytes_V).items():
            sums[name] += float(np.asarray(value))
    return Validation(
        bpb=sums["nats"] / (math.log(2) * max(1.0, sums["bytes"])),
        loss=sums["all_nats"] / max(1.0, sums["targets"]),
        targets=int(sums["targets"]),
    )


def validator(program: Program, data: Prepared, between: Callable[[], None] = lambda: None) -> Callable[[dict[str, Array]], Validation]:
    """Prepared weights -> Validation on the first `eval_tokens` of the validation split, always the same rows in the same order.

    `between` is called before each batch.
    """
    config, mesh, n_vocab = program.config, program.mesh, data.tokenizer.n_vocab
    cap = config.data.documents
    plan = load_or_make(data.val, seq_len=config.model.seq_len, packing=config.data.packing, seed=None, max_documents=cap)
    bytes_V = jax.device_put(bytes_table(data.tokenizer, config.model.vocab_size), replicated(mesh))

    def validate(weights: dict[str, Array]) -> Validation:
        batches = validation_batches(
            data.val,
            plan,
            rows_per_batch=program.rows,
            max_tokens=config.train.eval_tokens,
            sharding=batch_sharding(mesh),
            n_vocab=n_vocab,
        )
        return evaluate(program.eval_step, weights, (between() or batch for batch in batches), bytes_V)

    return validate


def bytes_table(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int32 [V]: bytes that each token stands for, 0 for specials and for the padding of the vocabulary."""
    table = tokenizer.bytes_per_token()
    return np.pad(table, (0, vocab_size - len(table))).astype(np.int32)
