"""Rounding to 8 bits both ways against rounding and turning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.fp8_dot import SWIGLU, SWIGLU_BACKWARD
from nanojax.ops.kernels.both_ways import GIVEN, both_ways, both_ways_reference, made
from nanojax.ops.kernels.swiglu import swiglu_reference

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def values(shape) -> jax.Array:
    """Of many magnitudes, some beyond both types and some below their smallest steps."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape), jnp.bfloat16)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(2, 128, 384), (3, 2, 80), (1, 1, 7)])
def test_rows_and_columns_are_the_same_numbers_rounded_once(shape, dtype):
    """Several squares, squares that are none, one that is a row."""
    scale = jnp.float32(0.25)
    x = values(shape)
    got, want = both_ways(GIVEN, (x,), scale, dtype, interpret=True), both_ways_reference(GIVEN, (x,), scale, dtype)
    for a, b in zip(got, want, strict=True):
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
    (both, dh), scale = feed_forward_inputs(shape), jnp.float32(2**-6)
    h, vjp = jax.vjp(swiglu_reference, both.astype(jnp.float32))
    for work, xs, want, dtype in ((SWIGLU, (both,), h, E4M3), (SWIGLU_BACKWARD, (both, dh), vjp(dh.astype(jnp.float32))[0], E5M2)):
        np.testing.assert_allclose(jnp.concatenate(made(work, xs), axis=-1).astype(jnp.float32), want, rtol=2**-8, atol=1e-6)
        got, written = both_ways(work, xs, scale, dtype, interpret=True), both_ways_reference(work, xs, scale, dtype)
        for a, b in zip(got, written, strict=True):
            assert (a.dtype, a.shape) == (dtype, b.shape)
            assert (a.view(jnp.uint8) != b.view(jnp.uint8)).mean() < 2e-3  # where bf16 lies between two, a last bit of float32 decides
        np.testing.assert_array_equal(got[0].reshape(-1, want.shape[-1]).T.view(jnp.uint8), got[1].view(jnp.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(2, 2048, 1280), (2, 77, 3584), (1, 77, 48)])
def test_the_compiled_rounding_agrees_to_the_bit_on_a_gpu(shape, dtype):
    scale = jnp.float32(0.25)
    got, want = (jax.jit(f, static_argnums=(0, 3))(GIVEN, (values(shape),), scale, dtype) for f in (both_ways, both_ways_reference))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (a, b)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 3584), (2, 77, 2048), (1, 77, 48)])
def test_the_compiled_swiglu_is_rounded_alike_on_a_gpu(shape):
    """The reference runs operation by operation: compiled, XLA would leave out that what is made is bf16 first."""
    (both, dh), scale = feed_forward_inputs(shape), jnp.float32(2**-6)
    for work, xs, dtype in ((SWIGLU, (both,), E4M3), (SWIGLU_BACKWARD, (both, dh), E5M2)):
        got, want = jax.jit(both_ways, static_argnums=(0, 3))(work, xs, scale, dtype), both_ways_reference(work, xs, scale, dtype)
        for a, b in zip(got, want, strict=True):
            assert (np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8)).mean() < 2e-3
