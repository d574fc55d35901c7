"""What nanojax.ops.fp4 should compute, a second time: numpy, nearest by search in tables, and the arrays to compare on."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import ml_dtypes
import numpy as np

# A float's code counts up with its value, so that the even one of two neighbours is the one at the even index.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e, m in itertools.product(range(16), range(8))][:127])
INT4 = np.arange(8.0)
TINY, LARGEST = 2.0**-126, 2.0**126

BLOCKS = {"nvfp4": 16, "nvfp4_2d": 16, "mxfp4": 32}
VARIANTS = {  # what tests call a format: its keywords
    **{f"int4-{g}": dict(format="int4", block=g) for g in (64, 128, 256)},
    "nvfp4": dict(format="nvfp4"),
    "nvfp4_2d": dict(format="nvfp4_2d"),
    **{f"mxfp4-{rule}": dict(format="mxfp4", rule=rule) for rule in ("floor", "even", "ceil")},
}


class Quantized(NamedTuple):
    codes: np.ndarray
    scales: np.ndarray
    """As stored: of mxfp4 the exponent plus 127."""
    global_scale: np.floating | None
    values: np.ndarray


def f32(x) -> np.ndarray:
    """x as the float32 nearest to it, in float64, where the next operation on two such numbers is exact to twice as many bits as it
    needs; what float32 holds only as a denormal is 0."""
    with np.errstate(over="ignore"):
        y = np.asarray(x, np.float64).astype(np.float32).astype(np.float64)
    return np.where(np.abs(y) < TINY, 0.0, y)


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the entry nearest to each x >= 0, of two equally near the even index."""
    above = np.clip(np.searchsorted(table, x), 1, len(table) - 1)
    low, high = x - table[above - 1], table[above] - x
    return np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)


