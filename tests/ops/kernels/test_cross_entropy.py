"""The loss's kernel against log_softmax and its derivative, and in the sum that training takes."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.kernels.cross_entropy import cross_entropy
from nanojax.ops.xent import IGNORED


def inputs(tokens: int, vocabulary: int, dtype, scale: float = 4.0):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, vocabulary, tokens)
    targets[1::5] = IGNORED
    targets[0], targets[-1] = 0, vocabulary - 1
    return jnp.asarray(scale * rng.standard_normal((tokens, vocabulary)), dtype), jnp.asarray(targets, jnp.int32)


@functools.partial(jax.jit, static_argnums=2)
def naive(logits, targets, softcap):
    """(nats, gradient of their sum) in float32 by jax's own derivative."""

    def nats(logits):
        capped = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        picked = jnp.take_along_axis(jax.nn.log_softmax(capped), jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return jnp.where(targets == IGNORED, 0, -picked)

    logits = logits.astype(jnp.float32)
    return nats(logits), jax.grad(lambda logits: nats(logits).sum())(logits)


@pytest.mark.parametrize("vocabulary", [64, 100, 9000, 40000])
@pytest.mark.parametrize("softcap", [None, 15.0, 200.0])
def test_it_is_log_softmax_and_its_gradient(vocabulary, softcap):
    """Vocabularies that are read in one piece or several, powers of two or not; caps that bound the exponent and one that does not."""
    logits, targets = inputs(11, vocabulary, jnp.float32)
    got, want = cross_entropy(logits, targets, softcap, interpret=True), naive(logits, targets, softcap)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)  # float32 sums of 9,000 terms
    np.testing.assert_allclose(got[1], want[1], atol=2e-6)
    assert (np.asarray(got[1])[np.asarray(targets) == IGNORED] == 0).all()


def test_large_logits_do_not_overflow():
    logits, targets = inputs(4, 64, jnp.float32, scale=1e4)
    got, want = cross_entropy(logits, targets, None, interpret=True), naive(logits, targets, None)
    assert np.isfinite(got[0]).all()
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_equal_logits_cost_log_v_by_hand():
    nats, d = cross_entropy(jnp.zeros((2, 8)), jnp.asarray([3, IGNORED]), None, interpret=True)
    np.testing.assert_allclose(nats, [math.log(8), 0], atol=1e-6)
    np.testing.assert_allclose(d[0], [0.125, 0.125, 0.125, -0.875, 0.125, 0.125, 0.125, 0.125], atol=1e-6)
    assert (d[1] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("vocabulary", "softcap"), [(32768, 15.0), (50257, None), (1000, 15.0), (8192, None)])
def test_the_compiled_loss_agrees_on_a_gpu(vocabulary, softcap):
    logits, targets = inputs(513, vocabulary, jnp.bfloat16)
    want = naive(logits, targets, softcap)
    got = jax.jit(functools.partial(cross_entropy, softcap=softcap))(logits, targets)
    np.testing.assert_allclose(got[0], want[0], atol=2e-3)  # the hardware's tanh, of a cap of 15
    error = np.linalg.norm(np.asarray(got[1], np.float32) - want[1]) / np.linalg.norm(want[1])
    assert error < 4e-3  # rounded to 8 bits
