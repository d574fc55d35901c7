"""Rounding to 8 bits, rows and columns in one pass: tensor cores of 8 bits read both operands along what they sum over.

XLA rounds twice, and turns by kernels that reach half of the memory's rate. What is rounded may be made on the way, and is then never
written. A pass for the largest number first would take half as long again: a few tokens say what scale to try, the pass that rounds
finds the largest number, and what did not fit is rounded once more. B batch, T tokens, N of both, I columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.kernels.spread import PARTS, ROWS, Spread, alone

# What other sides and warps take is in scripts/bench/LOG.md.
SIDE = 128  # columns of a square that an instance turns, and tokens of all its squares together
WARPS = 8  # of an instance
EVERY, ROOM = 64, 4  # of so many tokens one says how large numbers are, and all may be so many times as large
PROGRAMS = 256  # instances that look whether all fitted: most often they have nothing to do
AT_ONCE = 4096  # sizes that such an instance loads at a time
MANTISSA = (1 << 23) - 1  # the bits of float32 that a power of two has not


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
    """x / scale in an 8-bit type, cut off at its largest number, beyond which E4M3 has nothing but NaN. `scale` is a power of two."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * (1 / scale), -top, top).astype(dtype)  # as exact as a division, and a GPU's is long


def scale_for(largest: Float[Array, ""], dtype: DTypeLike) -> Float[Array, ""]:
    """The smallest power of two that, as scale, lets this number into an 8-bit type; NaN where it is not finite."""
    ratio = largest.astype(jnp.float32) / float(jnp.finfo(dtype).max)
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(ratio, jnp.int32) + MANTISSA & ~MANTISSA, jnp.float32)
    # Normal numbers, and their reciprocals too: processors that flush denormals would divide by zero.
    return jnp.where(largest < jnp.inf, jnp.clip(power, 2.0**-126, 2.0**126), jnp.nan)


def size_of(x: Array) -> Array:
    """|x|, infinite where x is not a number: a maximum may pass over NaN, on CPUs and GPUs."""
    size = jnp.abs(x)
    return jnp.where(size < jnp.inf, size, jnp.inf)


def largest_of(parts: Sequence[Array]) -> Array:
    """The largest size along the last axis of arrays of one shape."""
    return jnp.max(functools.reduce(jnp.maximum, map(size_of, parts)), axis=-1)


def seen(work: Work, xs: Sequence[Float[Array, "B T _"]]) -> Float[Array, " S"]:
    """The largest number that is made of every `EVERY`th token, each."""
    return largest_of(made(work, [x[:, ::EVERY] for x in xs])).astype(jnp.float32).reshape(-1)


def both_ways_reference(work: Work, xs: tuple[Array, ...], dtype: DTypeLike) -> tuple[Array, Array, Array]:
    """`both_ways` written out."""
    parts = made(work, xs)
    scale = jnp.maximum(ROOM * scale_for(jnp.max(seen(work, xs)), dtype), scale_for(jnp.max(largest_of(parts)), dtype))
    q_BTI = narrowed(jnp.concatenate(parts, axis=-1), scale, dtype)
    return q_BTI, q_BTI.reshape(-1, q_BTI.shape[-1]).T, scale


def both_ways(
    work: Work, xs: tuple[Float[Array, "B T _"], ...], dtype: DTypeLike, *, interpret: bool = False, spread: Spread = alone
) -> tuple[Float[Array, "B T I"], Float[Array, "I N"], Float[Array, ""]]:
    """(what `work` makes of xs over the scale, rounded; the same turned; the scale, float32).

    The scale is a power of two: the smallest that lets all into the type or, where that is larger, `ROOM` times the smallest for every
    `EVERY`th token of a row, or of the part of it that a device has; NaN where anything is not finite, and then the numbers mean nothing.
    Tokens that lie on several devices follow one another by device.
    """
    rows, turned = [ROWS for _ in xs], (None, *PARTS)
    # Devices agree by maxima, not by gathering: XLA would gather weights together with what has to be waited for.
    seen_S = jnp.max(spread(lambda *xs: seen(work, xs)[None], rows, PARTS)(*xs), axis=0)
    *first, largest_PS = spread(functools.partial(_call, work, dtype, interpret), ((), *rows), [ROWS, turned, PARTS])(seen_S, *xs)
    again = spread(functools.partial(_call_again, work, interpret), ((), (), ROWS, turned, *rows), [ROWS, turned, ()])
    values, turned, scale = again(seen_S, jnp.max(largest_PS, axis=0), *first, *xs)
    return values, turned, scale[0]


