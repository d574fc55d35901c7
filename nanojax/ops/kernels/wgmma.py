"""Products on Hopper's tensor cores that end in a way of our own, by jax's Mosaic GPU: what follows a product finds it in registers.

One warpgroup fetches. Two others take tiles in turns, so that one multiplies while the other ends its tile, as in CUTLASS's "ping-pong"
kernels. M rows, K what is summed over, N columns.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

# What else was tried is in scripts/bench/LOG.md.
ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile, and of what is summed over at once
SQUARE = 64  # the part of a tile that is ended at once, rows and columns
TOGETHER = 8  # tiles one below the other before the next columns
PROCESSORS = 132  # of an H100 SXM and an H200; where there are fewer, some take their tiles after others
REGISTERS = 40, 232  # of a thread that fetches, and of one that multiplies


class Place(NamedTuple):
    """Of squares of an array that `end` reads or makes. Those of one array are given in the order in which they lie there."""

    wide: int
    """Squares of the array, side by side, for each call of `end`."""
    square: int
    """Which of those."""
    array: int = 0


class Product(NamedTuple):
    """What is multiplied, and what follows."""

    name: str
    end: Callable[..., Sequence[Array]]
    """(squares of the product, side by side, then inputs, float32) -> results."""
    results: tuple[Place, ...]
    """Of arrays that are made."""
    stages: int
    """Depths that are fetched ahead."""
    slots: int
    """Squares of a warpgroup that are on their way in or out; two at least where there are inputs."""
    inputs: tuple[Place, ...] = ()
    """Of the one array that `end` reads, if any."""
    across: int = 1
    """Squares of the product that `end` gets."""
    summed: bool = False
    """Whether `end` gives one more result, which is not made but summed over all columns."""

    def widths(self, columns: int) -> list[int]:
        """Columns of each array that is made of a product of so many."""
        wide = {place.array: place.wide for place in self.results}
        return [columns // self.across * wide[array] for array in sorted(wide)]


class Arrays(NamedTuple):
    """In the device's memory."""

    a: Any
    b: Any
    read: Any
    """What `end` reads, or None."""
    made: tuple[Any, ...]
    sums: Any
    """[columns of tiles, M], float32, or None."""


class Shared(NamedTuple):
    """In the memory of a multiprocessor, and what its warpgroups tell each other there."""

    a: Any
    b: Any
    squares: Any
    """[warpgroup, slot, input or result]."""
    sums: Any
    """[warpgroup, row of a tile], float32."""
    fetched: Any
    """Of each warpgroup its own: one whose turn it is not must not count what the other waits for."""
    used: Any
    loaded: Any


def fits(m: int, k: int, n: int) -> bool:
    """Whether a product [M, K] @ [K, N] is one of whole tiles."""
    return min(m, k, n) > 0 and m % ROWS == 0 and k % DEPTH == 0 and n % COLUMNS == 0


def side_by_side(ws: Sequence[Float[Array, "M F"]]) -> Float[Array, "M Y"]:
    """Arrays by turns of a square's columns, as `Place` has them; one after the other where a square does not divide them."""
    m, f = ws[0].shape
    side = SQUARE if f % SQUARE == 0 else f
    return jnp.stack([w.reshape(m, -1, side) for w in ws], axis=2).reshape(m, -1)


def apart(w_MY: Float[Array, "M Y"], count: int) -> list[Float[Array, "M F"]]:
    """The inverse of `side_by_side`."""
    m, f = len(w_MY), w_MY.shape[1] // count
    parts = w_MY.reshape(m, -1, count, SQUARE if f % SQUARE == 0 else f)
    return [parts[:, :, i].reshape(m, -1) for i in range(count)]


def multiply_reference(
    product: Product, a_MK: Array, b_KN: Array, read: Array | None = None, interpret: Any = None
) -> tuple[list[Array], Array | None]:
    """`multiply` written out, of any size, `end` and all in the type of a."""
    del interpret
    inputs = [] if read is None else [apart(read, place.wide)[place.square] for place in product.inputs]
    results = list(product.end(*apart(a_MK @ b_KN, product.across), *inputs))
    sums = jnp.sum(results.pop(), axis=1) if product.summed else None
    made = collections.defaultdict(list)
    for place, result in zip(product.results, results, strict=True):
        made[place.array].append(result)
    return [side_by_side(made[array]) for array in sorted(made)], sums


