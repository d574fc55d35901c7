"""Products of a few rows with a matrix that is read once, in bf16 or in 4 bits: what decoding spends its time on.

B rows, O outputs, I inputs, L = I / span lanes. An instance of the kernel makes a few outputs from all inputs. What surrounds the product
rides along: the divisor of the RMSNorm before it, the activation or the residual sum after it.

A lane multiplies a span of a packed matrix, whose codes have one scale. Vector loads bring neighbours, which belong to neighbouring lanes:
the words of a matrix and the inputs it takes are ordered by their place in the span. Whoever makes the inputs writes them so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanojax.ops.cache import einsum_in_float32
from nanojax.ops.fp4 import e2m1_values
from nanojax.ops.kernels.pieces import even_pieces, powers_of_two
from nanojax.ops.norm import EPS
from nanojax.ops.packed import CODES, MAGNITUDES, SIGNS, PackedMatrix, codes, unpacked

Matrix = Any
"""A bf16 array [O, I], or a PackedMatrix."""
MOST_ROWS, MOST_ROWS_PACKED = 2, 8  # where XLA's product becomes faster, or was never seen to be (scripts/bench/LOG.md)
UNROLLED = 2  # rows
LONGEST_SUM = 1024
# A code's exponent and mantissa, put where bf16 has the ends of its own, read 2^126 too small, some of them as denormals. Inputs grow
# before they meet one, so that no product is denormal; what is left to make good is made good on the sum.
E2M1_SHRINK, GROWTH = 2.0**126, 2.0**64
E4M3_SHRINK = 2.0**120  # of E4M3 in float32, likewise
INT4_BITS, INT4_ZERO = 0x4B000000, 2.0**23 + 8  # 2^23 in float32, whose last bits are units


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a matrix is divided."""

    outputs: int
    """That an instance makes."""
    lanes: int
    """That it reads at a time."""
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Feed:
    """The form in which a matrix takes its inputs: those of one place in their spans are a plane, which lies there lane by lane."""

    span: int = 1
    growth: float = 1.0
    """What inputs are multiplied by. Where it is not 1 they come in the type of activations, else some in float32."""

    def at(self, position: Int[Array, " n"], size: int) -> Int[Array, " n"]:
        """Where the inputs at these positions of `size` lie."""
        return position if self.span == 1 else position % self.span * (size // self.span) + position // self.span

    def of(self, x_BI: Float[Array, "B I"], dtype: DTypeLike) -> Float[Array, "B I"]:
        """Inputs in this form; `dtype` is that of activations."""
        return self.ordered(x_BI).astype(self.narrow(dtype))

    def ordered(self, x_BI: Float[Array, "B I"]) -> Float[Array, "B I"]:
        """Inputs in this form, in the type that they have."""
        return (x_BI * self.growth).reshape(len(x_BI), -1, self.span).swapaxes(1, 2).reshape(x_BI.shape)

    def narrow(self, dtype: DTypeLike) -> DTypeLike:
        """The type of inputs that would be float32 otherwise."""
        return jnp.float32 if self.growth == 1 else dtype


AS_IS = Feed()


def most_rows(w: Matrix) -> int:
    """Up to so many `matvec` is the faster, then `matmul`."""
    return MOST_ROWS_PACKED if isinstance(w, PackedMatrix) else MOST_ROWS


def feed_of(w: Matrix) -> Feed:
    """What a matrix takes."""
    return Feed(w.span, 1.0 if w.format == "int4" else GROWTH) if isinstance(w, PackedMatrix) else AS_IS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Around:
    """What surrounds a product."""

    rms_of_BI: Float[Array, "B I"] | None = None
    """What the inputs, already times a gain, are still to be divided by the root mean square of."""
    ffn: str | None = None
    """`swiglu` makes silu(gate) * up of a matrix that has all gates above all ups; `relu2` squares what is positive."""
    stream_BO: Float[Array, "B O"] | None = None
    """What the product is added to."""
    gain_O: Float[Array, " O"] | None = None
    """With a stream: what the sum is multiplied by for the next product."""
    feed: Feed = AS_IS
    """Of the product that reads this one's result."""

    def __post_init__(self) -> None:
        assert (self.stream_BO is None) == (self.gain_O is None), "a stream and the gain of its next product go together"


PLAIN = Around()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What a kernel is compiled for."""

    format: str | None
    arrays: int
    """Of a matrix: itself, or words, scales and perhaps a global scale."""
    tiles: int
    lanes: int
    span: int
    cut: Cut
    ffn: str | None
    rms: bool
    stream: bool
    feed: Feed
    interpret: bool

    @property
    def e2m1(self) -> bool:
        return self.format not in (None, "int4")

    @property
    def shrunk(self) -> bool:
        """Whether codes are read as tiny floats. CPUs flush denormals, so there they are worked out instead."""
        return self.e2m1 and not self.interpret


def best_cut(outputs: int, *, tiles: int, packed: bool) -> Cut:
    """What was fastest of the cuts tried on an H200, in nvfp4 at d32 and in bf16 at d20 (scripts/bench/LOG.md)."""
    made = tiles * outputs
    if packed and tiles == 2:
        rows, lanes, warps = 16, 64, 4
    elif packed:
        rows, lanes, warps = 8 if made >= 4096 else 4, 128, 4
    else:
        rows, lanes, warps = (8, 1024, 4) if made >= 16384 else (4, 1024, 2)
    return Cut(min(rows, outputs & -outputs), lanes, warps)


def matmul(x_BI: Float[Array, "B I"], w: Matrix, around: Around = PLAIN, *, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """`matvec` for any number of rows by XLA's own product, inputs as they are; it takes them in bf16 where weights are bf16.

    A packed matrix is unpacked to bf16 in memory first.
    """
    x_BI = x_BI.astype(jnp.float32)
    if around.rms_of_BI is not None:
        x_BI *= jax.lax.rsqrt(jnp.mean(jnp.square(around.rms_of_BI.astype(jnp.float32)), axis=1, keepdims=True) + EPS)
    w_OI = unpacked(w, jnp.bfloat16).T if isinstance(w, PackedMatrix) else w
    y_BO = einsum_in_float32("BI,OI->BO", x_BI.astype(w_OI.dtype), w_OI)
    if around.ffn == "swiglu":
        gate_BO, up_BO = jnp.split(y_BO, 2, axis=1)
        y_BO = jax.nn.silu(gate_BO) * up_BO
    if around.ffn == "relu2":
        y_BO = jnp.square(jax.nn.relu(y_BO))
    if around.stream_BO is None or around.gain_O is None:
        return around.feed.ordered(y_BO).astype(dtype)
    new_BO = (around.stream_BO.astype(jnp.float32) + y_BO).astype(dtype)
    return new_BO, around.feed.of(new_BO.astype(jnp.float32) * around.gain_O[None], dtype)


def matvec(
    x_BI: Float[Array, "B I"],
    w: Matrix,
    around: Around = PLAIN,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    cut: Cut | None = None,
    interpret: bool = False,
) -> Any:
    """x w^T in `dtype`, summed in float32, for 1 to 8 rows; `x` is in the form of `feed_of(w)`.

    On a GPU, E2M1 codes are multiplied in bf16, as which their inputs have to come, and summed in it four at a time: 3e-3 of the result by
    root mean square.

    Returns [B, O] in the form of `around.feed`, or with a stream (its new state, that times the gain in that form).
    """
    rows, packed, tiles = len(x_BI), isinstance(w, PackedMatrix), 2 if around.ffn == "swiglu" else 1
    arrays = _arrays(w)
    outputs, span = w.shape[0] // tiles, feed_of(w).span
    cut = cut or best_cut(outputs, tiles=tiles, packed=packed)
    steps, left = divmod(outputs, cut.outputs)
    assert not left, f"instances of {cut.outputs} outputs must make all {outputs}"

    def whole(x: Array) -> tuple[Array, pl.BlockSpec]:
        return x, pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)

    def slab(x: Array, tile: int) -> tuple[Array, pl.BlockSpec]:
        return (x, pl.BlockSpec((cut.outputs, x.shape[1]), lambda i: (tile * steps + i, 0))) if x.ndim == 2 else whole(x)

    own = pl.BlockSpec((rows, cut.outputs), lambda i: (0, i))
    operands = [whole(x_BI)] + ([] if around.rms_of_BI is None else [whole(around.rms_of_BI)])
    operands += [slab(x, tile) for tile in range(tiles) for x in arrays]
    read = own if around.feed.span == 1 else pl.BlockSpec((rows, outputs), lambda i: (0, 0))
    results = [(jax.ShapeDtypeStruct((rows, outputs), dtype), read)]
    if around.stream_BO is not None and around.gain_O is not None:
        operands += [(around.stream_BO, own), (around.gain_O, pl.BlockSpec((cut.outputs,), lambda i: (i,)))]
        results = [(results[0][0], own), (jax.ShapeDtypeStruct((rows, outputs), around.feed.narrow(dtype)), read)]
    job = _Job(
        format=w.format if packed else None, arrays=len(arrays), tiles=tiles, lanes=w.shape[1] // span, span=span, cut=cut, ffn=around.ffn,
        rms=around.rms_of_BI is not None, stream=around.stream_BO is not None, feed=around.feed, interpret=interpret,
    )  # fmt: skip
    assert not job.shrunk or x_BI.dtype == jnp.bfloat16, f"kernels take inputs of E2M1 codes in bf16, given {x_BI.dtype}"
    made = pl.pallas_call(
        functools.partial(_kernel, job),
        out_shape=[shape for shape, _ in results],
        grid=(steps,),
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in results],
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=1),
        name=f"matvec_{job.format or 'bf16'}_{w.shape[0]}x{w.shape[1]}",  # as profiles show it
        interpret=interpret,
    )(*(x for x, _ in operands))
    return made[0] if around.stream_BO is None else tuple(made)


def _arrays(w: Matrix) -> list[Array]:
    """What the kernel reads of a matrix."""
    if not isinstance(w, PackedMatrix):
        return [w]
    return [w.words_OW, w.scales_OG] + ([] if w.global_scale is None else [jnp.reshape(w.global_scale, 1)])


def _kernel(job: _Job, x_ref, *refs):
    """One instance: `cut.outputs` outputs of each tile (one, or gate and up) for all rows."""
    refs = list(refs)
    rms_ref = refs.pop(0) if job.rms else None
    matrices, refs = [refs[tile * job.arrays :][: job.arrays] for tile in range(job.tiles)], refs[job.tiles * job.arrays :]
    rows = range(x_ref.shape[0])
    # What is needed last is asked for first: memory takes as long to answer as all of the arithmetic.
    squared = [_pieces_of(rms_ref, b) if rms_ref is not None else None for b in rows]
    streams = [refs[0][b, :].astype(jnp.float32) if job.stream else None for b in rows]
    gain = refs[1][...].astype(jnp.float32) if job.stream else None
    factor = (E2M1_SHRINK if job.shrunk else 1.0) / (GROWTH if job.e2m1 else 1.0)
    factor = factor / matrices[0][2][0] if job.arrays == 3 else factor
    sums: dict[int, Any] = {}
    taken = 0
    for start, lanes in (powers_of_two if job.format is None else even_pieces)(job.lanes, job.cut.lanes):
        part = _products(job, x_ref, matrices, start, lanes, taken)
        sums[lanes], taken = jax.tree.map(jnp.add, sums[lanes], part) if lanes in sums else part, start + lanes
    for b in rows:
        ys = [[part[t][b].sum(axis=1) for part in sums.values()] for t in range(job.tiles)]
        over = factor
        if (pieces := squared[b]) is not None:
            total, size = functools.reduce(jnp.add, (jnp.sum(piece * piece) for piece in pieces)), sum(piece.shape[0] for piece in pieces)
            over = factor * jax.lax.rsqrt(total / size + EPS)
        _finish(job, [functools.reduce(jnp.add, y) * over for y in ys], b, streams[b], gain, refs[2 * job.stream :])


def _pieces_of(ref, b: int) -> list[Array]:
    """Row b in float32, in pieces."""
    return [ref[b, pl.ds(start, lanes)].astype(jnp.float32) for start, lanes in powers_of_two(ref.shape[1], LONGEST_SUM)]


def _products(job: _Job, x_ref, matrices, start: int, lanes: int, taken: int) -> list[list[Array]]:
    """Of each tile and row, the products of a piece [outputs, lanes], summed over a span; lanes before `taken` count as zero."""
    rows, places = range(x_ref.shape[0]), -(-job.span // CODES)

    def words(matrix: Any, of: Sequence[Any]) -> list[Array]:
        return [matrix[0][:, pl.ds(place * job.lanes + start, lanes)] for place in of]

    def inputs(of: Sequence[Any]) -> list[list[list[Array]]]:
        """Handed from thread to thread, while weights are on their way."""
        return [[_inputs(job, x_ref, b, place, start, lanes, taken) for place in of] for b in rows]

    def summed(words: list[Array], xs: list[list[Array]]) -> Array:
        return functools.reduce(jnp.add, map(functools.partial(_times, job), words, xs))

    if len(rows) <= UNROLLED and not job.interpret:
        # Tile by tile and scales last, as registers then allow for more loads at once: 20 % of the time.
        loaded = [(words(matrix, range(places)), _scales(job, matrix, start, lanes)) for matrix in matrices]
        xs = inputs(range(places))
        return [[summed(word, x) * scales for x in xs] for word, scales in loaded]

    def turn(place: Array, sums: list[list[Array]]) -> list[list[Array]]:
        loaded, xs = [words(matrix, [place]) for matrix in matrices], inputs([place])
        return [[y + summed(word, x) for y, x in zip(ys, xs, strict=True)] for ys, word in zip(sums, loaded, strict=True)]

    # As one long program it would take minutes to compile.
    none = jnp.zeros((job.cut.outputs, lanes), jnp.float32)
    sums = jax.lax.fori_loop(0, places, turn, [[none for _ in rows] for _ in matrices])
    return [[y * scales for y in ys] for ys, scales in zip(sums, (_scales(job, matrix, start, lanes) for matrix in matrices), strict=True)]


def _inputs(job: _Job, x_ref, b: Any, place: Any, start: int, lanes: int, taken: int) -> list[Array]:
    """What row b's inputs of a piece are multiplied as: in float32, plane by plane, or pairs of bf16 whose planes are four apart."""
    planes = [x_ref[b, pl.ds((place * CODES + j) * job.lanes + start, lanes)] for j in range(min(job.span, CODES))]
    if taken > start:
        planes = [jnp.where(start + jnp.arange(lanes) < taken, jnp.zeros_like(x), x) for x in planes]
    if not job.shrunk:
        return [x.astype(jnp.float32) for x in planes]
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) for x in planes]
    return [low | high << 16 for low, high in zip(bits[:4], bits[4:], strict=True)]


