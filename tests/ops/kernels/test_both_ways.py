"""Rounding to 8 bits both ways against rounding and turning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference

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
    got, want = both_ways(values(shape), scale, dtype, interpret=True), both_ways_reference(values(shape), scale, dtype)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a.view(jnp.uint8), b.view(jnp.uint8))
    np.testing.assert_array_equal(got[0].reshape(-1, shape[-1]).T.view(jnp.uint8), got[1].view(jnp.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(2, 2048, 1280), (2, 77, 3584), (1, 77, 48)])
def test_the_compiled_rounding_agrees_to_the_bit_on_a_gpu(shape, dtype):
    scale = jnp.float32(0.25)
    got, want = (jax.jit(f, static_argnums=2)(values(shape), scale, dtype) for f in (compiled, both_ways_reference))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (a, b)))


def compiled(x, scale, dtype):
    return both_ways(x, scale, dtype)
