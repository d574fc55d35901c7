"""Four-bit formats against a second implementation, ml_dtypes and literals worked by hand; gradients, and what is not finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp4_reference import BLOCKS, E2M1, E4M3, INPUTS, VARIANTS, normal, quotients
from fp4_reference import quantize as reference

from nanojax.formats import FORMATS, block_shape, stored_bytes_per_weight
from nanojax.ops.fp4 import (
    dequantize,
    divide,
    e2m1_codes,
    e2m1_values,
    fake_quant,
    finite_amax,
    pack,
    power_of_two,
    quantize,
    round_e4m3,
    unpack,
)

SCALE_TYPES = {"int4": jnp.float32, "nvfp4": jnp.float8_e4m3fn, "nvfp4_2d": jnp.float8_e4m3fn, "mxfp4": jnp.uint8}
EVERY_KIND = ("int4-64", "nvfp4", "nvfp4_2d", "mxfp4-ceil")
STATIC = ("format", "axis", "block", "rule")
jitted_quantize = jax.jit(quantize, static_argnames=STATIC)
jitted_dequantize = jax.jit(dequantize)
jitted_fake_quant = jax.jit(fake_quant, static_argnames=(*STATIC, "dtype"))


def all_three(w, **options):
    """Codes and scales, what they stand for, and the fake-quantised array in float32."""
    q = quantize(w, **options)
    return q, dequantize(q), fake_quant(w, **options, dtype=jnp.float32)


jitted = jax.jit(all_three, static_argnames=STATIC)  # one program, because compiling is what takes time here


def check(w, variant: str, axis: int = 0, *, eager: bool = False, **keywords) -> None:
    """Codes, scales and values of nanojax equal the second implementation's, jitted and if asked eager."""
    options = VARIANTS[variant] | dict(axis=axis)
    want = reference(w, **options, **keywords)
    keywords = {name: jnp.float32(value) for name, value in keywords.items()}
    for mode, call in {"jit": jitted, **({"eager": all_three} if eager else {})}.items():
        q, values, faked = call(jnp.asarray(w), **options, **keywords)
        assert (q.format, q.codes.dtype, q.scales.dtype) == (options["format"], jnp.uint8, SCALE_TYPES[options["format"]]), mode
        np.testing.assert_array_equal(np.asarray(q.scales, np.float64), want.scales, err_msg=mode)
        assert (None if q.global_scale is None else float(q.global_scale)) == want.global_scale, mode
        np.testing.assert_array_equal(q.codes, want.codes, err_msg=mode)
        np.testing.assert_array_equal(values, want.values, err_msg=mode)
        np.testing.assert_array_equal(faked, want.values, err_msg=mode)


def example(name: str, variant: str, axis: int) -> np.ndarray:
    """That input, long enough along its axis for the largest group."""
    options = VARIANTS[variant]
    return INPUTS[name]((256, 48) if axis == 0 else (48, 256), axis, options.get("block") or BLOCKS[options["format"]])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", INPUTS)
def test_codes_scales_and_values_equal_the_second_implementation(name, variant, axis):
    # Eager work compiles every operation for every shape: along one axis, and of int4 one group.
    check(example(name, variant, axis), variant, axis, eager=axis == 0 and variant not in ("int4-128", "int4-256"))


@pytest.mark.parametrize("variant", EVERY_KIND)
def test_an_axis_counts_from_the_end_too(variant):
    w = example("magnitudes", variant, 0)
    for axis in (0, 1):
        got, want = (jitted_fake_quant(w.T if axis else w, **VARIANTS[variant], axis=a) for a in (axis - 2, axis))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("variant", [v for v in EVERY_KIND if v != "nvfp4_2d"])
def test_an_array_of_three_axes_has_blocks_along_any_of_them(variant):
    check(example("magnitudes", variant, 1).reshape(4, 12, 256), variant, -1)
    check(example("magnitudes", variant, 1).reshape(4, 12, 256).swapaxes(1, 2), variant, 1)


@pytest.mark.parametrize("variant", ["nvfp4", "nvfp4_2d"])
@pytest.mark.parametrize("name", ["normal", "magnitudes", "element_ties", "1e-36", "zero"])
def test_a_given_amax_takes_the_place_of_the_largest_magnitude(name, variant):
    w = example(name, variant, 0)
    for factor in (1, 5, 1 / 3):  # by a third, block scales stay at 448 and elements at 6
        check(w, variant, amax=np.float32(factor * np.abs(w).max()))


