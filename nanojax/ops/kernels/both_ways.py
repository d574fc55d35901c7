"""Rounding to 8 bits, rows and columns in one pass: tensor cores of 8 bits read both operands along what they sum over.

XLA rounds twice, and turns by kernels that reach half of the memory's rate. B batch, T tokens, N of both, I columns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.kernels.spread import PARTS, ROWS, Spread, alone

SIDE, WARPS = 128, 8  # of the square that an instance turns (scripts/bench/LOG.md)


def narrowed(x: Array, scale: Float[Array, ""], dtype: DTypeLike) -> Array:
    """x / scale in an 8-bit type, cut off at its largest number, beyond which E4M3 has nothing but NaN."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) / scale, -top, top).astype(dtype)


def both_ways_reference(x_BTI: Float[Array, "B T I"], scale: Float[Array, ""], dtype: DTypeLike) -> tuple[Array, Array]:
    """`both_ways` written out."""
    q_BTI = narrowed(x_BTI, scale, dtype)
    return q_BTI, q_BTI.reshape(-1, x_BTI.shape[-1]).T


def both_ways(
    x_BTI: Float[Array, "B T I"], scale: Float[Array, ""], dtype: DTypeLike, *, interpret: bool = False, spread: Spread = alone
) -> tuple[Float[Array, "B T I"], Float[Array, "I N"]]:
    """`narrowed`, and the same turned; `scale` is a power of two. Tokens that lie on several devices follow one another by device."""
    return spread(functools.partial(_call, dtype=dtype, interpret=interpret), (ROWS, ()), [ROWS, (None, *PARTS)])(x_BTI, scale)


def _call(x_BTI: Array, scale: Array, *, dtype: DTypeLike, interpret: bool) -> tuple[Array, Array]:
    """Run the kernel over squares."""
    x_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
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
    return made[0].reshape(x_BTI.shape), made[1]


def _round(x_ref, scale_ref, q_ref, turned_ref):
    q = narrowed(x_ref[...], scale_ref[0], q_ref.dtype)
    q_ref[...] = q
    turned_ref[...] = q.T
