"""Four-bit formats: int4 in groups, NVFP4 and MXFP4, as codes and scales, as packed bytes, and as fake-quantised weights.

Nothing here rounds by a cast to a narrow type that is widened again: under jit, XLA for GPUs deletes such a pair. Rounding is
arithmetic, and every float that is stored in fewer bits is already on that type's grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

E2M1_MAX, E4M3_MAX, INT4_MAX = 6.0, 448.0, 7.0
E4M3_MIN_NORMAL, E4M3_SUBNORMAL = 2.0**-6, 2.0**-9
INT4_OFFSET, INT4_EPS = 8, 1e-8
FP32_MIN_NORMAL = 2.0**-126
LARGEST_SCALE = 2.0**126  # not the largest float32: this one's reciprocal is a normal number, which XLA flushes on no device
E8M0_BIAS = 127
E8M0_RANGE = (-126, 125)  # 2^-127 is denormal in float32, and 4 * 2^126 overflows it
MX_RULES = ("floor", "even", "ceil")


@dataclasses.dataclass(frozen=True)
class Format:
    """How many elements of a matrix share a scale."""

    block: int
    """Along the contraction axis; of int4, the default."""
    across: int = 1
    """Along the other axis."""


# NVFP4: NVIDIA 2025, arXiv:2509.25149, appendix B. MXFP4: OCP Microscaling Formats v1.0, sections 5.3 and 6.3.
FORMATS = {"int4": Format(128), "nvfp4": Format(16), "nvfp4_2d": Format(16, across=16), "mxfp4": Format(32)}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "global_scale"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array as 4-bit codes and the scales of its blocks; an axis has as many scales as blocks."""

    codes: Any
    """uint8, one code a byte, shaped as the array. E2M1: sign, exponent, mantissa in bits 3, 2-1, 0. int4: value + 8, in 1..15."""
    scales: Any
    """float32 (int4), float8_e4m3fn (nvfp4), or uint8 (mxfp4): the exponent of a power of two, plus 127."""
    global_scale: Any
    """float32 scalar (nvfp4): what the array was multiplied by before its blocks were scaled, 2688 / amax. Otherwise None."""
    format: str


def block_shape(shape: tuple[int, ...], format: str, axis: int, block: int | None = None) -> tuple[int, ...]:
    """Elements that share a scale, axis by axis. Raises ValueError on an unknown format and on blocks that do not fit the shape."""
    if format not in FORMATS:
        raise ValueError(f"a 4-bit format is one of {', '.join(FORMATS)}, given {format!r}")
    known = FORMATS[format]
    if block not in (None, known.block) and format != "int4":
        raise ValueError(f"{format} has blocks of {known.block}, given {block}; only int4 takes another")
    if known.across > 1 and len(shape) != 2:
        raise ValueError(f"{format} has blocks of {known.block} x {known.across} and takes a matrix, given shape {shape}")
    sizes = [known.across if known.across > 1 else 1] * len(shape)
    sizes[axis] = block or known.block
    for at, (size, n) in enumerate(zip(shape, sizes, strict=True)):
        if size % n or not size:
            near = max(n, round(size / n) * n)
            raise ValueError(f"{format} has blocks of {n} along axis {at}, which do not divide shape {shape}; the nearest size is {near}")
    return tuple(sizes)