def check_denormal_results(variant: str) -> None:
    w = normal((256, 48)) * np.float32(3e-38)
    want, (q, values, _) = reference(w, **VARIANTS[variant]), jitted(jnp.asarray(w), **VARIANTS[variant])
    np.testing.assert_array_equal(np.asarray(q.scales, np.float64), want.scales)
    np.testing.assert_array_equal(q.codes, want.codes)
    # A CPU takes a denormal scale for 0 and a GPU does not: at most 6 times the largest of them.
    np.testing.assert_allclose(values, want.values, rtol=0, atol=6 * 2.0**-126)


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_results_are_denormal_codes_are_exact_and_values_almost_zero(variant):
    check_denormal_results(variant)


def finite_halves() -> np.ndarray:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return halves[np.isfinite(halves)].astype(np.float32)


def test_elements_round_as_ml_dtypes_rounds_every_finite_half():
    cast = finite_halves().astype(ml_dtypes.float4_e2m1fn)
    want, zero = cast.astype(np.float32), cast.astype(np.float32) == 0
    for codes in (e2m1_codes(jnp.asarray(finite_halves())), jax.jit(e2m1_codes)(finite_halves())):
        np.testing.assert_array_equal(e2m1_values(codes), want)
        np.testing.assert_array_equal(codes, np.where(zero, 0, cast.view(np.uint8)))  # the cast gives -0 a code of its own
    every = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(e2m1_values(jnp.asarray(every)), every.view(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_block_scales_round_as_ml_dtypes_rounds_halves_and_both_sides_of_every_middle():
    halves = finite_halves()
    middles = ((E4M3[1:] + E4M3[:-1]) / 2).astype(np.float32)
    beside = (middles.view(np.int32)[:, None] + np.arange(-4, 5, dtype=np.int32)).view(np.float32)  # nine floats around each
    x = np.concatenate([halves[(halves >= 0) & (halves <= 448)], E4M3.astype(np.float32), beside.ravel(), np.linspace(0, 448, 4999)])
    x = x.astype(np.float32)
    want = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(round_e4m3(jnp.asarray(x)), want)
    np.testing.assert_array_equal(jax.jit(round_e4m3)(x), want)


def test_division_rounds_to_nearest():
    a, b = quotients()
    np.testing.assert_array_equal(jax.jit(divide)(a, b), a / b)
    a, b = jnp.array([0, 1e-30, 1e30, -1e30, 2.0**-126, 3e38]), jnp.array([1e-30, 1e30, 1e-30, 1e-30, 1.0, 3e38])
    zero, below, above, minus, least, one = jax.jit(divide)(a, b).tolist()
    assert (zero, below, least, one) == (0, 0, 2.0**-126, 1)
    assert min(above, -minus) >= 2.0**127


def test_powers_of_two_are_exact():
    exponents = np.arange(-126, 128, dtype=np.int32)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(exponents)), np.ldexp(1.0, exponents))


def test_element_ties_go_to_the_even_code_and_six_is_the_end_by_hand():
    x = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 5.001, 6, 7, 1e38, jnp.inf])
    codes = [0, 2, 2, 4, 4, 6, 6, 7, 7, 7, 7, 7]  # 0 1 1 2 2 4 4 6 6 6 6 6
    assert e2m1_codes(x).tolist() == codes
    assert e2m1_codes(-x).tolist() == [0] + [8 + code for code in codes[1:]]
    assert e2m1_values(e2m1_codes(x)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 6, 6, 6]
    assert e2m1_values(e2m1_codes(-x)).tolist() == [0, -1, -1, -2, -2, -4, -4, -6, -6, -6, -6, -6]


def test_an_nvfp4_block_by_hand():
    # amax 5.25 makes s_enc = 2688 / 5.25 = 512. The block's largest, 0.3, asks for a scale of 0.3 * 512 / 6 = 25.6, and E4M3 has
    # steps of 2 there: 26. An element is counted in 26 / 512 = 0.05078125.
    w = [0.3, -0.3, 0.1, -0.2, 0.01, -0.013, 0.0125, 0.25, 0.26, 0.0, 0.038, -0.0381, 0.13, -0.12, 0.177, 0.178]
    # in those:  5.91 -5.91 1.97 -3.94 0.20 -0.256 0.246 4.92 5.12 0 0.748 -0.7503 2.56 -2.36 3.486 3.505
    steps = [6, -6, 2, -4, 0, -0.5, 0, 4, 6, 0, 0.5, -1, 3, -2, 3, 4]
    codes = [7, 15, 4, 14, 0, 9, 0, 6, 7, 0, 1, 10, 5, 12, 5, 6]
    q = jitted_quantize(jnp.array(w)[:, None], "nvfp4", amax=jnp.float32(5.25))
    assert (q.codes[:, 0].tolist(), q.scales.astype(jnp.float32).tolist(), float(q.global_scale)) == (codes, [[26]], 512)
    np.testing.assert_array_equal(jitted_dequantize(q)[:, 0], np.array(steps) * 0.05078125)  # a sum of few powers of two: exact


