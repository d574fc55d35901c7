"""The full recipe's product: which operands are in 4 bits, what cancels, and what is unbiased."""

from __future__ import annotations

import functools

import fp4_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.fp4 import fake_quant
from nanojax.ops.fp4_dot import SIGNS, full_recipe_dot, hadamard

B, T, D, F = 2, 32, 48, 64
dot = functools.partial(full_recipe_dot, name="q")


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape) * 3, jnp.float32) for shape in ((B, T, D), (B, T, F)))
    return x, jax.jit(fake_quant, static_argnums=1)(jnp.asarray(rng.standard_normal((D, F)), jnp.float32), "nvfp4_2d"), dy


@pytest.fixture(scope="module")
def gradients(operands):
    """gradients(seed): dx and dw."""
    x, w, dy = operands
    return jax.jit(lambda seed: jax.vjp(lambda x, w: dot(x, w, key=jax.random.key(seed)), x, w)[1](dy))


def values(x, axis: int) -> np.ndarray:
    return fp4_reference.quantize(np.asarray(x), "nvfp4", axis=axis).values


def clipped(x, axis: int) -> np.ndarray:
    """x, cut where its block's scale, itself rounded, no longer reaches: six times the scale."""
    q = fp4_reference.quantize(np.asarray(x), "nvfp4", axis=axis)
    limit = 6 * np.repeat(q.scales / q.global_scale, 16, axis=axis)
    return np.clip(np.asarray(x), -limit, limit)


def test_without_a_key_it_is_the_plain_product(operands):
    x, w, _ = operands
    np.testing.assert_array_equal(dot(x, w), jnp.dot(x, w))


def test_forward_the_activations_are_in_blocks_along_the_contraction(operands):
    x, w, _ = operands
    np.testing.assert_allclose(jax.jit(dot)(x, w, key=jax.random.key(0)), values(x, -1) @ np.asarray(w), rtol=1e-4, atol=1e-4)  # fp32 sums


def test_the_transform_is_the_one_of_the_recipe_and_orthogonal():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 32, 3)), jnp.float32)
    # Entry (i, j) of Sylvester's matrix is -1 to the number of bits that i and j share.
    sylvester = np.array([[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)])
    h = np.diag(SIGNS) @ sylvester / 4
    np.testing.assert_allclose(h @ h.T, np.eye(16), atol=1e-12)
    want = np.concatenate([h.T @ np.asarray(x[0, at : at + 16]) for at in (0, 16)])
    np.testing.assert_allclose(hadamard(x)[0], want, atol=1e-5)  # fp32
    np.testing.assert_allclose(jnp.einsum("BTI,BTO->IO", hadamard(x), hadamard(x)), jnp.einsum("BTI,BTO->IO", x, x), atol=1e-4)


def test_a_gradient_draws_and_the_same_key_draws_the_same(gradients):
    for one, again, other in zip(gradients(0), gradients(0), gradients(1), strict=True):
        np.testing.assert_array_equal(one, again)
        assert (np.asarray(one) != np.asarray(other)).mean() > 0.5


def test_the_mean_gradients_are_those_of_unrounded_dy(operands, gradients):
    """Stochastic rounding is unbiased below saturation: dx -> dy w^T, dw -> Q(H x)^T (H dy), x's own rounding being to nearest."""
    x, w, dy = operands
    n = 400
    draws = [np.stack(g) for g in zip(*(jax.device_get(gradients(seed)) for seed in range(n)), strict=True)]
    want = [clipped(dy, -1) @ np.asarray(w).T, np.einsum("BTI,BTO->IO", values(hadamard(x), 1), clipped(hadamard(dy), 1))]
    for drawn, mean in zip(draws, want, strict=True):
        error = drawn.std(axis=0) / n**0.5
        assert (np.abs(drawn.mean(axis=0) - mean) < 5 * error + 1e-3).all()  # five standard errors, and fp32 sums
        assert 0.02 < (drawn.std(axis=0).mean() / np.abs(mean).mean()) < 0.3, "as noisy as 4 bits are, and no noisier"


def test_a_gradient_that_is_not_finite_stays_so(operands):
    x, w, dy = operands
    pull = jax.jit(jax.vjp(lambda x, w: dot(x, w, key=jax.random.key(0)), x, w)[1])
    dx, dw = pull(dy.at[0, 3, 7].set(jnp.nan))
    assert jnp.isnan(dx[0, 3]).all()
    assert jnp.isnan(dw[:, 7]).all()
    assert jnp.isnan(jax.jit(dot)(x.at[1, 2, 3].set(jnp.inf), w, key=jax.random.key(0))[1, 2]).all()
    assert jnp.isfinite(dx[1]).all()