def quantize(
    w: Float[Array, "..."],
    format: str,
    *,
    axis: int = 0,
    block: int | None = None,
    rule: str = "ceil",
    amax: Float[Array, ""] | None = None,
    key: Array | None = None,
) -> QuantizedArray:
    """w as 4-bit codes, computed in float32, in blocks along `axis`, the one that a product sums over.

    `block`: int4's group. `rule`: mxfp4's power of two for a block whose largest magnitude is b = m * 2^e, which is 2^(e - 2)
    (`floor`, OCP), one more from m = 1.75 on (`even`), or the smallest that lets nothing saturate (`ceil`). `amax`: what nvfp4's
    global scale is made from instead of max|w|, for arrays that share one. `key`: round E2M1 stochastically, unbiased inside
    the grid. Elements that are not finite, or denormal, count as 0. Raises ValueError as `block_shape` does.
    """
    sizes = block_shape(w.shape, format, axis, block)
    w = finite(w)
    largest = block_max(w, sizes)
    if format == "int4":
        # By a constant, XLA would not divide but multiply, with a rounded 1 / 7; it looks through an optimization_barrier too.
        scales = (largest + INT4_EPS) / jnp.where(jnp.isfinite(largest), INT4_MAX, 1)
        codes = jnp.clip(jnp.rint(w / spread(scales, sizes)), -INT4_MAX, INT4_MAX) + INT4_OFFSET
        return QuantizedArray(codes.astype(jnp.uint8), scales, None, format)
    if format == "mxfp4":
        exponents = mx_exponents(largest, rule)
        codes = e2m1_codes(w * spread(power_of_two(-exponents), sizes), key)
        return QuantizedArray(codes, (exponents + E8M0_BIAS).astype(jnp.uint8), None, format)
    encode = encode_scale(finite_amax(w) if amax is None else amax)
    scales = round_e4m3(jnp.minimum(largest * (encode * jnp.float32(1 / E2M1_MAX)), E4M3_MAX))
    factors = jnp.where(scales > 0, jnp.minimum(1 / (scales * (1 / encode)), LARGEST_SCALE), 0)  # a block too small for a scale: zeros
    return QuantizedArray(e2m1_codes(w * spread(factors, sizes), key), scales.astype(jnp.float8_e4m3fn), encode, format)