def _squares(work: Work, xs: Sequence[Array]) -> tuple[list[Array], tuple[int, int], tuple[int, int]]:
    """(arrays [N, parts, I / parts], sides of a square, squares down and across): all sides are powers of two."""
    flat = [x.reshape(-1, count, x.shape[-1] // count) for x, count in zip(xs, work.reads, strict=True)]
    size = flat[0].shape[0], flat[0].shape[2]
    down, across = (min(side, n & -n) for side, n in zip((SIDE // work.makes, SIDE), size, strict=True))
    return flat, (down, across), (size[0] // down, size[1] // across)


def _call(work: Work, dtype: DTypeLike, interpret: bool, seen_S: Array, *xs: Array) -> tuple[Array, Array, Array]:
    """Round by the scale that is tried first, a square of every part an instance: (rows, columns, the largest number of each instance)."""
    flat, (down, across), grid = _squares(work, xs)
    n, _, columns = flat[0].shape
    square = functools.partial(pl.BlockSpec, index_map=lambda i, j: (i, 0, j))
    values, turned, largest = pl.pallas_call(
        functools.partial(_round, work, xs[0].dtype, grid[1]),
        out_shape=[
            jax.ShapeDtypeStruct((n, work.makes, columns), dtype),
            jax.ShapeDtypeStruct((work.makes, columns, n), dtype),
            jax.ShapeDtypeStruct((grid[0] * grid[1],), jnp.float32),
        ],
        grid=grid,
        in_specs=[_whole(seen_S.shape), *(square((down, x.shape[1], across)) for x in flat)],
        out_specs=[
            square((down, work.makes, across)),
            pl.BlockSpec((work.makes, across, down), lambda i, j: (0, j, i)),
            _whole((grid[0] * grid[1],)),
        ],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="round_both_ways",
        interpret=interpret,
    )(seen_S, *flat)
    return values.reshape(*xs[0].shape[:-1], -1), turned.reshape(-1, n), largest[None]


def _call_again(
    work: Work, interpret: bool, seen_S: Array, largest: Array, values: Array, turned: Array, *xs: Array
) -> tuple[Array, Array, Array]:
    """Write over both, if that has to be, by the scale into which all fits; and that scale."""
    flat, sides, grid = _squares(work, xs)
    n, _, columns = flat[0].shape
    written = values.reshape(n, work.makes, columns), turned.reshape(work.makes, columns, n)
    inputs = (seen_S, largest, *written, *flat)  # the first two are always read (analysis/hlo.py)
    results = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written), jax.ShapeDtypeStruct((1,), jnp.float32)]
    values_NPI, turned_PIN, scale = pl.pallas_call(
        functools.partial(_round_again, work, xs[0].dtype, sides, grid),
        out_shape=results,
        grid=(min(PROGRAMS, grid[0] * grid[1]),),
        in_specs=[_whole(x.shape) for x in inputs],
        out_specs=[_whole(x.shape) for x in results],
        input_output_aliases={2: 0, 3: 1},
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="round_again",
        interpret=interpret,
    )(*inputs)
    return values_NPI.reshape(values.shape), turned_PIN.reshape(turned.shape), scale


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """An array of which an instance loads what it wants."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _largest_in(sizes_ref) -> Array:
    """The largest of sizes, however many."""
    (n,) = sizes_ref.shape
    at_once = min(AT_ONCE, 1 << (n - 1).bit_length())

    def larger(i, largest):
        place = i * at_once + jnp.arange(at_once)
        sizes = triton.load(sizes_ref.at[pl.ds(i * at_once, at_once)], mask=place < n, other=0.0)
        return jnp.maximum(largest, jnp.max(sizes))

    return jax.lax.fori_loop(0, -(-n // at_once), larger, jnp.float32(0))


def _round(work: Work, dtype: DTypeLike, across: int, seen_ref, *refs):
    *refs, largest_ref = refs
    scale = ROOM * scale_for(_largest_in(seen_ref), refs[-1].dtype)
    parts = _square(work, dtype, scale, refs, slice(None), slice(None))
    largest_ref[pl.program_id(0) * across + pl.program_id(1)] = jnp.max(functools.reduce(jnp.maximum, map(size_of, parts)))


def _round_again(work: Work, dtype: DTypeLike, sides: tuple[int, int], grid: tuple[int, int], seen_ref, largest_ref, *refs):
    _, _, *refs, scale_ref = refs  # what is written over is not read
    to, mine, programs = refs[-1].dtype, pl.program_id(0), pl.num_programs(0)
    first, needed = ROOM * scale_for(_largest_in(seen_ref), to), scale_for(_largest_in(largest_ref), to)
    scale_ref[0] = jnp.where(needed <= first, first, needed)  # which may be NaN

    @pl.when(needed > first)
    def _():
        @pl.loop(0, -(-grid[0] * grid[1] // programs))
        def _(turn):
            square = mine + turn * programs

            @pl.when(square < grid[0] * grid[1])
            def _():
                places = (pl.ds(at * side, side) for at, side in zip((square // grid[1], square % grid[1]), sides, strict=True))
                _square(work, dtype, needed, refs, *places)


def _square(work: Work, dtype: DTypeLike, scale: Array, refs: Sequence[Any], rows: Any, columns: Any) -> list[Array]:
    """Round a square of every part, and give what was rounded, in float32."""
    *x_refs, q_ref, turned_ref = refs
    tiles = [ref[rows, part, columns].astype(jnp.float32) for ref, count in zip(x_refs, work.reads, strict=True) for part in range(count)]
    parts = [part.astype(dtype).astype(jnp.float32) for part in work.make(*tiles)]
    for i, part in enumerate(parts):
        q = narrowed(part, scale, q_ref.dtype)
        q_ref[rows, i, columns] = q
        turned_ref[i, columns, rows] = q.T
    return parts