def _times(job: _Job, words: Array, xs: list[Array]) -> Float[Array, "O L"]:
    """Inputs of one place with the weights of that place, summed."""
    if job.format is None:
        return words.astype(jnp.float32) * xs[0][None, :]
    if job.shrunk:
        return _e2m1_products(words, xs)
    found = codes(words, job.format)
    if job.interpret:  # Triton has no such stacks, and CPUs are slow to compile what is not stacked
        return jnp.sum(_values(jnp.stack(found), job) * jnp.stack(xs)[:, None, :], axis=0)
    return functools.reduce(jnp.add, (_values(code, job) * x[None, :] for code, x in zip(found, xs, strict=True)))


def _values(codes: Int[Array, "*S O L"], job: _Job) -> Float[Array, "*S O L"]:
    """What codes stand for."""
    if job.format == "int4":
        return jax.lax.bitcast_convert_type(codes | INT4_BITS, jnp.float32) - INT4_ZERO
    return e2m1_values(codes.astype(jnp.uint8))


def _scales(job: _Job, matrix, start: int, lanes: int) -> Float[Array, "O L"] | float:
    """Of the spans of a piece. On a GPU E4M3 is read 2^120 too small, and put right."""
    if job.format is None:
        return 1.0
    ref, per_scale = matrix[1], job.lanes // matrix[1].shape[1]
    if per_scale == 1:
        scales = ref[:, pl.ds(start, lanes)]
    else:
        shape = (ref.shape[0], lanes)
        row, column = jnp.arange(shape[0])[:, None], (start + jnp.arange(lanes)[None, :]) // per_scale
        scales = ref[jnp.broadcast_to(row, shape), jnp.broadcast_to(column, shape)]
    if job.format == "int4":
        return scales
    if job.format == "mxfp4":
        return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    if not job.shrunk:
        return jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 20, jnp.float32) * E4M3_SHRINK