def dequantize(q: QuantizedArray, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """The array that codes and scales stand for: multiplied in float32, then cast."""
    if q.format == "int4":
        values, scales = q.codes.astype(jnp.float32) - INT4_OFFSET, q.scales
    elif q.format == "mxfp4":
        values, scales = e2m1_values(q.codes), power_of_two(q.scales.astype(jnp.int32) - E8M0_BIAS)
    else:
        values, scales = e2m1_values(q.codes), q.scales.astype(jnp.float32) * (1 / q.global_scale)
    sizes = tuple(n // blocks for n, blocks in zip(q.codes.shape, q.scales.shape, strict=True))
    return (values * spread(scales, sizes)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def fake_quant(
    w: Float[Array, "..."],
    format: str,
    axis: int = 0,
    block: int | None = None,
    rule: str = "ceil",
    dtype: DTypeLike | None = None,
    amax: Float[Array, ""] | None = None,
    key: Array | None = None,
) -> Float[Array, "..."]:
    """`dequantize(quantize(w))` in `dtype` (that of w), with the gradient of the identity; what is not finite becomes NaN.

    Straight-through estimator: Bengio et al. 2013, arXiv:1308.3432, section 4.
    """
    q = quantize(w, format, axis=axis, block=block, rule=rule, amax=amax, key=key)
    return jnp.where(jnp.isfinite(w), dequantize(q, dtype or w.dtype), jnp.nan)


def fake_quant_forward(w, format, axis, block, rule, dtype, amax, key):
    """The value; the backward pass needs nothing of it but the dtype that its cotangent goes back to."""
    return fake_quant(w, format, axis, block, rule, dtype, amax, key), jnp.zeros((), w.dtype)


def fake_quant_backward(format, axis, block, rule, dtype, like, cotangent):
    """The cotangent, as it is."""
    del format, axis, block, rule, dtype
    return cotangent.astype(like.dtype), None, None


fake_quant.defvjp(fake_quant_forward, fake_quant_backward)


def pack(codes: UInt8[Array, "..."], axis: int = -1) -> UInt8[Array, "..."]:
    """Two codes a byte along `axis`, element 2i in the low four bits. Raises ValueError when that axis is odd."""
    if codes.shape[axis] % 2:
        raise ValueError(f"codes are packed in pairs along axis {axis}, given shape {codes.shape}; the nearest size is even")
    pairs = jnp.moveaxis(codes, axis, -1).reshape(-1, 2)
    whole = jnp.moveaxis(codes, axis, -1).shape[:-1]
    return jnp.moveaxis((pairs[:, 0] | (pairs[:, 1] << 4)).reshape(*whole, -1), -1, axis)


def unpack(packed: UInt8[Array, "..."], axis: int = -1) -> UInt8[Array, "..."]:
    """Inverse of `pack`."""
    last = jnp.moveaxis(packed, axis, -1)
    codes = jnp.stack([last & 15, last >> 4], axis=-1).reshape(*last.shape[:-1], -1)
    return jnp.moveaxis(codes, -1, axis)


def finite(w: Float[Array, "..."]) -> Float[Array, "..."]:
    """w in float32 with 0 for what is not finite, and for denormals, which some devices flush and others do not."""
    w = w.astype(jnp.float32)
    return jnp.where(jnp.isfinite(w) & (jnp.abs(w) >= FP32_MIN_NORMAL), w, 0)


def finite_amax(w: Float[Array, "..."]) -> Float[Array, ""]:
    """Largest magnitude among the finite elements, float32."""
    return jnp.max(jnp.abs(finite(w)))


def block_max(w: Float[Array, "..."], sizes: tuple[int, ...]) -> Float[Array, "..."]:
    """Largest magnitude of each block."""
    split = [part for size, n in zip(w.shape, sizes, strict=True) for part in (size // n, n)]
    return jnp.max(jnp.abs(w).reshape(split), axis=tuple(range(1, len(split), 2)))


def spread(scales: Float[Array, "..."], sizes: tuple[int, ...]) -> Float[Array, "..."]:
    """The scale of each element, from that of each block."""
    expanded = jnp.expand_dims(scales, tuple(range(1, 2 * scales.ndim, 2)))
    split = [part for blocks, n in zip(scales.shape, sizes, strict=True) for part in (blocks, n)]
    return jnp.broadcast_to(expanded, split).reshape([blocks * n for blocks, n in zip(scales.shape, sizes, strict=True)])


def encode_scale(amax: Float[Array, ""]) -> Float[Array, ""]:
    """nvfp4's global scale, under which the largest block scale is 448 and the largest element 6."""
    return jnp.where(amax > 0, jnp.minimum(E2M1_MAX * E4M3_MAX / amax, LARGEST_SCALE), 1)


def round_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in [0, 448] to the nearest E4M3 number, ties to even, still in float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    kept = 20  # of float32's 23 mantissa bits, these go
    even = (bits >> kept) & 1
    normal = jax.lax.bitcast_convert_type((bits + ((1 << (kept - 1)) - 1) + even) >> kept << kept, jnp.float32)
    return jnp.where(x < E4M3_MIN_NORMAL, jnp.rint(x / E4M3_SUBNORMAL) * E4M3_SUBNORMAL, normal)


def e2m1_codes(x: Float[Array, "..."], key: Array | None = None) -> UInt8[Array, "..."]:
    """Codes of the nearest E2M1 numbers, ties to the even code, saturating at 6; with a key, of one of the two beside x, unbiased."""
    y = jnp.minimum(jnp.abs(x), E2M1_MAX)
    step = jnp.where(y < 2, 0.5, jnp.where(y < 4, 1.0, 2.0))
    steps = jnp.rint(y / step) if key is None else jnp.floor(y / step + jax.random.uniform(key, x.shape))
    magnitude = steps * step
    code = jnp.where(magnitude < 2, magnitude * 2, jnp.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return (code + jnp.where((x < 0) & (code > 0), 8, 0)).astype(jnp.uint8)


def e2m1_values(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """What E2M1 codes stand for, float32."""
    m = (codes & 7).astype(jnp.float32)
    magnitude = jnp.where(m < 4, m / 2, jnp.where(m < 6, m - 2, 2 * m - 8))
    return jnp.where(codes >= 8, -magnitude, magnitude)


def mx_exponents(largest: Float[Array, "..."], rule: str) -> Int[Array, "..."]:
    """Exponent of each block's scale, int32, by the rule of that name. Raises ValueError on another."""
    if rule not in MX_RULES:
        raise ValueError(f"mxfp4's scale rule is one of {', '.join(MX_RULES)}, given {rule!r}")
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    mantissa = bits & 0x7FFFFF
    at = {"floor": 1 << 23, "even": 3 << 21, "ceil": (1 << 22) + 1}[rule]  # mantissa from which the scale is one power of two more
    exponents = (bits >> 23) - E8M0_BIAS - 2 + (mantissa >= at)
    return jnp.clip(exponents, *E8M0_RANGE)


def power_of_two(exponents: Int[Array, "..."]) -> Float[Array, "..."]:
    """2 ** exponents for -126..127, float32, exactly."""
    return jax.lax.bitcast_convert_type((exponents + E8M0_BIAS) << 23, jnp.float32)


def bytes_per_weight(format: str, block: int | None = None) -> float:
    """Of codes and block scales together."""
    known = FORMATS[format]
    return 0.5 + {"int4": 4, "nvfp4": 1, "nvfp4_2d": 1, "mxfp4": 1}[format] / (block or known.block)
