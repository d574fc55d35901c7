"""Four-bit formats: int4 in groups, NVFP4 and MXFP4, as codes and scales, as packed bytes, and as fake-quantised weights.

Codes are equal on every device, jitted or not. So nothing here rounds by a cast to a narrow type that is widened again: under
jit, XLA for GPUs deletes such a pair. Rounding is arithmetic, and a float that is stored in fewer bits is on that type's grid
already. Nor is there a float division, which GPUs round to a neighbour of the nearest number and XLA turns into a product where
it can; `divide` is exact. Denormals, which some devices flush, count as 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from nanojax.formats import block_shape

E2M1_MAX, E4M3_MAX, INT4_MAX = 6.0, 448.0, 7.0
E4M3_MIN_NORMAL, E4M3_SUBNORMAL = 2.0**-6, 2.0**-9
INT4_OFFSET, INT4_EPS = 8, 1e-8
FP32_MIN_NORMAL = 2.0**-126
LARGEST_SCALE = 2.0**126  # not the largest float32: this one's reciprocal is a normal number, which XLA flushes on no device
E8M0_BIAS = 127
E8M0_RANGE = (-126, 125)  # 2^-127 is denormal in float32, and 4 * 2^126 overflows it
MX_RULES = ("floor", "even", "ceil")


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


def quantize(
    w: Float[Array, ...],
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
    global scale is made from instead of max|w|, for arrays that share one: the largest of their `finite_amax`. `key`: round E2M1
    stochastically, unbiased but where it saturates. Elements that are not finite, or denormal, count as 0. Raises ValueError as
    `block_shape` does.
    """
    sizes = block_shape(w.shape, format, axis, block)
    w = finite(w)
    largest = block_max(w, sizes)
    if format == "int4":
        scales = divide(largest + INT4_EPS, INT4_MAX)
        codes = jnp.clip(jnp.rint(divide(w, spread(scales, sizes))), -INT4_MAX, INT4_MAX) + INT4_OFFSET
        return QuantizedArray(codes.astype(jnp.uint8), scales, None, format)
    if format == "mxfp4":
        exponents = mx_exponents(largest, rule)
        codes = e2m1_codes(w * spread(power_of_two(-exponents), sizes), key)
        return QuantizedArray(codes, (exponents + E8M0_BIAS).astype(jnp.uint8), None, format)
    encode = encode_scale(finite_amax(w) if amax is None else amax)
    scales = round_e4m3(jnp.minimum(largest * (encode * jnp.float32(1 / E2M1_MAX)), E4M3_MAX))
    factors = jnp.minimum(divide(1.0, scales * divide(1.0, encode)), LARGEST_SCALE)
    factors = jnp.where(scales > 0, factors, 0)  # a block too small for a scale has zeros
    return QuantizedArray(e2m1_codes(w * spread(factors, sizes), key), scales.astype(jnp.float8_e4m3fn), encode, format)


