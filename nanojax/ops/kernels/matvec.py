"""Products of a few rows with a matrix that is read once, in bf16 or in 4 bits: what decoding spends its time on.

B rows, O outputs, I inputs, W = I / 8 words, G = I / block scales. An instance of the kernel makes a few outputs from all inputs. What
surrounds the product rides along: the divisor of the RMSNorm before it, the activation or the residual sum after it.

Packed matrices take their inputs in planes: plane j holds the inputs 8w + j of all words w. The codes of a word belong to neighbouring
inputs, and a vector load brings neighbours of one plane. Whoever makes the inputs writes them so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nanojax.ops.cache import einsum_in_float32
from nanojax.ops.fp4 import e2m1_values
from nanojax.ops.norm import EPS
from nanojax.ops.packed import CODES, PackedMatrix, unpacked

Matrix = Any
"""A bf16 array [O, I], or a PackedMatrix."""
MOST_ROWS = 8
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
    """Columns, of weights or of words, that it reads at a time."""
    warps: int = 4


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
    planes_out: bool = False
    """Whether what the next product reads is in planes."""

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
    columns: int
    cut: Cut
    ffn: str | None
    rms: bool
    stream: bool
    planes_out: bool
    interpret: bool

    @property
    def shrunk(self) -> bool:
        """Whether codes are read as tiny floats. CPUs flush denormals, so there they are worked out instead."""
        return self.format not in (None, "int4") and not self.interpret


def best_cut(outputs: int, columns: int, *, tiles: int, packed: bool) -> Cut:
    """What was fastest of the cuts tried on an H200 (scripts/bench/LOG.md): small matrices want many instances, large ones long reads."""
    made = tiles * outputs
    if packed:
        rows, lanes, warps = (4 if made <= 2048 else 16 if made >= 8192 else 8), 256, 4
    elif made * columns < 10_000_000:
        rows, lanes, warps = 2, 512, 2
    else:
        rows, lanes, warps = (8 if made >= 3072 else 4), 512, 4
    return Cut(min(rows, outputs & -outputs), lanes, warps)


def planes(x_BI: Float[Array, "B I"]) -> Float[Array, "B I"]:
    """Inputs in the order that packed matrices take."""
    return x_BI.reshape(len(x_BI), -1, CODES).swapaxes(1, 2).reshape(x_BI.shape)


def in_planes(position: Int[Array, " n"], size: int) -> Int[Array, " n"]:
    """Where `planes` puts the elements at these positions of `size`."""
    return position % CODES * (size // CODES) + position // CODES


def matmul(x_BI: Float[Array, "B I"], w: Matrix, around: Around = PLAIN, *, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """`matvec` for any number of rows by XLA's own product, nothing in planes; it takes bf16 inputs where weights are bf16.

    A packed matrix is unpacked to bf16 in memory first.
    """
    assert not around.planes_out, "planes are for kernels"
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
        return y_BO.astype(dtype)
    new_BO = (around.stream_BO.astype(jnp.float32) + y_BO).astype(dtype)
    return new_BO, new_BO.astype(jnp.float32) * around.gain_O[None]


def matvec(
    x_BI: Float[Array, "B I"],
    w: Matrix,
    around: Around = PLAIN,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    cut: Cut | None = None,
    interpret: bool = False,
) -> Any:
    """x w^T in `dtype`, summed in float32, for 1 to 8 rows; `x` of a packed matrix is in planes. `interpret`: run without a GPU.

    On a GPU, E2M1 codes are multiplied in bf16 and summed in it four at a time: 3e-3 of the result by root mean square.

    Returns [B, O], or with a stream (its new state, that times the gain in float32).
    """
    rows, packed, tiles = len(x_BI), isinstance(w, PackedMatrix), 2 if around.ffn == "swiglu" else 1
    arrays = _arrays(w)
    outputs, columns = w.shape[0] // tiles, arrays[0].shape[1]
    cut = cut or best_cut(outputs, columns, tiles=tiles, packed=packed)
    steps, left = divmod(outputs, cut.outputs)
    assert not left, f"instances of {cut.outputs} outputs must make all {outputs}"

    def whole(x: Array) -> tuple[Array, pl.BlockSpec]:
        return x, pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)

    def slab(x: Array, tile: int) -> tuple[Array, pl.BlockSpec]:
        return (x, pl.BlockSpec((cut.outputs, x.shape[1]), lambda i: (tile * steps + i, 0))) if x.ndim == 2 else whole(x)

    own = pl.BlockSpec((rows, cut.outputs), lambda i: (0, i))
    operands = [whole(x_BI)] + ([] if around.rms_of_BI is None else [whole(around.rms_of_BI)])
    operands += [slab(x, tile) for tile in range(tiles) for x in arrays]
    read = pl.BlockSpec((rows, outputs), lambda i: (0, 0)) if around.planes_out else own
    results = [(jax.ShapeDtypeStruct((rows, outputs), dtype), read)]
    if around.stream_BO is not None and around.gain_O is not None:
        operands += [(around.stream_BO, own), (around.gain_O, pl.BlockSpec((cut.outputs,), lambda i: (i,)))]
        results = [(results[0][0], own), (jax.ShapeDtypeStruct((rows, outputs), jnp.float32), read)]
    job = _Job(
        format=w.format if packed else None, arrays=len(arrays), tiles=tiles, columns=columns, cut=cut, ffn=around.ffn,
        rms=around.rms_of_BI is not None, stream=around.stream_BO is not None, planes_out=around.planes_out, interpret=interpret,
    )  # fmt: skip
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
    factor = E2M1_SHRINK / GROWTH if job.shrunk else 1.0
    factor = factor / matrices[0][2][0] if job.arrays == 3 else factor
    sums: dict[tuple[int, int, int], Any] = {}
    for start, lanes in _pieces(job.columns, job.cut.lanes):
        xs = [_inputs(job, x_ref, b, start, lanes) for b in rows]
        for tile, matrix in enumerate(matrices):
            part = _products(matrix, job, start, lanes)
            for b in rows:
                sums[tile, b, lanes] = sums[tile, b, lanes] + part(xs[b]) if (tile, b, lanes) in sums else part(xs[b])
    for b in rows:
        ys = [[s.sum(axis=1) for (tile, row, _), s in sums.items() if (tile, row) == (t, b)] for t in range(job.tiles)]
        over = factor
        if (pieces := squared[b]) is not None:
            total, size = functools.reduce(jnp.add, (jnp.sum(piece * piece) for piece in pieces)), sum(piece.shape[0] for piece in pieces)
            over = factor * jax.lax.rsqrt(total / size + EPS)
        _finish(job, [functools.reduce(jnp.add, y) * over for y in ys], b, streams[b], gain, refs[-2:])


def _pieces(columns: int, most: int) -> list[tuple[int, int]]:
    """(start, lanes) of pieces that fill the columns, each a power of two, as register arrays are."""
    found, start = [], 0
    while start < columns:
        lanes = min(most, 1 << (columns - start).bit_length() - 1)
        found.append((start, lanes))
        start += lanes
    return found


def _pieces_of(ref, b: int) -> list[Array]:
    """Row b in float32, in pieces."""
    return [ref[b, pl.ds(start, lanes)].astype(jnp.float32) for start, lanes in _pieces(ref.shape[1], LONGEST_SUM)]


def _inputs(job: _Job, x_ref, b: int, start: int, lanes: int) -> list[Array]:
    """What row b's inputs of a piece are multiplied as: float32, of each plane, or pairs of bf16 of planes that are four apart."""
    count = 1 if job.format is None else CODES
    planes = [x_ref[b, pl.ds(plane * job.columns + start, lanes)].astype(jnp.float32) for plane in range(count)]
    if not job.shrunk:
        return planes
    bits = [jax.lax.bitcast_convert_type(x * GROWTH, jnp.int32) + 0x8000 for x in planes]  # to the nearest bf16, in the upper half
    return [(low >> 16 & 0xFFFF) | (high & -0x10000) for low, high in zip(bits[:4], bits[4:], strict=True)]


