"""SwiGLU's kernel against the function written out, gradients too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.kernels.swiglu import swiglu, swiglu_reference


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def results(f, shape, dtype):
    """(value, gradient) of a function, with a random cotangent."""
    rng = np.random.default_rng(0)
    both = jnp.asarray(3 * rng.standard_normal(shape), dtype)
    y, vjp = jax.vjp(f, both)
    return y, *vjp(jnp.asarray(rng.standard_normal(y.shape), dtype))


@pytest.mark.parametrize("shape", [(2, 8, 64), (1, 7, 24), (3, 64, 2048), (2, 2, 2 * 1536)])
def test_it_is_silu_of_gates_times_ups_forward_and_backward(shape):
    """One block and several, of tokens and of columns; an odd number of tokens, a feed-forward that is no power of two."""
    got, want = results(lambda x: swiglu(x, True), shape, jnp.float32), results(swiglu_reference, shape, jnp.float32)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max()))


def test_by_hand_at_a_gate_of_zero():
    y, vjp = jax.vjp(lambda x: swiglu(x, True), jnp.asarray([[[0.0, 2.0]]]))
    assert y.tolist() == [[[0.0]]]
    assert vjp(jnp.ones_like(y))[0].tolist() == [[[1.0, 0.0]]]  # 2 * silu'(0) and silu(0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 256, 4096), (3, 77, 2 * 3456), (1, 64, 2 * 88)])
def test_the_compiled_swiglu_agrees_on_a_gpu(shape):
    got, want = (results(f, shape, d) for f, d in ((compiled, jnp.bfloat16), (swiglu_reference, jnp.float32)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=1e-2 * float(jnp.abs(b).max()))  # bf16 inputs and results


def compiled(both):
    return swiglu(both)