def test_an_int4_group_by_hand():
    # The largest, 7, makes the scale (7 + 1e-8) / 7 = 1 in float32; halves go to the even neighbour.
    q = jitted_quantize(jnp.array([[7.0, -7, 0.5, 1.5, -2.5, 3.4, -0.6, 0]]), "int4", axis=1, block=8)
    assert q.codes.tolist() == [[15, 1, 8, 10, 6, 11, 7, 8]]
    assert q.scales.tolist() == [[1]]
    assert jitted_dequantize(q).tolist() == [[7, -7, 0, 2, -2, 3, -1, 0]]
    # The 1e-8 is inside the scale: 3e-8 / (4e-8 / 7) = 5.25, five steps instead of seven. A group of zeros has a scale too.
    q = jitted_quantize(jnp.array([[3e-8, 0], [0, 0]]), "int4", axis=1, block=2)
    assert q.codes.tolist() == [[13, 8], [8, 8]]
    np.testing.assert_allclose(q.scales, [[4e-8 / 7], [1e-8 / 7]], rtol=2e-7)  # a float32 sum and a quotient
    assert jitted_quantize(jnp.zeros((256, 1)), "int4").scales.shape == (2, 1)  # 128, where no group is named


@pytest.mark.parametrize(
    ("rule", "largest", "byte", "steps"),
    [  # 4 is 1.0 * 2^2, and the scale is at least 2^(2 - 2) = 1, whose byte is 127
        ("floor", 6, 127, [6, 0.5, 2, 6, -2]),
        ("even", 6, 127, [6, 0.5, 2, 6, -2]),
        ("ceil", 6, 127, [6, 0.5, 2, 6, -2]),
        ("floor", 6.5, 127, [6, 0.5, 2, 6, -2]),  # saturates
        ("even", 6.5, 127, [6, 0.5, 2, 6, -2]),
        ("ceil", 6.5, 128, [3, 0, 1, 3, -1]),  # 6.5 / 2 = 3.25
        ("floor", 7, 127, [6, 0.5, 2, 6, -2]),
        ("even", 7, 128, [4, 0, 1, 3, -1]),  # 7 = 1.75 * 2^2, and 3.5 ties to 4
        ("ceil", 7, 128, [4, 0, 1, 3, -1]),
    ],
)
def test_an_mxfp4_block_by_hand(rule, largest, byte, steps):
    w = jnp.zeros(32).at[:5].set(jnp.array([largest, 0.5, 2.4, 5.6, -2.4]))
    q = jitted_quantize(w, "mxfp4", rule=rule)
    assert q.scales.tolist() == [byte]
    assert jitted_dequantize(q)[:5].tolist() == [2.0 ** (byte - 127) * step for step in steps]
    assert (q.codes[5:] == 0).all()


def test_the_first_of_a_pair_is_in_the_low_four_bits():
    assert pack(jnp.array([1, 2, 15, 0, 9, 7], jnp.uint8)).tolist() == [0x21, 0x0F, 0x79]
    assert unpack(jnp.array([0x21, 0x0F, 0x79], jnp.uint8)).tolist() == [1, 2, 15, 0, 9, 7]
    assert pack(jnp.array([[1, 3], [2, 4]], jnp.uint8), axis=0).tolist() == [[0x21, 0x43]]


def test_packed_bytes_are_those_of_jax_float4():
    codes = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).astype(np.uint8)  # all pairs
    pairs = jnp.asarray(codes.view(ml_dtypes.float4_e2m1fn))
    np.testing.assert_array_equal(pack(jnp.asarray(codes.reshape(16, 32))), jax.lax.bitcast_convert_type(pairs, jnp.uint8))


