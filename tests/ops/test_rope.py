"""RoPE: Hugging Face's convention, held to complex numbers, and the property that it exists for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.rope import rope_table, rotate


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def complex_rope(x_BTNH: np.ndarray, positions_T: np.ndarray, base: float) -> np.ndarray:
    """Pair i is the complex number x_i + j x_{i + H/2}, multiplied by exp(+j position base^(-2i/H))."""
    half = x_BTNH.shape[-1] // 2
    x = x_BTNH.astype(np.float64)
    angle = positions_T[:, None] * base ** (-2 * np.arange(half) / (2 * half))
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([z.real, z.imag], -1)


def test_one_radian_turns_east_towards_north():
    x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    y = rotate(x, rope_table(jnp.array([1]), 2, 10_000.0))
    np.testing.assert_allclose(y.ravel(), [0.5403023, 0.8414710], rtol=1e-6)  # (cos 1, +sin 1)


def test_the_second_pair_turns_slower_by_hand():
    # H = 4, base 100: pair 0 is (x0, x2) at 1 rad a position, pair 1 is (x1, x3) at 100 ** (-1/2) = 0.1; position 5 turns it by 0.5
    y = rotate(jnp.array([0.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4), rope_table(jnp.array([5]), 4, 100.0))
    np.testing.assert_allclose(y.ravel(), [0, 0.8775826, 0, 0.4794255], rtol=1e-6)


@pytest.mark.parametrize("base", [10_000.0, 100_000.0])
def test_it_multiplies_complex_numbers(base):
    x, positions = random(2, 7, 3, 16), np.arange(100, 107)
    y = rotate(jnp.asarray(x), rope_table(jnp.asarray(positions), 16, base))
    # Angles up to 106 rad in float32 are off by up to 106 * 2**-24 + the power's rounding
    np.testing.assert_allclose(y, complex_rope(x, positions, base), atol=1e-4)


def test_lengths_are_kept():
    x = random(1, 50, 2, 32)
    y = rotate(jnp.asarray(x), rope_table(jnp.arange(50), 32, 100_000.0))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)  # float32 roundings of 32 terms
    assert np.abs(np.asarray(y) - x)[:, 1:].max() > 0.1


def test_position_zero_is_left_alone():
    x = random(1, 1, 2, 8)
    np.testing.assert_array_equal(rotate(jnp.asarray(x), rope_table(jnp.array([0]), 8, 100.0)), x)


def test_scores_depend_on_the_distance_alone():
    q, k = random(16), random(16, seed=1)

    def score(t: int, s: int) -> float:
        qk = jnp.asarray(np.stack([q, k]))[None, :, None]
        rotated = rotate(qk, rope_table(jnp.array([t, s]), 16, 1000.0))
        return float(jnp.dot(rotated[0, 0, 0], rotated[0, 1, 0]))

    for t, s, shift in ((3, 0, 40), (9, 7, 500), (20, 1, 77)):
        assert score(t, s) == pytest.approx(score(t + shift, s + shift), abs=1e-3)  # float32 angles up to 520 rad: 520 * 2**-24 each
    scores = [score(t, 0) for t in range(6)]
    assert np.ptp(scores) > 0.5  # and on the distance they do depend
    assert abs(score(3, 0) - score(0, 3)) > 0.05


def test_bfloat16_inputs_at_positions_256_and_257_turn_apart():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    positions = np.array([256, 257])
    y = rotate(x, rope_table(jnp.asarray(positions), 8, 10_000.0))
    assert y.dtype == jnp.bfloat16
    want = complex_rope(np.ones((1, 2, 1, 8)), positions, 10_000.0)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=2**-8)  # one rounding of numbers up to sqrt(2) to 8 bits
    assert np.abs(want[0, 0] - want[0, 1]).max() > 0.5  # so the line above tells them apart
