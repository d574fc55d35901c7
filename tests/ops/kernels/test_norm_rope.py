"""Norm and rotation in one kernel against the functions that it is made of, gradients too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.kernels.norm_rope import norm_rope, norm_rope_reference
from nanojax.ops.rope import rope_table


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def results(f, shape, dtype):
    """(value, gradients of x and gain) of a function, with a random cotangent."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    gain = jnp.asarray(1 + 0.2 * rng.standard_normal(shape[-1]), jnp.float32)
    rope = rope_table(jnp.arange(shape[1]), shape[-1], 1e4)
    y, vjp = jax.vjp(lambda x, gain: f(x, gain, rope), x, gain)
    return y, *vjp(dy)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 7, 2, 32),
        (2, 96, 3, 16),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 8, 3, 16), (3, 128, 1, 8), (2, 96, 2, 64))),
    ],
)
def test_it_is_the_norm_and_the_rotation_forward_and_backward(shape):
    """Blocks of many tokens, of an odd number, of several to a row."""
    got = results(lambda *a: norm_rope(*a, True), shape, jnp.float32)
    for a, b in zip(got, results(norm_rope_reference, shape, jnp.float32), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))  # sums of float32 in another order


def test_in_bf16_it_rounds_where_they_round():
    got, want = (results(f, (2, 64, 2, 32), jnp.bfloat16) for f in (lambda *a: norm_rope(*a, True), norm_rope_reference))
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a.dtype == jnp.bfloat16
        assert (a != b).mean() < 0.02  # of an rsqrt that differs in its last bit
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=2e-2 * float(jnp.abs(b).max()))
    np.testing.assert_allclose(got[2], want[2], rtol=1e-2, atol=0.1)  # of 256 values rounded to 8 bits


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 256, 6, 128), (3, 77, 2, 64), (1, 2048, 10, 128)])
def test_the_compiled_kernels_agree_on_a_gpu(shape):
    got, want = (results(f, shape, jnp.bfloat16) for f in (on_gpu, norm_rope_reference))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=2e-2 * float(jnp.abs(b).max()))  # bf16


def on_gpu(x, gain, rope):
    return norm_rope(x, gain, rope)
