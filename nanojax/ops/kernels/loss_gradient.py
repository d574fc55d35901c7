"""The gradient of the loss by the logits, made where it is rounded to 8 bits: it is never written. B batch, T tokens, V vocabulary."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanojax.ops.kernels.cross_entropy import gradient, nats_and_sums
from nanojax.ops.kernels.work import COLUMN, TOKEN, Each, Work

Made = tuple[Work, tuple[Array, ...]]
"""A work, and what it is done on."""
BOUND = 1.0  # of probabilities, less one for the target, times slopes of a cap


@functools.cache
def loss_gradient(softcap: float | None, interpret: bool) -> Each:
    """(logits [B, T, V], the logarithms of their sums and targets, [B, T] each, places [V]) -> [B, T, V]."""

    def make(x: Array, log2_sum: Array, target: Array, at: Array) -> tuple[Array]:
        return (gradient(x, at, target, log2_sum, softcap, interpret),)

    return Each(make, (1, TOKEN, TOKEN, COLUMN), warps=8, bound=BOUND)


def nats_and_gradient(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], softcap: float | None, *, interpret: bool = False
) -> tuple[Float[Array, "B T"], Made]:
    """(nats of every token in float32, how the gradient of their sum by the logits is made)."""
    v = logits_BTV.shape[-1]
    nats, sums = nats_and_sums(logits_BTV.reshape(-1, v), targets_BT.reshape(-1), softcap, interpret=interpret)
    xs = logits_BTV, sums.reshape(targets_BT.shape), targets_BT, jnp.arange(v)
    return nats.reshape(targets_BT.shape), (loss_gradient(softcap, interpret), xs)