def _products(matrix, job: _Job, start: int, lanes: int) -> Callable[[list[Array]], Array]:
    """Inputs of a piece -> their products with a matrix [outputs, lanes], those of the codes of a word summed."""
    if job.format is None:
        w = matrix[0][:, pl.ds(start, lanes)].astype(jnp.float32)
        return lambda xs: w * xs[0][None, :]
    words = matrix[0][:, pl.ds(start, lanes)]
    per_scale = matrix[0].shape[1] // matrix[1].shape[1]
    row, column = jnp.arange(words.shape[0])[:, None], (start + jnp.arange(lanes)[None, :]) // per_scale
    scales = matrix[1][jnp.broadcast_to(row, words.shape), jnp.broadcast_to(column, words.shape)]
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    if job.format == "mxfp4":
        scales = as_float(scales.astype(jnp.int32) << 23)
    elif job.format != "int4":
        bits = scales.astype(jnp.int32) << 20
        scales = as_float(bits) * E4M3_SHRINK if job.shrunk else jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn).astype(jnp.float32)
    if job.shrunk:
        return lambda xs: _e2m1_products(words, xs) * scales
    codes = [words >> 4 * j & 15 for j in range(CODES)]
    values = [as_float(code | INT4_BITS) - INT4_ZERO if job.format == "int4" else e2m1_values(code.astype(jnp.uint8)) for code in codes]
    return lambda xs: functools.reduce(jnp.add, (value * x[None, :] for value, x in zip(values, xs, strict=True))) * scales


def _e2m1_products(words: Int[Array, "O W"], pairs: list[Array]) -> Float[Array, "O W"]:
    """Of the eight codes of each word with pairs of bf16: two sums of four, in bf16, then one in float32.

    In PTX, two codes an instruction, as Triton would not write it. Each code's sign goes to bit 15 of its half, the rest to bits 8 to 6.
    """
    pick = "and.b32 s, s, 0x80008000; lop3.b32 v, m, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 a, v, ${}, a;"
    moves = ("shl.b32 s, $1, 12; shl.b32 m, $1, 6;", "shl.b32 s, $1, 8; shl.b32 m, $1, 2;", "shl.b32 s, $1, 4; shr.b32 m, $1, 2;",
             "mov.b32 s, $1; shr.b32 m, $1, 6;")  # fmt: skip
    body = " ".join(f"{move} {pick.format(j + 2)}" for j, move in enumerate(moves))
    add = "shl.b32 s, a, 16; and.b32 m, a, 0xFFFF0000; mov.b32 low, s; mov.b32 high, m; add.f32 $0, low, high;"
    (products,) = triton.elementwise_inline_asm(
        f"{{ .reg .b32 s, m, v, a; .reg .f32 low, high; mov.b32 a, 0x80008000; {body} {add} }}",
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
    if job.planes_out:
        position = pl.program_id(0) * y.shape[0] + jnp.arange(y.shape[0])
        read_ref[b, in_planes(position, read_ref.shape[1])] = y.astype(read_ref.dtype)
    else:
        read_ref[b, :] = y.astype(read_ref.dtype)
