"""The head whose product ends in the loss's gradient, in the sum that training takes, against log_softmax of full logits."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Public from jax 0.11 on.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from nanojax.analysis.hlo import OWN_NAMES
from nanojax.ops.kernels import wgmma
from nanojax.ops.kernels.head import loss_head, serves
from nanojax.ops.xent import IGNORED, PLAIN_HEAD, total_nats

INTERPRETED = InterpretGPUParams()


def inputs(rows: int, t: int, d: int, v: int, spread: float = 2.0):
    """States, a matrix that gives logits as large as `spread`, and targets, some ignored."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, v, (rows, t))
    targets[:, 1::5] = IGNORED
    targets[0, 0], targets[-1, -1] = 0, v - 1
    x, w = rng.standard_normal((rows, t, d)), spread * d**-0.5 * rng.standard_normal((d, v))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.asarray(targets, jnp.int32)


@functools.partial(jax.jit, static_argnames=("softcap", "head", "blocks"))
def results(x, w, targets, softcap, head, blocks=2):
    """(loss, its gradients by states and head), of a scaled sum."""
    return jax.value_and_grad(lambda x, w: 0.37 * total_nats(x, w, targets, softcap, blocks, head=head), argnums=(0, 1))(x, w)


@functools.partial(jax.jit, static_argnames=("softcap",))
def naive(x, w, targets, softcap):
    def loss(x, w):
        logits = softcap * jnp.tanh(jnp.einsum("BTD,DV->BTV", x, w, precision="highest") / softcap)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return 0.37 * jnp.sum(jnp.where(targets == IGNORED, 0, -picked))

    return jax.value_and_grad(loss, argnums=(0, 1))(x.astype(jnp.float32), w.astype(jnp.float32))


def check(softcap, interpret, sizes, spread=2.0, blocks=2, loss_error=1e-5):
    """Its loss, of float32 logits, and gradients that are off by no more than by a head whose logits are written in bfloat16."""
    given = inputs(*sizes, spread)
    want, wanted = naive(*given, softcap)
    value, got = results(*given, softcap, loss_head(softcap, interpret), blocks)
    _, plain = results(*given, softcap, PLAIN_HEAD, blocks)
    np.testing.assert_allclose(value, want, rtol=loss_error)
    for a, b, c in zip(got, wanted, plain, strict=True):
        assert a.dtype == jnp.bfloat16
        error, other = (float(jnp.linalg.norm(each.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for each in (a, c))
        assert error < max(1.3 * other, 4e-3)  # two roundings to 8 bits
    ignored = np.asarray(given[2]) == IGNORED
    assert (np.asarray(got[0], np.float32)[ignored] == 0).all()


@pytest.mark.parametrize(("softcap", "spread"), [(15.0, 2.0), (40.0, 30.0)])
def test_loss_and_gradients_are_those_of_log_softmax(monkeypatch, softcap, spread):
    """Interpreted, by a processor that has several tiles; logits within the cap, and at it on both sides."""
    monkeypatch.setattr(wgmma, "PROCESSORS", 1)
    check(softcap, INTERPRETED, (2, 128, 64, 256), spread, loss_error=1e-4)  # at the cap 40 * 2^-23 of an exponent


def test_equal_logits_cost_log_v_and_pull_each_column_alike_by_hand():
    x, w = jnp.zeros((1, 128, 64), jnp.bfloat16), jnp.eye(64, 128, dtype=jnp.bfloat16)
    value, (dx, dw) = results(x, w, jnp.full((1, 128), 5, jnp.int32), 15.0, loss_head(15.0, INTERPRETED), 1)
    assert float(value) == pytest.approx(0.37 * 128 * math.log(128), rel=1e-6)
    expected = np.full(64, 0.37 / 128)
    expected[5] -= 0.37
    np.testing.assert_allclose(np.asarray(dx[0, 17], np.float32), expected, rtol=1e-2)
    assert (dw == 0).all()


def test_what_is_not_finite_makes_no_number():
    x, w, targets = inputs(1, 128, 64, 128)
    for bad in (jnp.nan, jnp.inf):
        value, _ = results(x.at[0, 3, 5].set(bad), w.at[5, 7].set(0), targets, 15.0, loss_head(15.0, INTERPRETED), 1)
        assert np.isnan(value)


def test_whole_tiles_and_a_cap_that_bounds_are_served():
    assert serves(8192, 768, 32768, 15.0)
    assert serves(128, 64, 128, 40.0)
    assert not serves(128, 64, 128, None)
    assert not serves(128, 64, 128, 41.0)  # exp(-2 * 41) is no normal float32
    assert not serves(64, 64, 128, 15.0)
    assert not serves(128, 64, 50257, 15.0)


def test_its_product_is_one_whose_flops_are_counted(monkeypatch):
    taken = []

    def multiply(product, *arguments, **how):
        taken.append(product.name)
        return wgmma.multiply_reference(product, *arguments, **how)

    monkeypatch.setattr(wgmma, "multiply", multiply)
    results(*inputs(1, 128, 64, 128), 14.0, loss_head(14.0, INTERPRETED), 1)  # of a cap that no other test has traced
    assert set(taken) == {"head_exponentials"} < set(OWN_NAMES)


def confident(softcap: float, z: float):
    """States, a matrix and targets whose logits before the cap are z, others' being of size 1."""
    x, w, targets = inputs(1, 128, 64, 128, spread=1.0)
    targets = jnp.abs(targets)
    of_target = w.T[targets].astype(jnp.float32)
    now = jnp.sum(x.astype(jnp.float32) * of_target, axis=-1, keepdims=True)
    x = x + (z - now) * of_target / jnp.sum(of_target**2, axis=-1, keepdims=True)
    return x.astype(jnp.bfloat16), w, targets


def check_confident(softcap, z, interpret):
    """Token by token: what e and s of a target share must cancel."""
    x, w, targets = confident(softcap, z)
    want, (dx, _) = naive(x, w, targets, softcap)
    value, (got, _) = results(x, w, targets, softcap, loss_head(softcap, interpret), 1)
    assert value >= 0
    np.testing.assert_allclose(value, want, rtol=0.1)
    off = np.linalg.norm(np.asarray(got, np.float32) - dx, axis=-1) / np.linalg.norm(dx, axis=-1)
    assert np.median(off) < 0.02
    assert (np.sum(np.asarray(got, np.float32) * dx, axis=-1) > 0).all()


def test_tokens_that_are_all_but_certain_are_pulled_the_right_way():
    check_confident(15.0, 14.0, INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize(("softcap", "z"), [(15.0, 14.0), (15.0, 25.0)])
def test_tokens_that_are_all_but_certain_are_pulled_the_right_way_on_a_gpu(softcap, z):
    check_confident(softcap, z, None)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2, 128, 64, 384), (3, 1024, 320, 4224), (4, 2048, 768, 32768), (2, 2048, 1280, 32768)])
def test_the_compiled_one_agrees_on_a_gpu(sizes):
    """Fewer tiles than processors, and many more; the hardware's tanh."""
    check(15.0, None, sizes, loss_error=1e-4)
