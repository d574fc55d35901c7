"""The gradient of the loss that is rounded where it is made, against the one that is made first; and the head in 8 bits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nanojax.ops import xent
from nanojax.ops.fp8_dot import E5M2, fp8_head
from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
from nanojax.ops.kernels.loss_gradient import nats_and_gradient
from nanojax.ops.xent import IGNORED, total_nats

SCALE = 2.0**-15  # the smallest power of two that lets 1 into E5M2, whose largest number is 57,344


def inputs(rows: int, tokens: int, vocabulary: int, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, vocabulary, (rows, tokens))
    targets[:, 1::5] = IGNORED
    targets[0, 0], targets[-1, -1] = 0, vocabulary - 1
    return jnp.asarray(4 * rng.standard_normal((rows, tokens, vocabulary)), dtype), jnp.asarray(targets, jnp.int32)


def check(shape, softcap, *, interpret: bool, off: float) -> None:
    logits, targets = inputs(*shape)
    nats, (work, xs) = (
        jax.jit(lambda *xs: nats_and_gradient(*xs, softcap, interpret=interpret)[0])(logits, targets),
        made(logits, targets, softcap, interpret),
    )
    want, d_BTV = xent.nats_and_gradient(logits, targets, softcap)
    np.testing.assert_allclose(nats, want, rtol=2e-3, atol=2e-3)
    got = jax.jit(functools.partial(both_ways, interpret=interpret), static_argnums=(0, 2))(work, xs, E5M2)
    assert got.scale == SCALE
    rounded = (np.asarray(d_BTV, np.float32) / SCALE).astype(ml_dtypes.float8_e5m2)
    values = np.asarray(got.values)
    assert values.shape == rounded.shape
    assert (values.view(np.uint8) != rounded.view(np.uint8)).mean() < off
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (values, rounded)), rtol=0.26, atol=2**-16
    )  # a step, or the smallest number
    assert (values[np.asarray(targets) == IGNORED].astype(np.float32) == 0).all()
    np.testing.assert_array_equal(values.reshape(-1, shape[-1]).T.view(np.uint8), np.asarray(got.turned).view(np.uint8))


def made(logits, targets, softcap, interpret):
    return nats_and_gradient(logits, targets, softcap, interpret=interpret)[1]


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("shape", [(2, 64, 384), (1, 7, 48)])
def test_it_is_rounded_as_if_it_had_been_written(shape, softcap):
    check(shape, softcap, interpret=True, off=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("shape", [(2, 512, 32768), (2, 77, 4096 + 48)])
def test_the_compiled_one_agrees_on_a_gpu(shape, softcap):
    """Off by the hardware's tanh."""
    check(shape, softcap, interpret=False, off=0.02)


def test_logits_that_are_not_finite_leave_no_number():
    logits, targets = inputs(1, 64, 128)
    work, xs = made(logits.at[0, 3, 5].set(jnp.nan), targets, 15.0, True)
    for way in (functools.partial(both_ways, interpret=True), both_ways_reference):
        assert np.isnan(way(work, xs, E5M2).scale)


def head_inputs(vocabulary: int):
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 64, 32), (32, vocabulary)))
    return x, w, inputs(2, 64, vocabulary)[1]


def exact(x, w, targets, blocks):
    """(nats, dx, dw) in float64 by ml_dtypes: operands rounded, in blocks of tokens with scales of their own."""

    def rounded(x, dtype, scale=None):
        smallest = 2.0 ** np.ceil(np.log2(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)))
        return (x / (scale or smallest)).astype(np.float32).astype(dtype).astype(np.float64) * (scale or smallest)

    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    w8 = rounded(w, ml_dtypes.float8_e4m3fn, 4 * 2.0 ** np.ceil(np.log2(np.abs(w[::64]).max() / 448)))
    nats, dx, dw = 0.0, np.zeros_like(x), np.zeros_like(w)
    for block in range(blocks):
        part = x[:, block::blocks]
        x8 = rounded(part, ml_dtypes.float8_e4m3fn, 4 * 2.0 ** np.ceil(np.log2(np.abs(part[:, ::64]).max() / 448)))
        logits = np.asarray(jnp.asarray(x8 @ w8, jnp.bfloat16), np.float64)
        found, d = (
            np.asarray(y, np.float64) for y in xent.nats_and_gradient(jnp.asarray(logits, jnp.bfloat16), targets[:, block::blocks], 15.0)
        )
        d8 = (d / SCALE).astype(np.float32).astype(ml_dtypes.float8_e5m2).astype(np.float64) * SCALE
        nats += found.sum()
        dx[:, block::blocks], dw = d8 @ w8.T, dw + np.einsum("btd,btv->dv", x8, d8)
    return nats, dx, dw


def compare(head, x, w, targets) -> np.ndarray:
    """Its results with the exact ones; the gradient of the matrix."""

    @jax.jit
    def run(x, w):
        return jax.value_and_grad(lambda x, w: total_nats(x, w, targets, 15.0, 2, head=head), argnums=(0, 1))(x, w)

    nats, (dx, dw) = run(x, w)
    want_nats, want_dx, want_dw = exact(x, w, targets, 2)
    assert nats == pytest.approx(want_nats, rel=2e-3)
    for got, want in ((dx, want_dx), (dw, want_dw)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1e-2 * np.abs(want).max())
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 0.02 * np.linalg.norm(want)
    return want_dw


@pytest.mark.gpu
def test_a_head_on_a_gpu_loses_no_small_probabilities():
    """Beside the -1 of a target they are below the bits that tensor cores of 8 bits keep unless they are told to."""
    x, w, targets = head_inputs(8192)
    compare(fp8_head(both_ways, nats_and_gradient), 0.1 * x, w, targets)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_head_in_8_bits_multiplies_what_is_rounded(kernel):
    """By the kernel, and where the gradient is an array, whose scale is made of itself: 4 times as large here at most."""
    x, w, targets = head_inputs(96)
    rounded = functools.partial(both_ways, interpret=True) if kernel else both_ways_reference
    want_dw = compare(fp8_head(rounded, functools.partial(nats_and_gradient, interpret=True) if kernel else None), x, w, targets)
    plain = jax.grad(lambda w: total_nats(x, w, targets, 15.0, 2))(w)
    assert np.abs(np.asarray(plain, np.float64) - want_dw).max() > 2e-2 * np.abs(want_dw).max(), "it does round"
