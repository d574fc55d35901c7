"""Rounding to 8 bits, rows and columns in one pass: tensor cores of 8 bits read both operands along what they sum over.

XLA rounds twice, and turns by kernels that reach half of the memory's rate. N tokens, I columns.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float

SIDE, WARPS = 128, 8  # of the square that an instance turns (scripts/bench/LOG.md)


def narrowed(x: Array, scale: Float[Array, ""], dtype: DTypeLike) -> Array:
    """x / scale in an 8-bit type, cut off at its largest number, beyond which E4M3 has nothing but NaN."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) / scale, -top, top).astype(dtype)


def both_ways_reference(x_NI: Float[Array, "N I"], scale: Float[Array, ""], dtype: DTypeLike) -> tuple[Array, Array]:
    """`both_ways` written out."""
    q_NI = narrowed(x_NI, scale, dtype)
    return q_NI, q_NI.T


def both_ways(
    x_NI: Float[Array, "N I"], scale: Float[Array, ""], dtype: DTypeLike, *, interpret: bool = False
) -> tuple[Float[Array, "N I"], Float[Array, "I N"]]:
    """`narrowed`, and the same turned; `scale` is a power of two."""
    n, columns = x_NI.shape
    down, across = (min(SIDE, size & -size) for size in (n, columns))  # powers of two that divide them
    made: Any = pl.pallas_call(
        _round,
        out_shape=[jax.ShapeDtypeStruct((n, columns), dtype), jax.ShapeDtypeStruct((columns, n), dtype)],
        grid=(n // down, columns // across),
        in_specs=[pl.BlockSpec((down, across), lambda i, j: (i, j)), pl.BlockSpec((1,), lambda i, j: (0,))],
        out_specs=[pl.BlockSpec((down, across), lambda i, j: (i, j)), pl.BlockSpec((across, down), lambda i, j: (j, i))],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="round_both_ways",
        interpret=interpret,
    )(x_NI, scale.reshape(1))
    return made


def _round(x_ref, scale_ref, q_ref, turned_ref):
    q = narrowed(x_ref[...], scale_ref[0], q_ref.dtype)
    q_ref[...] = q
    turned_ref[...] = q.T
