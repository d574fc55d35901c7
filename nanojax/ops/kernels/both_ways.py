"""Rounding to 8 bits, rows and columns in one pass: tensor cores of 8 bits read both operands along what they sum over.

XLA rounds twice, and turns by kernels that reach half of the memory's rate. What is rounded may be made on the way, and is then never
written. A pass for the largest number first would take half as long again: a few tokens say what scale to try, the pass that rounds
finds the largest number, and what did not fit is rounded once more. B batch, T tokens, N of both, I columns; C columns of a part and L
lanes of a square as in work.py.
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
from nanojax.ops.kernels.work import EVERY, Cut, Tiles, Work

ROOM = 4  # all numbers may be so many times as large as those of the tokens that say how large they are
PROGRAMS = 256  # instances that look whether all fitted: most often they have nothing to do
SIZES = 4096  # that such an instance loads at a time
MANTISSA = (1 << 23) - 1  # the bits of float32 that a power of two has not


class Rounded(NamedTuple):
    """In 8 bits."""

    values: Float[Array, "B T I"]
    turned: Float[Array, "I N"]
    scale: Float[Array, ""]
    """float32; what both are multiplied by."""
    sums: Array | None
    """What the work sums over tokens, one part for each of some."""


def narrowed(x: Array, scale: Float[Array, ""], dtype: DTypeLike) -> Array:
    """x / scale in an 8-bit type, into which it fits. `scale` is a power of two."""
    return (x.astype(jnp.float32) * (1 / scale)).astype(dtype)  # as exact as a division, and a GPU's is long


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
    """The largest size along the last axis of arrays that differ in nothing else."""
    return functools.reduce(jnp.maximum, (jnp.max(size_of(part), axis=-1) for part in parts))


def seen(work: Work, xs: Sequence[Array]) -> Float[Array, " S"]:
    """The largest number that is made of every `EVERY`th token, each."""
    if work.bound is not None:
        return jnp.full(1, work.bound / ROOM, jnp.float32)
    return largest_of(work.made(work.few(xs))[0]).astype(jnp.float32).reshape(-1)


def both_ways_reference(work: Work, xs: tuple[Array, ...], dtype: DTypeLike) -> Rounded:
    """`both_ways` written out."""
    parts, sums = work.made(xs)
    scale = jnp.maximum(ROOM * scale_for(jnp.max(seen(work, xs)), dtype), scale_for(jnp.max(largest_of(parts)), dtype))
    q_BTI = narrowed(jnp.concatenate(parts, axis=-1), scale, dtype)
    return Rounded(q_BTI, q_BTI.reshape(-1, q_BTI.shape[-1]).T, scale, sums)


class _Job(NamedTuple):
    """What a kernel is compiled for."""

    work: Work
    cut: Cut
    dtype: DTypeLike
    """Of what is made, before it is rounded."""
    interpret: bool


def both_ways(work: Work, xs: tuple[Array, ...], dtype: DTypeLike, *, interpret: bool = False, spread: Spread = alone) -> Rounded:
    """What `work` makes of xs, [B, T, _] unless it says otherwise, over a scale and rounded.

    The scale is a power of two: the smallest that lets all into the type or, where that is larger, `ROOM` times the smallest for every
    `EVERY`th token of a row, or of the part of it that a device has, or for the work's bound where it has one; NaN where anything is not
    finite, and then the numbers mean nothing.
    Tokens that lie on several devices follow one another by device.
    """
    turned, sums = (None, *PARTS), [PARTS] * len(work.sums(xs))
    # Devices agree by maxima, not by gathering: XLA would gather weights together with what has to be waited for.
    seen_S = jnp.max(spread(functools.partial(_call_seen, work, interpret), work.axes, PARTS)(*xs), axis=0)
    first = spread(functools.partial(_call, work, dtype, interpret), ((), *work.axes), [ROWS, turned, PARTS, *sums])
    values, turned_IN, largest_PS, *made = first(seen_S, *xs)
    again = spread(functools.partial(_call_again, work, interpret), ((), (), ROWS, turned, *work.axes), [ROWS, turned, ()])
    values, turned_IN, scale = again(seen_S, jnp.max(largest_PS, axis=0), values, turned_IN, *xs)
    return Rounded(values, turned_IN, scale[0], made[0] if made else None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call_seen(work: Work, interpret: bool, *xs: Array) -> Float[Array, "1 S"]:
    """The largest that each instance sees, or by `seen` where a lane of so many tokens would be cut off by the end of a row.

    Nothing is looked at where the work says how large numbers are.
    """
    if work.bound is not None or xs[0].shape[1] % EVERY:
        return seen(work, xs)[None]
    cut = work.cut(xs, EVERY)
    largest = jax.ShapeDtypeStruct((cut.grid[0] * cut.grid[1],), jnp.float32)
    return _run(_see, _Job(work, cut, xs[0].dtype, interpret), cut.grid[::-1], work.views(cut, xs), [largest])[0][None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(work: Work, dtype: DTypeLike, interpret: bool, seen_S: Array, *xs: Array) -> tuple[Array, ...]:
    """Round by the scale that is tried first: (rows, columns, the largest number of each instance, sums if there are any)."""
    cut = work.cut(xs)
    n, parts, columns = cut.shape
    shapes = [(n // cut.lanes, cut.lanes, parts, columns), (parts, columns, n), (cut.grid[0] * cut.grid[1],), *work.sums(xs)]
    types = [dtype, dtype, *[jnp.float32] * (len(shapes) - 2)]
    results = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, types, strict=True)]
    job, inputs = _Job(work, cut, xs[0].dtype, interpret), (seen_S, *work.views(cut, xs))
    values, turned, largest, *sums = _run(_round_both_ways, job, cut.grid[::-1], inputs, results)
    return values.reshape(*xs[0].shape[:2], -1), turned.reshape(-1, n), largest[None], *sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call_again(work: Work, interpret: bool, seen_S: Array, largest: Array, values: Array, turned: Array, *xs: Array) -> tuple[Array, ...]:
    """Write over both, if that has to be, by the scale into which all fits; and that scale."""
    cut = work.cut(xs)
    n, parts, columns = cut.shape
    written = cut.views(values, parts, columns), turned.reshape(parts, columns, n)
    inputs = (seen_S, largest, *written, *work.views(cut, xs))  # the first two are always read (analysis/hlo.py)
    results = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written), jax.ShapeDtypeStruct((1,), jnp.float32)]
    grid = (min(PROGRAMS, cut.grid[0] * cut.grid[1]),)
    made = _run(_round_again, _Job(work, cut, xs[0].dtype, interpret), grid, inputs, results, {2: 0, 3: 1})
    return made[0].reshape(values.shape), made[1].reshape(turned.shape), made[2]


def _run(
    kernel: Callable,
    job: _Job,
    grid: tuple[int, ...],
    inputs: Sequence[Array],
    results: Sequence[Any],
    aliases: dict[int, int] | None = None,
) -> Any:
    """Run a kernel whose instances load and store what they want of whole arrays."""

    def whole(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

    return pl.pallas_call(
        functools.partial(kernel, job),
        out_shape=results,
        grid=grid,
        in_specs=[whole(x) for x in inputs],
        out_specs=[whole(x) for x in results],
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=job.work.warps, num_stages=1),
        name=kernel.__name__.removeprefix("_"),
        interpret=job.interpret,
    )(*inputs)


def _largest_in(sizes_ref) -> Array:
    """The largest of sizes, however many."""
    (n,) = sizes_ref.shape
    at_once = min(SIZES, 1 << (n - 1).bit_length())

    def larger(i, largest):
        place = i * at_once + jnp.arange(at_once)
        sizes = triton.load(sizes_ref.at[pl.ds(i * at_once, at_once)], mask=place < n, other=0.0)
        return jnp.maximum(largest, jnp.max(sizes))

    return jax.lax.fori_loop(0, -(-n // at_once), larger, jnp.float32(0))


def _see(job: _Job, *refs):
    *x_refs, largest_ref = refs
    j, i = pl.program_id(0), pl.program_id(1)

    def run(tiles: Tiles) -> None:
        values = [part.value.astype(job.dtype).astype(jnp.float32) for part in tiles(0)[0]]
        largest_ref[i * job.cut.grid[1] + j] = jnp.max(functools.reduce(jnp.maximum, map(size_of, values)))

    _choose(job, x_refs, (i, j), run)


def _choose(job: _Job, x_refs: Sequence[Any], place: tuple[Any, Any], run: Callable[[Tiles], None]) -> None:
    """Run with that way to make a square which applies to this one."""
    for when, tiles in job.work.cases(job.cut, x_refs, *place):
        run(tiles) if when is None else pl.when(when)(functools.partial(run, tiles))


def _round_both_ways(job: _Job, seen_ref, *refs):
    tensors = len(job.work.axes)
    x_refs, (q_ref, turned_ref, largest_ref, *sum_refs) = refs[:tensors], refs[tensors:]
    j, i = pl.program_id(0), pl.program_id(1)

    def done(largest: Array, sums: Sequence[Array]) -> None:
        largest_ref[i * job.cut.grid[1] + j] = largest
        for at, total in enumerate(sums):
            sum_refs[0][i, j, at] = jnp.sum(total, axis=0)

    _square(job, ROOM * scale_for(_largest_in(seen_ref), q_ref.dtype), x_refs, (q_ref, turned_ref), (i, j), done)


def _round_again(job: _Job, seen_ref, largest_ref, *refs):
    _, _, *x_refs, q_ref, turned_ref, scale_ref = refs  # what is written over is not read
    to, mine, programs, (down, across) = q_ref.dtype, pl.program_id(0), pl.num_programs(0), job.cut.grid
    first, needed = ROOM * scale_for(_largest_in(seen_ref), to), scale_for(_largest_in(largest_ref), to)
    scale_ref[0] = jnp.where(needed <= first, first, needed)  # which may be NaN

    @pl.when(needed > first)
    def _():
        @pl.loop(0, -(-down * across // programs))
        def _(turn):
            square = mine + turn * programs

            @pl.when(square < down * across)
            def _():
                place = square // across, square % across
                _square(job, needed, x_refs, (q_ref, turned_ref), place, lambda largest, sums: None)


def _square(job: _Job, scale: Array, x_refs: Sequence[Any], out_refs: tuple[Any, Any], place: tuple[Any, Any], done: Callable) -> None:
    """Round a square, and give the largest of what was rounded, and sums, to `done`."""
    cut, (q_ref, turned_ref), (i, _) = job.cut, out_refs, place

    def run(tiles: Tiles) -> None:
        words, sizes, sums, parts = [], [], [], ()
        for lane in range(cut.lanes):
            parts, more = tiles(lane)
            values = [part.value.astype(job.dtype).astype(jnp.float32) for part in parts]
            in_8_bits = [narrowed(x, scale, q_ref.dtype) for x in values]
            for part, q in zip(parts, in_8_bits, strict=True):
                q_ref[cut.rows(i), lane, part.at, part.columns] = q
            bytes_ = [jax.lax.bitcast_convert_type(q, jnp.uint8).astype(jnp.uint32) << (8 * lane) for q in in_8_bits]
            words, sums = _joined(jnp.bitwise_or, words, bytes_), _joined(jnp.add, sums, more)
            sizes = _joined(jnp.maximum, sizes, [functools.reduce(jnp.maximum, map(size_of, values))])
        for part, word in zip(parts, words, strict=True):
            turned = jax.lax.bitcast_convert_type(_woven(word.T, cut.lanes), q_ref.dtype)
            turned_ref[part.at, part.columns, pl.ds(i * cut.down, cut.down)] = turned
        done(jnp.max(sizes[0]), sums)

    _choose(job, x_refs, place, run)


def _joined(f: Callable, before: Sequence[Array], more: Sequence[Array]) -> list[Array]:
    """Each with the same of the lanes before, if there are any. All lanes at the end would be as much more to hold."""
    return list(map(f, before, more)) if before else list(more)


def _woven(words: Array, count: int, every: int = 1, first: int = 0) -> Array:
    """[C, count * n] of words [C, n]: their bytes side by side, as many as `count`, a power of two."""
    if count == 1:
        return (words >> (8 * first)).astype(jnp.uint8)
    a, b = (_woven(words, count // 2, 2 * every, first + i * every) for i in range(2))
    return jnp.concatenate([a[..., None], b[..., None]], axis=-1).reshape(words.shape[0], -1)
