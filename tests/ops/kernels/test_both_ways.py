"""Rounding to 8 bits both ways against rounding and turning."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.fp8_dot import SWIGLU, SWIGLU_BACKWARD
from nanojax.ops.kernels import both_ways as both_ways_module
from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
from nanojax.ops.kernels.swiglu import swiglu_reference
from nanojax.ops.kernels.work import GIVEN, NORMED

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def values(shape) -> jax.Array:
    """Of many magnitudes, beside the largest of which some are below the smallest steps of both types."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape), jnp.bfloat16)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(2, 128, 384), (3, 2, 80), (1, 1, 7)])
def test_rows_and_columns_are_the_same_numbers_rounded_once(shape, dtype):
    """Several squares, squares that are none, one that is a row."""
    x = values(shape)
    got, want = both_ways(GIVEN, (x,), dtype, interpret=True), both_ways_reference(GIVEN, (x,), dtype)
    assert got[2] == want[2]
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a.view(jnp.uint8), b.view(jnp.uint8))
    np.testing.assert_array_equal(got[0].reshape(-1, shape[-1]).T.view(jnp.uint8), got[1].view(jnp.uint8))


def feed_forward_inputs(shape):
    """Gates and ups side by side, and the gradient of what they make."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((*shape[:-1], n * shape[-1])), jnp.bfloat16) for n in (2, 1))


@pytest.mark.parametrize("shape", [(2, 64, 192), (3, 2, 40), (1, 1, 7)])
def test_what_swiglu_makes_is_rounded_as_if_it_had_been_written(shape):
    """Both parts of its gradient too, beside each other, and turned one below the other."""
    both, dh = feed_forward_inputs(shape)
    h, vjp = jax.vjp(swiglu_reference, both.astype(jnp.float32))
    for work, xs, want, dtype in ((SWIGLU, (both,), h, E4M3), (SWIGLU_BACKWARD, (both, dh), vjp(dh.astype(jnp.float32))[0], E5M2)):
        np.testing.assert_allclose(jnp.concatenate(work.made(xs)[0], axis=-1).astype(jnp.float32), want, rtol=2**-8, atol=1e-6)
        got, written = INTERPRETED(work, xs, dtype), both_ways_reference(work, xs, dtype)
        assert got[2] == written[2]
        for a, b in zip(got[:2], written[:2], strict=True):
            assert (a.dtype, a.shape) == (dtype, b.shape)
            assert (a.view(jnp.uint8) != b.view(jnp.uint8)).mean() < 2e-3  # where bf16 lies between two, a last bit of float32 decides
        np.testing.assert_array_equal(got[0].reshape(-1, want.shape[-1]).T.view(jnp.uint8), got[1].view(jnp.uint8))


def lone(shape, place, value) -> jax.Array:
    """Ones, and one other number."""
    return jnp.ones(shape, jnp.bfloat16).at[place].set(value)


# Of 256 tokens of a row the first and every 64th after it are looked at first.
SCALES = {
    "first fits": (lone((2, 256, 80), (0, 0, 0), 448.0), 4.0),
    "first fits, in the second row": (lone((2, 256, 80), (1, 128, 0), 448.0), 4.0),
    "one not seen fits too": (lone((2, 256, 80), (1, 63, 79), 4 * 448 / 256), 4 * 2.0**-8),
    "one not seen is larger": (lone((2, 256, 80), (1, 63, 79), 4 * 448 / 256 + 1 / 16), 2.0**-5),
    "one is much larger": (lone((2, 256, 80), (0, 255, 3), -448 * 2.0**20), 2.0**20),
    "none seen but zeros": (jnp.zeros((2, 256, 80), jnp.bfloat16).at[1, 5, 7].set(448 * 2.0**-30), 2.0**-30),
    "zeros": (jnp.zeros((2, 256, 80), jnp.bfloat16), 4 * 2.0**-126),
    "not a number, seen": (lone((2, 256, 80), (0, 64, 5), jnp.nan), jnp.nan),
    "not a number, not seen": (lone((2, 256, 80), (0, 65, 5), jnp.nan), jnp.nan),
    "infinite, not seen": (lone((2, 256, 80), (1, 65, 5), -jnp.inf), jnp.nan),
}


def compiled(**how):
    return jax.jit(functools.partial(both_ways, **how), static_argnums=(0, 2))


INTERPRETED = compiled(interpret=True)  # once for all that have a shape


def check_scale(case: str, kernel) -> None:
    """The scale by hand, and the numbers of the reference, whose largest is never cut off."""
    x, scale = SCALES[case]
    got, want = kernel(GIVEN, (x,), E4M3), both_ways_reference(GIVEN, (x,), E4M3)
    np.testing.assert_array_equal(got[2], scale)
    np.testing.assert_array_equal(want[2], scale)
    if not np.isnan(scale):
        for a, b in zip(got[:2], want[:2], strict=True):
            np.testing.assert_array_equal(*(np.asarray(y).view(np.uint8) for y in (a, b)))
        largest = np.abs(np.asarray(x, np.float32)).max()
        assert np.abs(np.asarray(got[0], np.float32)).max() * scale == pytest.approx(largest, rel=2**-4)


@pytest.mark.parametrize("case", SCALES)
def test_a_scale_is_tried_and_what_did_not_fit_is_rounded_again(case):
    check_scale(case, INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SCALES)
def test_what_did_not_fit_is_rounded_again_on_a_gpu(case):
    check_scale(case, compiled())


def test_an_instance_rounds_several_squares_again(monkeypatch):
    """Where there are more squares than instances, odd counts of them too."""
    x = values((1, 96, 5 * 256)).at[0, 1].multiply(2**20)  # 3 by 10 squares, and a token that is not seen first
    want = both_ways_reference(GIVEN, (x,), E4M3)
    for programs in (15, 7):
        monkeypatch.setattr(both_ways_module, "PROGRAMS", programs)
        got = both_ways(GIVEN, (x,), E4M3, interpret=True)
        assert got[2] == want[2]
        for a, b in zip(got[:2], want[:2], strict=True):
            np.testing.assert_array_equal(a.view(jnp.uint8), b.view(jnp.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(2, 2048, 1280), (2, 77, 3584), (1, 77, 48)])
def test_the_compiled_rounding_agrees_to_the_bit_on_a_gpu(shape, dtype):
    got, want = (jax.jit(f, static_argnums=(0, 2))(GIVEN, (values(shape),), dtype) for f in (both_ways, both_ways_reference))
    assert got[2] == want[2]
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (a, b)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 3584), (2, 77, 2048), (1, 77, 48)])
def test_the_compiled_swiglu_is_rounded_alike_on_a_gpu(shape):
    """The reference runs operation by operation: compiled, XLA would leave out that what is made is bf16 first."""
    both, dh = feed_forward_inputs(shape)
    for work, xs, dtype in ((SWIGLU, (both,), E4M3), (SWIGLU_BACKWARD, (both, dh), E5M2)):
        got, want = compiled()(work, xs, dtype), both_ways_reference(work, xs, dtype)
        assert got[2] == want[2]
        for a, b in zip(got[:2], want[:2], strict=True):
            assert (np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8)).mean() < 2e-3


def normed_inputs(shape):
    rng = np.random.default_rng(0)
    draws = (rng.standard_normal(shape), 0.5 + rng.random(shape[:-1]), 1 + 0.2 * rng.standard_normal(shape[-1]))
    return tuple(jnp.asarray(x, dtype) for x, dtype in zip(draws, (jnp.bfloat16, jnp.float32, jnp.float32), strict=True))


def check_norm(shape, kernel) -> None:
    """Against the norm in float64, rounded to bf16 and then to 8 bits."""
    x, over, gain = normed_inputs(shape)
    exact = np.asarray(x, np.float64) * np.asarray(over, np.float64)[..., None] * np.asarray(gain, np.float64)
    got, want = kernel(NORMED, (x, over, gain), E4M3), both_ways_reference(GIVEN, (jnp.asarray(exact, jnp.bfloat16),), E4M3)
    assert got.scale == want.scale
    for a, b in ((got.values, want.values), (got.turned, want.turned)):
        assert (np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8)).mean() < 2e-3  # a last bit of float32 decides


@pytest.mark.parametrize("shape", [(2, 64, 192), (3, 2, 40), (1, 1, 7)])
def test_a_norm_is_rounded_as_if_it_had_been_written(shape):
    check_norm(shape, INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 1280), (2, 77, 88)])
def test_the_compiled_norm_is_rounded_alike_on_a_gpu(shape):
    check_norm(shape, compiled())
