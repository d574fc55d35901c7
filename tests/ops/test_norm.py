"""RMSNorm: the formula, by hand and in float64, and what it does to small types and to nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nanojax.ops.norm import rms_norm


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_three_and_four_by_hand():
    # rms = sqrt((9 + 16) / 2) = 3.5355339; eps moves the seventh digit
    np.testing.assert_allclose(rms_norm(jnp.array([3.0, 4.0])), [0.8485281, 1.1313708], rtol=1e-6)
    np.testing.assert_allclose(rms_norm(jnp.array([3.0, 4.0]), jnp.array([2.0, -1.0])), [1.6970563, -1.1313708], rtol=1e-6)


def test_eps_stands_under_the_root_beside_the_mean_square():
    np.testing.assert_allclose(rms_norm(jnp.array([1.0, 1.0]), eps=3.0), [0.5, 0.5], rtol=1e-6)


def test_it_equals_the_formula_in_float64_on_every_rank():
    for shape in ((8,), (3, 8), (2, 3, 5, 8)):
        x, gain = random(*shape), random(8, seed=1)
        want = gain * x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(gain)), want, rtol=2e-6)  # a handful of float32 roundings


def test_bfloat16_goes_in_and_out_and_float32_lies_between():
    x = jnp.asarray(10 * random(2, 4096), jnp.bfloat16)
    gain = jnp.asarray(1 + random(4096, seed=1) / 4)
    y = rms_norm(x, gain)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    want = np.asarray(gain) * exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-6)
    # One rounding to 8 bits, at the end: half a unit in the last place. A second one on the way would show.
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=1.001 * 2**-8)


def test_the_gradient_is_orthogonal_to_the_input_because_scale_does_not_matter():
    x, r = jnp.asarray(random(16)), jnp.asarray(random(16, seed=1))
    g = jax.jit(jax.grad(lambda x: jnp.dot(rms_norm(x, eps=0.0), r)))(x)
    assert abs(float(jnp.dot(g, x))) < 1e-5 * float(jnp.linalg.norm(g) * jnp.linalg.norm(x))  # float32 sums of 16 terms
    assert float(jnp.linalg.norm(g)) > 0.1


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient():
    zeros, gain = jnp.zeros((2, 4)), jnp.full(4, 2.0)
    y, g = rms_norm(zeros, gain), jax.jit(jax.grad(lambda x: rms_norm(x, gain).sum()))(zeros)
    assert (y == 0).all()
    np.testing.assert_allclose(g, 2000.0, rtol=1e-6)  # gain / sqrt(eps)