def _e2m1_products(words: Int[Array, "O W"], pairs: list[Array]) -> Float[Array, "O W"]:
    """Of the eight codes of each word with pairs of bf16: two sums of four, in bf16, then one in float32.

    In PTX, two codes an instruction, as Triton would not write it. Each code's sign goes to bit 15 of its half, the rest to bits 8 to 6.
    """
    multiply = ""
    for j, (magnitude, sign) in enumerate(zip(MAGNITUDES, SIGNS, strict=True)):
        left, over = 6 - magnitude, 15 - sign
        multiply += f"shl.b32 v, $1, {left}; " if left >= 0 else f"shr.b32 v, $1, {-left}; "
        if left == over:
            multiply += "and.b32 v, v, 0x81C081C0; "
        else:  # v & 0x01C001C0 | s
            multiply += f"shl.b32 s, $1, {over}; and.b32 s, s, 0x80008000; lop3.b32 v, v, 0x01C001C0, s, 0xEA; "
        multiply += f"fma.rn.bf16x2 a, v, ${j + 2}, a; "
    add = "shl.b32 s, a, 16; and.b32 v, a, 0xFFFF0000; mov.b32 low, s; mov.b32 high, v; add.f32 $0, low, high;"
    (products,) = triton.elementwise_inline_asm(
        f"{{ .reg .b32 s, v, a; .reg .f32 low, high; mov.b32 a, 0x80008000; {multiply}{add} }}",
        args=[words, *(jnp.broadcast_to(pair[None, :], words.shape) for pair in pairs)],
        constraints="=f,r,r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.float32)],
    )
    return products


def _finish(job: _Job, ys, b: int, stream, gain, out_refs):
    """Write row b of an instance's outputs, and what the next product reads."""
    y, read_ref = ys[0], out_refs[-1]
    if job.ffn == "swiglu":
        y = y / (1 + jnp.exp(-y)) * ys[1]
    if job.ffn == "relu2":
        y = jnp.square(jnp.maximum(y, 0))
    if job.stream:
        new = (stream + y).astype(out_refs[0].dtype)
        out_refs[0][b, :] = new
        y = new.astype(jnp.float32) * gain
    y = (y * job.feed.growth).astype(read_ref.dtype)
    if job.feed.span == 1:
        read_ref[b, :] = y
    else:
        position = pl.program_id(0) * y.shape[0] + jnp.arange(y.shape[0])
        read_ref[b, job.feed.at(position, read_ref.shape[1])] = y
