"""The norm's kernel against the function that it is made of, gradients too, that of the stream beside it among them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.kernels.norm import add_and_norm, add_and_norm_later, add_and_norm_reference
from nanojax.ops.norm import Normed, written


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def results(f, shape, dtype, alone=False):
    """(stream, normed, gradients of x, y if there is one, and gain) of a function, with random cotangents of both results."""
    rng = np.random.default_rng(0)
    x, y, dsum, dh = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))
    gain = jnp.asarray(1 + 0.2 * rng.standard_normal(shape[-1]), jnp.float32)
    (total, h), vjp = jax.vjp(f, x, None if alone else y, gain)
    dx, dy, dgain = vjp((dsum, dh))
    return total, h, dx, *(() if alone else (dy,)), dgain


def at_once(x, y, gain, interpret=True):
    return add_and_norm(x, y, gain, interpret)


def later(x, y, gain, interpret=True):
    """Written by what reads it."""
    total, normed = add_and_norm_later(x, y, gain, interpret)
    assert isinstance(normed, Normed)
    assert (normed.shape, normed.dtype) == (x.shape, x.dtype)
    return total, written(normed)


@pytest.mark.parametrize("shape", [(1, 7, 32), (2, 64, 28)])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("way", [at_once, later])
def test_it_is_the_norm_of_a_sum_beside_it_forward_and_backward(way, shape, alone):
    """Columns of one and of several powers of two; tokens for many turns, and of an odd number; something to add, and nothing."""
    got = results(way, shape, jnp.float32, alone)
    for a, b in zip(got, results(add_and_norm_reference, shape, jnp.float32, alone), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))  # sums of float32 in another order


@pytest.mark.parametrize("way", [at_once, later])
def test_in_bf16_it_rounds_where_the_norm_does(way):
    got, want = (results(f, (2, 64, 48), jnp.bfloat16) for f in (way, add_and_norm_reference))
    np.testing.assert_array_equal(got[0], want[0])
    for a, b in zip(got[1:4], want[1:4], strict=True):
        assert a.dtype == jnp.bfloat16
        assert (a != b).mean() < 0.02  # of an rsqrt that differs in its last bit
    np.testing.assert_allclose(got[4], want[4], rtol=1e-2, atol=0.1)  # of 128 values rounded to 8 bits


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 256, 768), (3, 77, 1280), (1, 2048, 88)])
def test_the_compiled_norm_agrees_on_a_gpu(shape):
    want = results(add_and_norm_reference, shape, jnp.bfloat16)
    for got in (results(functools.partial(way, interpret=False), shape, jnp.bfloat16) for way in (at_once, later)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=2e-2 * float(jnp.abs(b).max()))  # bf16
