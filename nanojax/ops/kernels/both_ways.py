"""Rounding to 8 bits, rows and columns in one pass: tensor cores of 8 bits read both operands along what they sum over.

XLA rounds twice, and turns by kernels that reach half of the memory's rate. What is rounded may be made on the way, and is then never
written. B batch, T tokens, N of both, I columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.kernels.spread import PARTS, ROWS, Spread, alone

SIDE, WARPS = 128, 8  # of the square that an instance turns, half of it where there are two, and of an instance (scripts/bench/LOG.md)


class Work(NamedTuple):
    """What is rounded, and of what it is made, number by number."""

    make: Callable[..., tuple[Array, ...]]
    """(the parts of each tensor that is read, one after the other, in float32) -> parts of what is rounded."""
    reads: tuple[int, ...] = (1,)
    """Parts of each tensor, side by side along its columns and of one size."""
    makes: int = 1
    """Parts, side by side too."""


GIVEN = Work(lambda x: (x,))


def made(work: Work, xs: Sequence[Array]) -> tuple[Array, ...]:
    """The parts of what is rounded, in the type of what is read."""
    parts = [part.astype(jnp.float32) for x, count in zip(xs, work.reads, strict=True) for part in jnp.split(x, count, axis=-1)]
    return tuple(part.astype(xs[0].dtype) for part in work.make(*parts))


def narrowed(x: Array, scale: Float[Array, ""], dtype: DTypeLike) -> Array:
    """x / scale in an 8-bit type, cut off at its largest number, beyond which E4M3 has nothing but NaN."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) / scale, -top, top).astype(dtype)


def both_ways_reference(work: Work, xs: tuple[Array, ...], scale: Float[Array, ""], dtype: DTypeLike) -> tuple[Array, Array]:
    """`both_ways` written out."""
    q_BTI = narrowed(jnp.concatenate(made(work, xs), axis=-1), scale, dtype)
    return q_BTI, q_BTI.reshape(-1, q_BTI.shape[-1]).T


def both_ways(
    work: Work,
    xs: tuple[Float[Array, "B T _"], ...],
    scale: Float[Array, ""],
    dtype: DTypeLike,
    *,
    interpret: bool = False,
    spread: Spread = alone,
) -> tuple[Float[Array, "B T I"], Float[Array, "I N"]]:
    """What `work` makes of xs, `narrowed`, and the same turned. `scale` is a power of two.

    Tokens that lie on several devices follow one another by device.
    """
    local = functools.partial(_call, work, dtype, interpret)
    return spread(local, ((), *(ROWS for _ in xs)), [ROWS, (None, *PARTS)])(scale, *xs)


def _call(work: Work, dtype: DTypeLike, interpret: bool, scale: Array, *xs: Array) -> tuple[Array, Array]:
    """Run the kernel over squares of every part."""
    flat = [x.reshape(-1, count, x.shape[-1] // count) for x, count in zip(xs, work.reads, strict=True)]
    n, _, columns = flat[0].shape
    side = SIDE // work.makes
    down, across = (min(side, size & -size) for size in (n, columns))  # powers of two that divide them
    square = functools.partial(pl.BlockSpec, index_map=lambda i, j: (i, 0, j))
    values, turned = pl.pallas_call(
        functools.partial(_round, work, xs[0].dtype),
        out_shape=[jax.ShapeDtypeStruct((n, work.makes, columns), dtype), jax.ShapeDtypeStruct((work.makes, columns, n), dtype)],
        grid=(n // down, columns // across),
        in_specs=[pl.BlockSpec((1,), lambda i, j: (0,)), *(square((down, x.shape[1], across)) for x in flat)],
        out_specs=[square((down, work.makes, across)), pl.BlockSpec((work.makes, across, down), lambda i, j: (0, j, i))],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="round_both_ways",
        interpret=interpret,
    )(scale.reshape(1), *flat)
    return values.reshape(*xs[0].shape[:-1], -1), turned.reshape(-1, n)


def _round(work: Work, dtype: DTypeLike, scale_ref, *refs):
    *x_refs, q_ref, turned_ref = refs
    tiles = [ref[:, part, :].astype(jnp.float32) for ref, count in zip(x_refs, work.reads, strict=True) for part in range(count)]
    for part, tile in enumerate(work.make(*tiles)):
        q = narrowed(tile.astype(dtype), scale_ref[0], q_ref.dtype)
        q_ref[:, part, :] = q
        turned_ref[part] = q.T
