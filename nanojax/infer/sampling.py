"""Logits to tokens: temperature, filters, and draws that are a row's own. B batch, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nanojax.infer.params import SamplingParams


class Controls(NamedTuple):
    """SamplingParams of the rows of a batch, as arrays: other values compile nothing."""

    temperature_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    top_p_B: Float[Array, " B"]
    min_p_B: Float[Array, " B"]
    seed_B: Int[Array, " B"]

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> Controls:
        """In float32 and int32, on the host."""
        types = (np.float32, np.int32, np.float32, np.float32, np.int32)
        columns = ([getattr(row, field.removesuffix("_B")) for row in rows] for field in cls._fields)
        arrays: Any = [np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)]
        return cls(*arrays)


def draw(logits_BV: Float[Array, "B V"], controls: Controls, index_B: Int[Array, " B"], filters: bool) -> Int[Array, " B"]:
    """The next token of each row, which has `index` tokens so far. filters=False skips the sort, for rows that leave nothing out.

    A token's noise is a function of seed, index and its id: it is the same whatever the other rows are, and with filters or without.
    """
    scaled_BV = logits_BV / jnp.where(controls.temperature_B > 0, controls.temperature_B, 1.0)[:, None]

    def noise(seed: Array, index: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), logits_BV.shape[1:], jnp.float32)

    noise_BV = jax.vmap(noise)(controls.seed_B, index_B)
    if filters:
        order_BV = jnp.argsort(scaled_BV, axis=1, descending=True)  # stable: of equals the lower id, as argmax has it
        ranked_BV, noise_BV = (jnp.take_along_axis(x_BV, order_BV, axis=1) for x_BV in (scaled_BV, noise_BV))
        best_B = jnp.argmax(jnp.where(kept(ranked_BV, controls), ranked_BV + noise_BV, -jnp.inf), axis=1)
        drawn_B = jnp.take_along_axis(order_BV, best_B[:, None], axis=1)[:, 0]
    else:
        drawn_B = jnp.argmax(scaled_BV + noise_BV, axis=1)
    return jnp.where(controls.temperature_B > 0, drawn_B, likeliest(logits_BV)).astype(jnp.int32)


def likeliest(logits_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The token of the largest logit of each row, of equals the first."""
    return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)


def kept(ranked_BV: Float[Array, "B V"], controls: Controls) -> Bool[Array, "B V"]:
    """Which of the logits, sorted from the largest down, the filters leave; always the first."""
    top_k_B1, top_p_B1, min_p_B1 = (x_B[:, None] for x_B in controls[1:4])
    keep_BV = (jnp.arange(ranked_BV.shape[1])[None] < top_k_B1) | (top_k_B1 == 0)
    probs_BV = jax.nn.softmax(jnp.where(keep_BV, ranked_BV, -jnp.inf), axis=1)
    before_BV = jnp.cumsum(probs_BV, axis=1) - probs_BV
    keep_BV &= (before_BV < top_p_B1) | (top_p_B1 == 1)  # == 1: rounded sums reach it before the last token
    first = jnp.arange(ranked_BV.shape[1])[None] == 0
    return (keep_BV & (probs_BV >= min_p_B1 * probs_BV[:, :1])) | first