@pytest.mark.parametrize("variant", ["int4-64", "int4-256", "nvfp4", "mxfp4-ceil"])
def test_bytes_per_weight_are_those_of_packed_codes_and_scales(variant):
    q = jax.eval_shape(lambda w: quantize(w, **VARIANTS[variant]), jnp.zeros((256, 64)))
    options = {name: value for name, value in VARIANTS[variant].items() if name != "rule"}
    assert jax.eval_shape(pack, q.codes).size + q.scales.size * q.scales.dtype.itemsize == 256 * 64 * stored_bytes_per_weight(**options)


@pytest.mark.parametrize("variant", EVERY_KIND)
def test_the_gradient_passes_straight_through(variant):
    w, given = jnp.asarray(normal((256, 48))), jnp.asarray(normal((256, 48), 1))
    calls = {
        "plain": lambda w: fake_quant(w, **VARIANTS[variant]),
        "bfloat16": lambda w: fake_quant(w, **VARIANTS[variant], dtype=jnp.bfloat16),
        "amax of w itself": lambda w: fake_quant(w, **VARIANTS[variant], amax=finite_amax(w)),
    }

    def out_and_gradient(w, name):
        out, back = jax.vjp(calls[name], w)
        return out, back(given.astype(out.dtype))[0]

    together = jax.jit(lambda w: {name: out_and_gradient(w, name) for name in calls})(w)
    for name, (out, dw) in {**together, "eager": out_and_gradient(w, "plain")}.items():
        np.testing.assert_array_equal(dw, given.astype(out.dtype).astype(jnp.float32), err_msg=name)
        assert dw.dtype == w.dtype, name
        assert out.dtype == (jnp.bfloat16 if name == "bfloat16" else jnp.float32), name
        assert (out != w.astype(out.dtype)).any(), name  # so there is something to pass through


def test_bfloat16_weights_come_back_in_bfloat16_and_so_does_their_gradient():
    w = jnp.asarray(normal((256, 48)), jnp.bfloat16)
    np.testing.assert_array_equal(jitted_fake_quant(w, "nvfp4"), jnp.asarray(reference(w, "nvfp4").values, jnp.bfloat16))
    for dtype in (None, jnp.float32):
        out, gradient = jax.eval_shape(jax.value_and_grad(lambda w, dtype=dtype: fake_quant(w, "nvfp4", dtype=dtype).sum()), w)
        assert (out.dtype, gradient.dtype) == (dtype or jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize("variant", EVERY_KIND)
def test_a_product_gives_x_the_gradient_of_quantised_weights_and_w_that_of_the_product(variant):
    x, w, dy = (jnp.asarray(normal(shape, seed)) for seed, shape in enumerate([(8, 64), (64, 32), (8, 32)]))
    out, back = jax.jit(lambda x, w: jax.vjp(lambda x, w: x @ fake_quant(w, **VARIANTS[variant]), x, w))(x, w)
    used = reference(w, **VARIANTS[variant]).values
    # float32 sums of 64 (out) and 32 (dx) and 8 (dw) products, each below 10
    np.testing.assert_allclose(out, x @ used, atol=2e-5)
    np.testing.assert_allclose(back(dy)[0], dy @ used.T, atol=2e-5)
    np.testing.assert_allclose(back(dy)[1], x.T @ dy, atol=2e-5)


@pytest.mark.parametrize("variant", EVERY_KIND)
def test_layers_in_a_scan_have_the_gradient_at_the_quantised_weights(variant):
    x, w = jnp.asarray(normal((8, 64))), jnp.asarray(normal((3, 64, 64), 1) / 8)

    def loss(w, quantised):
        def layer(x, w):
            return jnp.tanh(x @ (fake_quant(w, **VARIANTS[variant]) if quantised else w)), None

        return (jax.lax.scan(layer, x, w)[0] ** 2).mean()

    used = jnp.asarray(np.stack([reference(one, **VARIANTS[variant]).values for one in w]), jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda w: loss(w, True)))(w)
    want, wanted = jax.jit(jax.value_and_grad(lambda w: loss(w, False)))(used)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)  # float32, of magnitude 0.01
    assert (np.asarray(gradient) != 0).any()


