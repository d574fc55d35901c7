"""Four-bit formats: what holds for every array, and for every draw of stochastic rounding.

Beside test_fp4.py, which a GPU host without hypothesis can run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp4_reference import E2M1, VARIANTS, neighbours, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax.ops.fp4 import QuantizedArray, dequantize, e2m1_codes, e2m1_values, fake_quant, pack, quantize, unpack

STATIC = ("format", "axis", "block", "rule")
jitted_quantize, jitted_fake_quant = (jax.jit(f, static_argnames=STATIC) for f in (quantize, fake_quant))
jitted_dequantize = jax.jit(dequantize)
EVERY_KIND = ("int4-64", "nvfp4", "nvfp4_2d", "mxfp4-ceil")


@st.composite
def arrays(draw, span: int = 12, shape=(64, 32)):
    """Normal or heavy-tailed, of any size within 2^-40 .. 2^40, its columns in groups of 16 up to 2^span apart."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.standard_normal(shape) if draw(st.booleans()) else rng.standard_t(2, shape)
    columns = np.repeat(draw(st.lists(st.integers(-span, 0), min_size=shape[1] // 16, max_size=shape[1] // 16)), 16)
    return (w * np.exp2(columns + draw(st.integers(-40, 40)))).astype(np.float32)


def examples(n: int = 10):
    return settings(max_examples=n)


@examples()
@given(st.integers(0, 2**32), st.sampled_from([((6,), 0), ((4, 6), 0), ((4, 6), -1), ((2, 4, 6), 1), ((2, 4, 6), -3)]))
def test_unpacking_gives_back_what_was_packed(seed, where):
    shape, axis = where
    codes = np.random.default_rng(seed).integers(0, 16, shape).astype(np.uint8)
    packed = pack(jnp.asarray(codes), axis=axis)
    assert packed.shape[axis] * 2 == shape[axis]
    np.testing.assert_array_equal(unpack(packed, axis=axis), codes)
    first, second = codes.swapaxes(0, axis)[::2], codes.swapaxes(0, axis)[1::2]
    np.testing.assert_array_equal(np.asarray(packed).swapaxes(0, axis), first + 16 * second)


@pytest.mark.parametrize("variant", VARIANTS)
@examples()
@given(w=arrays(shape=(256, 32)))
def test_fake_quantised_is_what_codes_and_scales_stand_for(variant, w):
    want = jitted_dequantize(jitted_quantize(w, **VARIANTS[variant]))
    np.testing.assert_array_equal(jitted_fake_quant(w, **VARIANTS[variant]), want)


@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
@examples()
@given(w=arrays())
def test_mxfp4_of_mxfp4_changes_nothing(rule, w):
    # A block's largest element becomes 4 or 6, and 4 * 2^X and 6 * 2^X have the scale 2^X again by every rule. But for `ceil`, where
    # it may become 3 (from 3 to 3.5): then the scale halves, and twice what is on the grid up to 3 is on the grid too.
    once = jitted_fake_quant(w, "mxfp4", rule=rule)
    np.testing.assert_array_equal(jitted_fake_quant(once, "mxfp4", rule=rule), once)


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_2d"])
@examples()
@given(w=arrays())
def test_nvfp4_of_nvfp4_changes_nothing_under_the_same_amax_and_normal_block_scales(format, w):
    # A block's scale is within 1/16 of a sixth of its largest element, which so becomes 6 and asks for the same scale again. Not so
    # for subnormal scales, which are up to half off; and the largest of the tensor comes back with an error of its last bit.
    w = w + np.float32(np.abs(w).max() / 1000) * np.where(np.arange(64) % 16 == 0, 1, 0)[:, None].astype(np.float32)
    amax = jnp.max(jnp.abs(w))
    assert (jitted_quantize(w, format, amax=amax).scales.astype(jnp.float32) >= 2.0**-6).all()
    once = jitted_fake_quant(w, format, amax=amax)
    np.testing.assert_array_equal(jitted_fake_quant(once, format, amax=amax), once)


@examples()
@given(w=arrays())
def test_int4_of_int4_has_the_same_codes(w):
    # Not the same values: the 1e-8 is added to the scale again. Where it is small beside the group, the largest element is 7.
    w = w * np.float32(1 / np.abs(w).max(0))  # so that every group has an element of 1
    once = jitted_quantize(w, "int4", block=64)
    np.testing.assert_array_equal(jitted_quantize(jitted_dequantize(once), "int4", block=64).codes, once.codes)


def block_largest(w: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Of each element's block, the largest magnitude."""
    tiles = np.abs(w).reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
    return np.broadcast_to(tiles.max((1, 3), keepdims=True), tiles.shape).reshape(w.shape)


# Half the distance between neighbours is 1/4 of the scale below 2 scales and at most a fifth of the element above (1.25, 2.5, 5).
# So the error is at most the scale / 4 or |w| / 5; here with the largest scale that a block of largest magnitude b can have.
BOUNDS = {
    "int4-64": ((64, 1), lambda b, x: (b + 1e-8) / 14),  # uniform steps of (b + 1e-8) / 7
    "nvfp4": ((16, 1), lambda b, x: np.maximum(b / 6 * (18 / 17) / 4, x / 5)),  # b / 6 = 17/16 is rounded up to 18/16 at most
    "nvfp4_2d": ((16, 16), lambda b, x: np.maximum(b / 6 * (18 / 17) / 4, x / 5)),
    "mxfp4-floor": ((32, 1), lambda b, x: np.maximum(b / 4 / 4, x / 4)),  # up to 8 scales becomes 6: a quarter of the element
    "mxfp4-even": ((32, 1), lambda b, x: np.maximum(b / 3.5 / 4, x / 5)),  # 3.5 to 7 scales
    "mxfp4-ceil": ((32, 1), lambda b, x: np.maximum(b / 3 / 4, x / 5)),  # 3 to 6 scales
}


@pytest.mark.parametrize("variant", BOUNDS)
@examples(20)
@given(w=arrays(span=0))  # nvfp4's bound holds for block scales that are normal in E4M3
def test_no_error_is_above_the_bound_of_its_format(variant, w):
    (rows, columns), bound = BOUNDS[variant]
    w = w + (np.abs(w).max() / 1000 * (np.arange(64) % 16 == 0)[:, None]).astype(np.float32)
    exact = w.astype(np.float64)
    error = np.abs(np.asarray(jitted_fake_quant(w, **VARIANTS[variant]), np.float64) - exact)
    limit = bound(block_largest(exact, rows, columns), np.abs(exact))
    assert (error <= limit * (1 + 1e-5)).all()  # float32 scales and products


@examples()
@given(w=arrays(shape=(64, 64)))
def test_square_blocks_quantise_the_transpose_to_the_transpose(w):
    q, turned = jitted_quantize(w, "nvfp4_2d"), jitted_quantize(w.T, "nvfp4_2d", axis=1)
    np.testing.assert_array_equal(turned.codes, q.codes.T)
    np.testing.assert_array_equal(turned.scales, q.scales.T)
    np.testing.assert_array_equal(jitted_fake_quant(w.T, "nvfp4_2d"), jitted_fake_quant(w, "nvfp4_2d").T)


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_2d"])
@examples()
@given(w=arrays(), power=st.integers(-30, 30))
def test_a_power_of_two_moves_into_the_global_scale(format, w, power):
    q, scaled = jitted_quantize(w, format), jitted_quantize(np.ldexp(w, power), format)
    np.testing.assert_array_equal(scaled.codes, q.codes)
    np.testing.assert_array_equal(scaled.scales, q.scales)
    assert float(scaled.global_scale) == float(q.global_scale) * 2.0**-power
    np.testing.assert_array_equal(jitted_dequantize(scaled), np.ldexp(jitted_dequantize(q), power))


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_2d"])
@examples()
@given(a=arrays(), b=arrays(), side=st.sampled_from([0, 1]))
def test_arrays_that_share_an_amax_quantise_as_one(format, a, b, side):
    amax = jnp.maximum(jnp.abs(a).max(), jnp.abs(b).max())
    whole = jitted_quantize(np.concatenate([a, b], side), format)
    parts = [jitted_quantize(w, format, amax=amax) for w in (a, b)]
    np.testing.assert_array_equal(np.concatenate([q.codes for q in parts], side), whole.codes)
    np.testing.assert_array_equal(np.concatenate([q.scales for q in parts], side), whole.scales)
    assert {float(q.global_scale) for q in parts} == {float(whole.global_scale)}
    values = np.concatenate([jitted_fake_quant(w, format, amax=amax) for w in (a, b)], side)
    np.testing.assert_array_equal(values, jitted_dequantize(whole))


def check_draws(values: np.ndarray, x: np.ndarray) -> None:
    """Draws of E2M1 numbers along the first axis: beside x, and x on average."""
    low, high = neighbours(x)
    assert ((values == low) | (values == high)).all()
    # A draw is high with probability (x - low) / (high - low). Four standard errors: once in 16,000, and x is on the grid where 0.
    error = np.sqrt((x - low) * (high - x) / len(values))
    assert (np.abs(values.mean(0) - x) <= 4 * error).all()


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average():
    x = np.linspace(-6, 6, 97, dtype=np.float32)  # eighths: the grid, its ties, and between
    draws = jax.jit(jax.vmap(lambda key: e2m1_values(e2m1_codes(jnp.asarray(x), key))))(jax.random.split(jax.random.key(0), 4096))
    check_draws(np.asarray(draws, np.float64), x.astype(np.float64))


@pytest.mark.parametrize("variant", ["nvfp4", "nvfp4_2d", "mxfp4-ceil"])
def test_stochastic_rounding_of_an_array_leaves_its_scales_and_is_right_on_average(variant):
    w = jnp.asarray(normal((32, 16)))
    draw = jax.jit(jax.vmap(lambda key: quantize(w, **VARIANTS[variant], key=key)))
    q, plain = draw(jax.random.split(jax.random.key(1), 2048)), jitted_quantize(w, **VARIANTS[variant])
    np.testing.assert_array_equal(q.scales, np.broadcast_to(plain.scales, q.scales.shape))
    ones = QuantizedArray(jnp.full_like(plain.codes, 2), plain.scales, plain.global_scale, plain.format)
    x = np.asarray(w, np.float64) / np.asarray(jitted_dequantize(ones), np.float64)
    # nanojax multiplies by a rounded reciprocal instead: what comes to 6 there may come to 2e-7 less here.
    x = np.clip(np.where(np.abs(np.abs(x) - 6) < 1e-5, np.round(x), x), -6, 6)
    check_draws(np.asarray(jax.jit(e2m1_values)(q.codes), np.float64), x)


def test_what_is_on_the_grid_never_moves_not_even_by_the_largest_draw():
    key, n, at = jax.random.key(14), 2**20, 875088
    assert float(jax.random.uniform(key, (n,))[at]) == 1 - 2.0**-23  # the largest there is; this key was searched for
    rounded = jax.jit(lambda value: e2m1_codes(jnp.full(n, value), key)[at])
    assert [int(rounded(jnp.float32(value))) for value in E2M1] == list(range(8))
    assert [int(rounded(jnp.float32(-value))) for value in E2M1[1:]] == list(range(9, 16))


def test_another_key_draws_otherwise_and_the_same_key_the_same():
    w = jnp.asarray(normal((32, 16)))
    a, b, again = (jitted_quantize(w, "nvfp4", key=jax.random.key(seed)).codes for seed in (0, 1, 0))
    assert (a != b).any()
    np.testing.assert_array_equal(a, again)