def multiply(
    product: Product, a_MK: Array, b_KN: Array, read: Array | None = None, interpret: Any = None
) -> tuple[list[Array], Float[Array, " M"] | None]:
    """(end(a @ b, inputs in `read`), in bfloat16 as all that is given, summed in float32; what is only summed).

    `interpret`: Mosaic GPU's own parameters, for other devices. Raises ValueError on what is not whole tiles, or of another type.
    """
    (m, k), (depth, n), arrays = a_MK.shape, b_KN.shape, (a_MK, b_KN) if read is None else (a_MK, b_KN, read)
    if not fits(m, k, n) or depth != k or any(x.dtype != jnp.bfloat16 for x in arrays) or (read is not None and len(read) != m):
        raise ValueError(
            f"{product.name} multiplies bfloat16 in tiles of {ROWS} x {DEPTH} by {DEPTH} x {COLUMNS}, and reads as many rows as it makes, "
            f"given {' and '.join(f'{x.dtype} {list(x.shape)}' for x in arrays)}; wgmma.fits tells"
        )
    shapes = [jax.ShapeDtypeStruct((m, width), a_MK.dtype) for width in product.widths(n)]
    shapes += [jax.ShapeDtypeStruct((n // COLUMNS, m), jnp.float32)] * product.summed
    made = list(_jitted(product, tuple(shapes), min(PROCESSORS, m // ROWS * (n // COLUMNS)), interpret)(*arrays))
    sums = jnp.sum(made.pop(), axis=0) if product.summed else None
    return made, sums


@functools.cache
def _jitted(product: Product, shapes: tuple[Any, ...], processors: int, interpret: Any) -> Callable:
    run = plgpu.kernel(
        functools.partial(_kernel, product),
        out_type=shapes,
        grid=(processors,),
        grid_names=("processor",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        kernel_name=product.name,
        interpret=interpret,
    )
    return jax.jit(run)  # lowered once for all layers


def _square_memory(*shape: int) -> Any:
    """Shared memory in the layout that tensor cores and the copies to and from it want."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _kernel(product: Product, a_ref, b_ref, *refs):
    read, made = refs[0] if product.inputs else None, refs[len(product.inputs) > 0 :]
    made, sums = (made[:-1], made[-1]) if product.summed else (made, None)
    arrays = Arrays(a_ref, b_ref, read, made, sums)
    shared = Shared(
        a=_square_memory(product.stages, ROWS, DEPTH),
        b=_square_memory(product.stages, DEPTH, COLUMNS),
        squares=_square_memory(2, product.slots, max(len(product.inputs), len(product.results)), SQUARE, SQUARE),
        sums=plgpu.SMEM((2, ROWS), jnp.float32),
        fetched=plgpu.Barrier(num_arrivals=2, num_barriers=2 * product.stages),
        used=plgpu.Barrier(num_arrivals=1, num_barriers=product.stages),
        loaded=plgpu.Barrier(num_arrivals=max(1, len(product.inputs)), num_barriers=2 * product.slots),
    )
    pl.run_scoped(lambda *scratch: _run(product, arrays, Shared(*scratch)), *shared, collective_axes="warpgroup")


def _run(product: Product, arrays: Arrays, shared: Shared) -> None:
    mine, depths = lax.axis_index("warpgroup"), arrays.a.shape[1] // DEPTH
    tiles = arrays.a.shape[0] // ROWS, arrays.b.shape[1] // COLUMNS
    each_tile = plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="processor")

    def place(info) -> tuple[Any, Any]:
        """Row, and the column of tiles."""
        row, column = plgpu.planar_snake(info.index[0], tiles, 0, TOGETHER)
        return row * ROWS, column

    @pl.when(mine == 2)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="decrease")

        @each_tile
        def _(info):
            _fetch(arrays, shared, place(info), lax.rem(info.local_index, 2), info.local_index * depths)

            @pl.when(info.local_index == info.num_local_steps - 1)
            def _():
                steps, stages = info.num_local_steps * depths, product.stages
                pl.loop(lax.max(steps - stages, 0), steps)(lambda step: plgpu.barrier_wait(shared.used.at[lax.rem(step, stages)]))

    @pl.when(mine < 2)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="increase")

        @each_tile
        def _(info):
            multiplied = functools.partial(_sum, shared, mine, info.local_index * depths, depths)
            pl.when(lax.rem(info.local_index, 2) == mine)(lambda: _tile(product, arrays, shared, mine, place(info), multiplied))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _fetch(arrays: Arrays, shared: Shared, place: tuple[Any, Any], turn, start) -> None:
    """What a tile multiplies, through all depths, into the ring from step `start` on."""
    (row, column), stages = place, shared.a.shape[0]

    @pl.loop(0, arrays.a.shape[1] // DEPTH)
    def _(depth):
        step = start + depth
        stage, at = lax.rem(step, stages), pl.ds(depth * DEPTH, DEPTH)
        arrived = shared.fetched.at[turn * stages + stage]
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(shared.used.at[stage]))
        plgpu.copy_gmem_to_smem(arrays.a.at[pl.ds(row, ROWS), at], shared.a.at[stage], arrived)
        plgpu.copy_gmem_to_smem(arrays.b.at[at, pl.ds(column * COLUMNS, COLUMNS)], shared.b.at[stage], arrived)


def _sum(shared: Shared, mine, start, depths: int, accumulator: Any) -> None:
    """Multiply a tile through all depths, which come by the ring from step `start` on."""
    stages = shared.a.shape[0]

    @pl.loop(0, depths)
    def _(depth):
        stage = lax.rem(start + depth, stages)
        plgpu.barrier_wait(shared.fetched.at[mine * stages + stage])
        plgpu.wgmma(accumulator, shared.a.at[stage], shared.b.at[stage])
        plgpu.wgmma_wait(1)  # that of the depth before has ended
        pl.when(depth > 0)(lambda: plgpu.barrier_arrive(shared.used.at[lax.rem(start + depth + stages - 1, stages)]))

    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(shared.used.at[lax.rem(start + depths - 1, stages)])


def _tile(product: Product, arrays: Arrays, shared: Shared, mine, place: tuple[Any, Any], multiplied: Callable) -> None:
    """One tile: multiply, and end it square by square, whose inputs are on their way meanwhile."""
    (row, column), steps = place, COLUMNS // SQUARE // product.across
    squares = [(r, c) for r in range(0, ROWS, SQUARE) for c in range(steps)]

    def at(square: int, place: Place) -> tuple[Any, Any]:
        r, c = squares[square]
        return pl.ds(row + r, SQUARE), pl.ds(((column * steps + c) * place.wide + place.square) * SQUARE, SQUARE)

    def slot(square: int) -> tuple[Any, Any]:
        at = square % product.slots
        return shared.squares.at[mine, at], shared.loaded.at[mine * product.slots + at]

    def load(square: int) -> None:
        memory, loaded = slot(square)
        for i, source in enumerate(product.inputs):
            plgpu.copy_gmem_to_smem(arrays.read.at[at(square, source)], memory.at[i], loaded)

    def scope(accumulator):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was sent in the turn before
        for square in range(min(product.slots, len(squares)) if product.inputs else 0):
            load(square)
        multiplied(accumulator)
        value, total = accumulator[...], jnp.zeros(SQUARE, jnp.float32)
        for square, (r, c) in enumerate(squares):
            memory, loaded = slot(square)
            if product.inputs:
                plgpu.barrier_wait(loaded)
            elif square >= product.slots:
                plgpu.wait_smem_to_gmem(product.slots - 1, wait_read_only=True)
            inputs = [memory[i].astype(jnp.float32) for i in range(len(product.inputs))]
            parts = [c * product.across + i for i in range(product.across)]
            given = [value[r : r + SQUARE, part * SQUARE : (part + 1) * SQUARE] for part in parts]
            results = list(product.end(*given, *inputs))
            if product.summed:
                part = jnp.sum(results.pop(), axis=1)
                total = part if c == 0 else total + part
            for i, result in enumerate(results):
                memory[i] = result.astype(jnp.bfloat16)
            summed = product.summed and c == steps - 1
            if summed:
                shared.sums[mine, pl.ds(r, SQUARE)] = total
            plgpu.commit_smem()
            if summed:
                sums = arrays.sums.at[column, pl.ds(row + r, SQUARE)]
                plgpu.copy_smem_to_gmem(shared.sums.at[mine, pl.ds(r, SQUARE)], sums, commit_group=False)
            for i, target in enumerate(product.results):
                last = i == len(product.results) - 1
                plgpu.copy_smem_to_gmem(memory.at[i], arrays.made[target.array].at[at(square, target)], commit_group=last)
            if product.inputs and square > 0 and square - 1 + product.slots < len(squares):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                load(square - 1 + product.slots)

    pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32))