@pytest.mark.parametrize("shape", [(64, 512), (256, 1024)])  # from about here on, jnp.max drops NaN on a CPU
@pytest.mark.parametrize("variant", EVERY_KIND)
def test_what_is_not_finite_stays_so_and_changes_nothing_else(variant, shape):
    w = jnp.asarray(normal(shape))
    clean, _, want = jitted(w.at[17, 300].set(0), **VARIANTS[variant])
    want = np.array(want)
    want[17, 300] = np.nan
    for broken in (jnp.nan, jnp.inf, -jnp.inf):
        hurt = w.at[17, 300].set(broken)
        q, _, got = jitted(hurt, **VARIANTS[variant])
        np.testing.assert_array_equal(got, want)
        jax.tree.map(np.testing.assert_array_equal, q, clean)
        assert np.isnan(jnp.mean((jnp.ones((2, shape[0])) @ got) ** 2))  # the guard on the loss must see it
        if variant.startswith("mxfp4"):  # whose operations compile fast one by one
            np.testing.assert_array_equal(fake_quant(hurt, **VARIANTS[variant]), want)
        if variant == "nvfp4":
            given = jitted_fake_quant(hurt, **VARIANTS[variant], amax=finite_amax(hurt), dtype=jnp.bfloat16)
            assert np.argwhere(~np.isfinite(np.asarray(given, np.float32))).tolist() == [[17, 300]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: quantize(w, "fp4"), "one of int4, nvfp4, nvfp4_2d, mxfp4, given 'fp4'"),
        (lambda w: fake_quant(w, "int8"), "given 'int8'"),
        (lambda w: quantize(w, "nvfp4"), r"blocks of 16 along axis 0, which do not divide shape \(40, 24\); the nearest size is 32"),
        (
            lambda w: quantize(w, "mxfp4", axis=1),
            r"blocks of 32 along axis 1, which do not divide shape \(40, 24\); the nearest size is 32",
        ),
        (lambda w: quantize(w, "int4", axis=-1, block=10), r"blocks of 10 along axis 1.*\(40, 24\); the nearest size is 20"),
        (lambda w: quantize(w, "nvfp4_2d", axis=1), r"blocks of 16 along axis 0.*\(40, 24\)"),
        (lambda w: quantize(w, "nvfp4", block=32), "nvfp4 has blocks of 16, given 32; only int4 takes others"),
        (lambda w: quantize(w.reshape(2, 20, 24), "nvfp4_2d"), r"takes a matrix, given shape \(2, 20, 24\)"),
        (lambda w: quantize(jnp.zeros((32, 8)), "mxfp4", rule="round"), "one of floor, even, ceil, given 'round'"),
        (lambda w: pack(jnp.zeros((4, 5), jnp.uint8)), r"pairs along axis -1, given shape \(4, 5\)"),
        (lambda w: pack(jnp.zeros((3, 4), jnp.uint8), axis=0), r"pairs along axis 0, given shape \(3, 4\)"),
    ],
)
def test_a_call_that_cannot_be_served_says_what_was_given_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(jnp.zeros((40, 24)))
    assert "\n" not in str(caught.value)


def test_every_format_has_the_block_that_it_says():
    assert {name: block_shape((512, 512), name, 0) for name in FORMATS} == {
        "int4": (128, 1),
        "nvfp4": (16, 1),
        "nvfp4_2d": (16, 16),
        "mxfp4": (32, 1),
    }
    assert block_shape((4, 512, 8), "int4", -2, 64) == (1, 64, 1)


@pytest.mark.gpu
def test_on_a_gpu_division_rounds_to_nearest():
    a, b = quotients()
    np.testing.assert_array_equal(divide(jnp.asarray(a), jnp.asarray(b)), a / b)
    np.testing.assert_array_equal(jax.jit(divide)(a, b), a / b)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", INPUTS)
def test_on_a_gpu_codes_scales_and_values_equal_the_second_implementation(name, variant):
    for axis in (0, 1):
        check(example(name, variant, axis), variant, axis, eager=True)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu_codes_are_exact_where_results_are_denormal(variant):
    check_denormal_results(variant)


@pytest.mark.gpu
def test_on_a_gpu_a_pair_of_casts_rounds_nothing_under_jit_and_fake_quant_does():
    w = jnp.asarray(normal((512, 512)))

    def on_the_grid(x) -> float:
        return float(np.isin(np.abs(np.asarray(x, np.float64)), E2M1).mean())

    assert on_the_grid(jax.jit(lambda x: x.astype(jnp.float4_e2m1fn).astype(jnp.float32))(w)) < 0.01  # if not, XLA has been mended
    assert on_the_grid(jax.jit(lambda x: e2m1_values(e2m1_codes(x)))(w)) == 1
    for variant in VARIANTS:
        np.testing.assert_array_equal(jitted_fake_quant(w, **VARIANTS[variant]), reference(w, **VARIANTS[variant]).values)