def dequantize(q: QuantizedArray, dtype: DTypeLike = jnp.float32) -> Float[Array, ...]:
    """The array that codes and scales stand for: multiplied in float32, then cast."""
    if q.format == "int4":
        values, scales = q.codes.astype(jnp.float32) - INT4_OFFSET, q.scales
    elif q.format == "mxfp4":
        values, scales = e2m1_values(q.codes), power_of_two(q.scales.astype(jnp.int32) - E8M0_BIAS)
    else:
        values, scales = e2m1_values(q.codes), flush(q.scales.astype(jnp.float32) * divide(1.0, q.global_scale))
    sizes = tuple(n // blocks for n, blocks in zip(q.codes.shape, q.scales.shape, strict=True))
    return flush(values * spread(scales, sizes)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def fake_quant(
    w: Float[Array, ...],
    format: str,
    axis: int = 0,
    block: int | None = None,
    rule: str = "ceil",
    dtype: DTypeLike | None = None,
    amax: Float[Array, ""] | None = None,
) -> Float[Array, ...]:
    """`dequantize(quantize(w))` in `dtype` (that of w), with the gradient of the identity; what is not finite becomes NaN.

    Straight-through estimator: Bengio et al. 2013, arXiv:1308.3432, section 4.
    """
    q = quantize(w, format, axis=axis, block=block, rule=rule, amax=amax)
    return jnp.where(jnp.isfinite(w), dequantize(q, dtype or w.dtype), jnp.nan)


def fake_quant_forward(w, format, axis, block, rule, dtype, amax):
    """The value; the backward pass needs nothing of it but the dtype that its cotangent goes back to."""
    return fake_quant(w, format, axis, block, rule, dtype, amax), jnp.zeros((), w.dtype)


def fake_quant_backward(format, axis, block, rule, dtype, like, cotangent):
    """The cotangent, as it is."""
    del format, axis, block, rule, dtype
    return cotangent.astype(like.dtype), None


fake_quant.defvjp(fake_quant_forward, fake_quant_backward)


def pack(codes: UInt8[Array, ...], axis: int = -1) -> UInt8[Array, ...]:
    """Two codes a byte along `axis`, element 2i in the low four bits. Raises ValueError when that axis is odd."""
    if codes.dtype != jnp.uint8 or not -codes.ndim <= axis < codes.ndim:
        raise ValueError(f"codes are a uint8 array that is packed along one of its axes, given {codes.dtype} {codes.shape}, axis {axis}")
    if codes.shape[axis] % 2:
        raise ValueError(f"codes are packed in pairs along axis {axis}, given shape {codes.shape}; add one code of 0")
    last = jnp.moveaxis(codes, axis, -1)
    return jnp.moveaxis(last[..., ::2] | (last[..., 1::2] << 4), -1, axis)


def unpack(packed: UInt8[Array, ...], axis: int = -1) -> UInt8[Array, ...]:
    """Inverse of `pack`."""
    last = jnp.moveaxis(packed, axis, -1)
    codes = jnp.stack([last & 15, last >> 4], axis=-1).reshape(*last.shape[:-1], 2 * last.shape[-1])
    return jnp.moveaxis(codes, -1, axis)


def finite(w: Float[Array, ...]) -> Float[Array, ...]:
    """w in float32, with 0 for what is not finite or denormal."""
    return flush(jnp.where(jnp.isfinite(w), w.astype(jnp.float32), 0))


def flush(x: Float[Array, ...]) -> Float[Array, ...]:
    """x with 0 for what is denormal."""
    return jnp.where(jnp.abs(x) >= FP32_MIN_NORMAL, x, 0)


def finite_amax(w: Float[Array, ...]) -> Float[Array, ""]:
    """Largest magnitude among the finite elements, float32."""
    return jnp.max(jnp.abs(finite(w)))


def block_max(w: Float[Array, ...], sizes: tuple[int, ...]) -> Float[Array, ...]:
    """Largest magnitude of each block."""
    split = [part for size, n in zip(w.shape, sizes, strict=True) for part in (size // n, n)]
    return jnp.max(jnp.abs(w).reshape(split), axis=tuple(range(1, len(split), 2)))


def spread(scales: Float[Array, ...], sizes: tuple[int, ...]) -> Float[Array, ...]:
    """The scale of each element, from that of each block."""
    expanded = jnp.expand_dims(scales, tuple(range(1, 2 * scales.ndim, 2)))
    split = [part for blocks, n in zip(scales.shape, sizes, strict=True) for part in (blocks, n)]
    return jnp.broadcast_to(expanded, split).reshape([blocks * n for blocks, n in zip(scales.shape, sizes, strict=True)])


def encode_scale(amax: Float[Array, ""]) -> Float[Array, ""]:
    """nvfp4's global scale, under which the largest block scale is 448 and the largest element 6."""
    return jnp.where(amax > 0, jnp.minimum(divide(E2M1_MAX * E4M3_MAX, amax), LARGEST_SCALE), 1)


def round_e4m3(x: Float[Array, ...]) -> Float[Array, ...]:
    """x in [0, 448] to the nearest E4M3 number, ties to even, still in float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    kept = 20  # of float32's 23 mantissa bits, these go
    even = (bits >> kept) & 1
    normal = jax.lax.bitcast_convert_type((bits + ((1 << (kept - 1)) - 1) + even) >> kept << kept, jnp.float32)
    return jnp.where(x < E4M3_MIN_NORMAL, jnp.rint(x * (1 / E4M3_SUBNORMAL)) * E4M3_SUBNORMAL, normal)


def e2m1_codes(x: Float[Array, ...], key: Array | None = None) -> UInt8[Array, ...]:
    """Codes of the nearest E2M1 numbers, ties to the even code, saturating at 6; with a key, of one of the two beside x, unbiased."""
    y = jnp.minimum(jnp.abs(x), E2M1_MAX)
    per_unit = jnp.where(y < 2, 2.0, jnp.where(y < 4, 1.0, 0.5))  # one over the distance between neighbours
    steps, below = jnp.rint(y * per_unit), jnp.floor(y * per_unit)
    if key is not None:  # not the floor of a sum with the draw: that sum rounds, now and then up to the next step
        steps = below + (jax.random.uniform(key, x.shape) < y * per_unit - below)
    magnitude = steps * jnp.where(y < 2, 0.5, jnp.where(y < 4, 1.0, 2.0))
    code = jnp.where(magnitude < 2, magnitude * 2, jnp.where(magnitude < 4, magnitude + 2, magnitude * 0.5 + 4))
    return (code + jnp.where((x < 0) & (code > 0), 8, 0)).astype(jnp.uint8)


def e2m1_values(codes: UInt8[Array, ...]) -> Float[Array, ...]:
    """What E2M1 codes stand for, float32."""
    m = (codes & 7).astype(jnp.float32)
    magnitude = jnp.where(m < 4, m * 0.5, jnp.where(m < 6, m - 2, 2 * m - 8))
    return jnp.where(codes >= 8, -magnitude, magnitude)


def mx_exponents(largest: Float[Array, ...], rule: str) -> Int[Array, ...]:
    """Exponent of each block's scale, int32, by the rule of that name. Raises ValueError on another."""
    if rule not in MX_RULES:
        raise ValueError(f"mxfp4's scale rule is one of {', '.join(MX_RULES)}, given {rule!r}")
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    mantissa = bits & 0x7FFFFF
    at = {"floor": 1 << 23, "even": 3 << 21, "ceil": (1 << 22) + 1}[rule]  # mantissa from which the scale is one power of two more
    exponents = (bits >> 23) - E8M0_BIAS - 2 + (mantissa >= at)
    return jnp.clip(exponents, *E8M0_RANGE)


def divide(a: Float[Array, ...] | float, b: Float[Array, ...] | float) -> Float[Array, ...]:
    """a / b for normal a (or 0) and normal b > 0, float32, rounded to nearest; 0 below the normal range, and above it 2^127 or more.

    Mantissas as integers: the float quotient is off by a few units, and the remainder, small enough for 32 bits, says by how many.
    """
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    bits_a, bits_b = (jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32) for x in (a, b))
    ma, mb = (bits & 0x7FFFFF | 1 << 23 for bits in (bits_a, bits_b))
    smaller = (ma < mb).astype(jnp.int32)
    ratio = ma.astype(jnp.float32) / mb.astype(jnp.float32)  # in (1/2, 2)
    quotient = (ratio * jnp.where(ma < mb, 2.0**24, 2.0**23)).astype(jnp.int32)
    rest = (ma << (23 + smaller)) - quotient * mb  # both wrap, their difference does not
    for _ in range(2):
        low, high = (rest < 0).astype(jnp.int32), (rest >= mb).astype(jnp.int32)
        quotient, rest = quotient - low + high, rest + (low - high) * mb
    quotient += 2 * rest > mb  # never half-way: that would take a divisor of 25 bits
    exponent = (bits_a >> 23) - (bits_b >> 23) - smaller
    # Added, not or-ed: a quotient that was rounded up to 2^24 carries into the exponent.
    value = jax.lax.bitcast_convert_type((jnp.clip(exponent + E8M0_BIAS, 0, 254) << 23) + (quotient - (1 << 23)), jnp.float32)
    value = jnp.where((exponent <= -E8M0_BIAS) | (a == 0), 0, value)
    return jnp.where(a < 0, -value, value)


def power_of_two(exponents: Int[Array, ...]) -> Float[Array, ...]:
    """2 ** exponents for -126..127, float32, exactly."""
    return jax.lax.bitcast_convert_type((exponents + E8M0_BIAS) << 23, jnp.float32)
