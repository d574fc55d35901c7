"""The 8-bit product: what is rounded to which type, forward and backward, and what becomes of numbers that fit no 8 bits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nanojax.ops.fp8_dot import E4M3, E5M2, fp8_dot, fp8_products, to_fp8
from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
from nanojax.ops.kernels.swiglu import swiglu
from nanojax.ops.products import multiply

B, T, D, F = 2, 16, 32, 48
KEY = jax.random.key(0)
dot = functools.partial(fp8_dot, name="q")


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal(shape) * 3 for shape in ((B, T, D), (D, F), (B, T, F))]
    return [jnp.asarray(x, jnp.float32) for x in draw]


def smallest_scale(x, dtype) -> float:
    return 2.0 ** np.ceil(np.log2(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)))


def rounded(x, dtype) -> np.ndarray:
    """By ml_dtypes, in float64: a matrix by the smallest scale, activations and gradients [B, T, I] by 4 times that of the first and every
    64th token if that is larger.
    """
    x = np.asarray(x, np.float64)
    scale = smallest_scale(x, dtype)
    if x.ndim == 3:
        scale = max(scale, 4 * smallest_scale(x[:, ::64], dtype))
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


def test_without_a_key_it_is_the_plain_product(operands):
    x, w, _ = operands
    np.testing.assert_array_equal(dot(x, w), jnp.dot(x, w))


def test_both_operands_of_all_three_products_are_rounded(operands):
    x, w, dy = operands
    y, vjp = jax.vjp(jax.jit(lambda x, w: dot(x, w, key=KEY)), x, w)
    dx, dw = vjp(dy)
    x8, w8, dy8 = rounded(x, ml_dtypes.float8_e4m3fn), rounded(w, ml_dtypes.float8_e4m3fn), rounded(dy, ml_dtypes.float8_e5m2)
    for got, want in ((y, x8 @ w8), (dx, dy8 @ w8.T), (dw, np.einsum("BTI,BTO->IO", x8, dy8))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())  # float32 sums, in another order
    assert np.abs(y - np.asarray(x, np.float64) @ np.asarray(w, np.float64)).max() > 1e-2, "it does round"


def test_results_have_the_types_of_what_they_belong_to(operands):
    x, w, dy = (a.astype(jnp.bfloat16) for a in operands)
    y, vjp = jax.vjp(lambda x, w: dot(x, w, key=KEY), x, w)
    assert [a.dtype for a in (y, *vjp(dy))] == [jnp.bfloat16] * 3
    y, vjp = jax.vjp(lambda x, w: dot(x, w, key=KEY), x, w.astype(jnp.float32))
    assert vjp(dy)[1].dtype == jnp.float32


def test_values_by_hand():
    """The largest number of E4M3 is 448, that of E5M2 57344; from 2 to 4 its steps are halves, and of E4M3 from 256 to 448 32."""
    q = to_fp8(jnp.array([2.2, -1.1, 0.0]), E4M3)  # 2.2 / 448 lies between 2 ** -8 and 2 ** -7
    assert (q.values.tolist(), float(q.scale)) == ([288, -144, 0], 2**-7)
    q = to_fp8(jnp.array([3.5, -3.5]), E4M3)  # 448 / 128: nothing to spare
    assert (q.values.tolist(), float(q.scale)) == ([448, -448], 2**-7)
    assert to_fp8(jnp.array([57344.0, 3.3]), E5M2).values.tolist() == [57344, 3.5]


def test_matrices_side_by_side_share_a_scale_and_are_multiplied_as_one(operands):
    x, w, dy = operands
    products = fp8_products(both_ways_reference)
    ys, kept = products.forward(x, (w[:, :16], 8 * w[:, 16:]))
    (y,), _ = products.forward(x, (jnp.concatenate([w[:, :16], 8 * w[:, 16:]], axis=1),))
    np.testing.assert_array_equal(jnp.concatenate(ys, axis=-1), y)
    dx, dw = products.backward(kept, dy)
    w8, dy8 = rounded(jnp.concatenate([w[:, :16], 8 * w[:, 16:]], axis=1), ml_dtypes.float8_e4m3fn), rounded(dy, ml_dtypes.float8_e5m2)
    np.testing.assert_allclose(dx, dy8 @ w8.T, rtol=1e-4, atol=1e-4 * np.abs(dx).max())
    np.testing.assert_allclose(
        dw, np.einsum("BTI,BTO->IO", rounded(x, ml_dtypes.float8_e4m3fn), dy8), rtol=1e-4, atol=1e-4 * np.abs(dw).max()
    )


def test_a_kernel_may_round_what_is_multiplied(operands):
    """Interpreted; values are those of the reference, and so is all that follows."""
    x, w, dy = operands
    kernel = functools.partial(both_ways, interpret=True)
    for a, b in zip(
        *(jax.tree.leaves(jax.vjp(lambda x, w, r=r: dot(x, w, key=KEY, rounded=r), x, w)[1](dy)) for r in (kernel, both_ways_reference)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_feed_forward_is_its_products_and_swiglu_apart():
    rng = np.random.default_rng(0)
    x, w_both, w_down = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((B, T, D), (D, 2 * F), (F, D)))
    products = fp8_products(functools.partial(both_ways, interpret=True))
    plain = fp8_products(both_ways_reference)

    def apart(x, w_both, w_down):
        return multiply(swiglu(multiply(x, w_both, plain), True), w_down, plain)

    def results(f, x, w_both, w_down, dy):
        y, vjp = jax.vjp(f, x, w_both, w_down)
        return y, *vjp(dy)

    dy = jnp.asarray(rng.standard_normal((B, T, D)), jnp.bfloat16)
    got, want = (jax.jit(results, static_argnums=0)(f, x, w_both, w_down, dy) for f in (products.feed_forward, apart))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        assert (a != b).mean() < 0.01  # where bf16 lies between two in 8 bits, a last bit of float32 decides
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.02 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_any_finite_tensor_stays_finite(dtype):
    for x in (np.zeros(4), [3e-36, 0.0], [3e38, -1.0], np.random.default_rng(1).standard_normal(999) * 1e5):
        q = to_fp8(jnp.asarray(x, jnp.float32), dtype)
        back = np.asarray(q.values, np.float32) * np.asarray(q.scale)
        assert np.isfinite(back).all()
        assert np.abs(back).max() == pytest.approx(np.abs(x).max(), rel=0.13)  # half a step of E5M2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(operands, bad):
    """In a large array too, where XLA's maximum passes over NaN on a CPU."""
    x, w, _ = operands
    assert np.isnan(dot(x.at[0, 3, 5].set(bad), w, key=KEY)).all()
    large = jnp.ones((2, 129, D)).at[1, 1, D - 1].set(bad)
    assert np.isnan(dot(large, w, key=KEY)).all()
    assert np.isnan(to_fp8(large, E4M3).scale)
    assert np.isnan(dot(x, w.at[3, 5].set(bad), key=KEY)).all()


def test_numbers_far_below_the_largest_are_rounded_by_the_scale_that_was_tried():
    """Below the smallest normal number a scale decides what is left: those of a tensor that spans 2 ** 24, forward and back."""
    rng = np.random.default_rng(0)

    def wide(shape) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-24, 1, shape), jnp.float32)

    @jax.jit
    def both(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: dot(x, w, key=KEY), x, w)
        return y, *vjp(dy)

    x, w, dy = wide((2, 65, D)), wide((D, F)), wide((2, 65, F))
    y, dx, dw = both(x, w, dy)
    x8, w8, dy8 = rounded(x, ml_dtypes.float8_e4m3fn), rounded(w, ml_dtypes.float8_e4m3fn), rounded(dy, ml_dtypes.float8_e5m2)
    for got, want in ((y, x8 @ w8), (dx, dy8 @ w8.T), (dw, np.einsum("BTI,BTO->IO", x8, dy8))):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    one = dot(jnp.zeros((1, 1, D)).at[0, 0, :2].set(jnp.asarray([448.0, 4 * 2.0**-10])), jnp.eye(D), key=KEY)
    assert one[0, 0, :2].tolist() == [448, 0]  # by the smallest scale it were half a smallest number more, and stayed