def quantize(w, format: str, *, axis: int = 0, block: int | None = None, rule: str = "ceil", amax=None) -> Quantized:
    w = f32(np.where(np.isfinite(np.asarray(w, np.float64)), np.asarray(w, np.float64), 0))
    sizes = [16 if format == "nvfp4_2d" else 1] * w.ndim
    sizes[axis] = block or BLOCKS[format]
    home = tuple(i // n for i, n in zip(np.indices(w.shape), sizes, strict=True))  # of each element, the index of its block
    largest = np.zeros([size // n for size, n in zip(w.shape, sizes, strict=True)])
    np.maximum.at(largest, home, np.abs(w))
    if format == "int4":
        return int4(w, home, largest)
    if format == "mxfp4":
        return mxfp4(w, home, largest, rule)
    return nvfp4(w, home, largest, f32(np.abs(w).max() if amax is None else amax))


def int4(w, home, largest) -> Quantized:
    scales = f32(f32(largest + f32(1e-8)) / 7)
    levels = np.sign(w) * INT4[nearest(np.abs(f32(w / scales[home])), INT4)]
    return Quantized((levels + 8).astype(np.uint8), scales, None, f32(levels * scales[home]))


def nvfp4(w, home, largest, amax) -> Quantized:
    with np.errstate(divide="ignore"):
        s_enc = min(f32(2688 / amax), LARGEST) if amax > 0 else 1.0
        s_dec = f32(1 / s_enc)
        scales = E4M3[nearest(np.minimum(f32(largest * f32(s_enc * f32(1 / 6))), 448), E4M3)]
        factors = np.where(scales > 0, np.minimum(f32(1 / f32(scales * s_dec)), LARGEST), 0)
    codes, levels = e2m1(f32(w * factors[home]))
    return Quantized(codes, scales, np.float64(s_enc), f32(levels * f32(scales * s_dec)[home]))


def mxfp4(w, home, largest, rule) -> Quantized:
    mantissa, exponent = np.frexp(largest)  # in [0.5, 1), or 0 of 0
    x = exponent - 1 - 2
    x = {"floor": x, "even": x + (mantissa * 2 >= 1.75), "ceil": x + (largest > 6 * np.ldexp(1.0, x))}[rule]
    x = np.where(largest > 0, np.clip(x, -126, 125), -126)
    codes, levels = e2m1(f32(np.ldexp(w, -x[home])))
    return Quantized(codes, x + 127, None, f32(np.ldexp(levels, x[home])))


def e2m1(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values; the code of a zero has no sign."""
    code = nearest(np.minimum(np.abs(y), 6), E2M1)
    return (code + 8 * ((y < 0) & (code > 0))).astype(np.uint8), np.sign(y) * E2M1[code]


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest E2M1 number that is not above x, and the smallest that is not below."""
    grid = np.concatenate([-E2M1[:0:-1], E2M1])
    return grid[np.searchsorted(grid, x, side="right") - 1], grid[np.searchsorted(grid, x, side="left")]


def quotients() -> list[np.ndarray]:
    """Dividends and divisors: mantissas at random, and close to a power of two, where quotients round up to the next one."""
    rng = np.random.default_rng(0)
    ends = np.array([1, 1 + 2.0**-23, 1 + 2.0**-22, 1.5, 2 - 2.0**-22, 2 - 2.0**-23, 1.75, 7 / 4, 6 / 4, 2688 / 2048])
    a, b = (np.concatenate([1 + rng.random(50_000), one.ravel()]) for one in np.meshgrid(ends, ends))
    return [np.ldexp(x, rng.integers(-60, 60, x.shape)).astype(np.float32) for x in (a * rng.choice([-1, 1], a.shape), b)]


def normal(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bfloat16(shape, axis, block) -> np.ndarray:
    """Few distinct values, many of them half-way between two codes."""
    return normal(shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def huge(shape, axis, block) -> np.ndarray:
    w = np.random.default_rng(0).uniform(-2e37, 2e37, shape).astype(np.float32)
    w.flat[77] = 1e38
    return w


def outliers(shape, axis, block) -> np.ndarray:
    """In every block one element a hundred times the others."""
    at = np.indices(shape)[axis] % block == 5
    return 0.02 * np.where(at, 100, 1).astype(np.float32) * normal(shape)


def magnitudes(shape, axis, block) -> np.ndarray:
    """Blocks of size 1 to 2^32: beside the largest, some have subnormal E4M3 scales and some none."""
    which = np.indices(shape)[axis] // block * 5 + np.indices(shape)[1 - axis] // 16
    return normal(shape) * np.exp2(which % 33).astype(np.float32)


def element_ties(shape, axis, block) -> np.ndarray:
    """Every quarter, in blocks whose scale is 1: the largest is 7 (int4), or 6 under a tensor's largest of 6 * 448 (the others)."""
    top = 7 if block >= 64 else 6
    w = np.random.default_rng(0).integers(-4 * top, 4 * top + 1, shape) / np.float32(4)
    w[np.indices(shape)[axis] % block == 3] = top
    if top == 6:
        w.flat[0] = 2688
    return w.astype(np.float32)


def scale_ties(shape, axis, block) -> np.ndarray:
    """Under a global scale of 1, blocks whose sixth is half way between two E4M3 numbers: each such place in turn."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    top = 6 * middles[(np.indices(shape)[axis] // block * 37 + np.indices(shape)[1 - axis]) % len(middles)]
    w = np.where(np.indices(shape)[axis] % block == 2, top, np.clip(normal(shape) / 4, -1, 1) * top)
    w.flat[0] = 2688
    return w.astype(np.float32)


def near_ties(shape, axis, block) -> np.ndarray:
    """Under a global scale that is no power of two: sixths of blocks, and elements, within a few last bits of where they tie.

    Only here does it show which product or quotient was rounded first.
    """
    rng = np.random.default_rng(0)
    middles, unit = (E4M3[1:] + E4M3[:-1]) / 2, 0.37 / 2688
    middle = middles[(np.indices(shape)[axis] // block * 37 + np.indices(shape)[1 - axis]) % len(middles)]
    ties = rng.choice((E2M1[1:] + E2M1[:-1]) / 2, shape) * rng.choice([-1, 1], shape) * E4M3[nearest(middle, E4M3)]
    w = np.where(np.indices(shape)[axis] % block == 2, 6 * middle, ties) * unit * (1 + rng.integers(-3, 4, shape) * 2.0**-24)
    w.flat[0] = 0.37
    return w.astype(np.float32)


def minus_zero(shape, axis, block) -> np.ndarray:
    """A quarter of all elements, and whole blocks."""
    return np.where((np.indices(shape).sum(0) % 4 == 0) | (np.indices(shape)[axis] < block), np.float32(-0.0), normal(shape))


INPUTS = {  # name: function of shape, the axis of blocks, and their length
    "normal": lambda shape, axis, block: normal(shape) * np.float32(0.02),
    "student_t": lambda shape, axis, block: np.random.default_rng(0).standard_t(3, shape).astype(np.float32),
    "bfloat16": bfloat16,
    "huge": huge,
    "1e-30": lambda shape, axis, block: normal(shape) * np.float32(1e-30),
    "1e-36": lambda shape, axis, block: normal(shape) * np.float32(1e-36),
    "denormal": lambda shape, axis, block: np.full(shape, 1e-40, np.float32),
    "zero": lambda shape, axis, block: np.zeros(shape, np.float32),
    "outliers": outliers,
    "magnitudes": magnitudes,
    "element_ties": element_ties,
    "scale_ties": scale_ties,
    "near_ties": near_ties,
    "minus_zero": minus_zero,
}
