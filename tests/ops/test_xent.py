"""Blockwise cross entropy against log_softmax, its gradients, what is ignored, and the memory that it exists to save."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.xent import IGNORED, token_nats, total_nats

B, T, D, V = 2, 8, 16, 40


def inputs(dtype=jnp.float32, ignored: bool = True):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, T))
    if ignored:
        targets[0, 2:5] = targets[1, 7] = IGNORED
    x, w = rng.standard_normal((B, T, D)), rng.standard_normal((D, V)) / 2
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(targets, jnp.int32)


def naive(x, w, targets, softcap=None):
    """Nats of every token through full logits and log_softmax."""
    logits = jnp.einsum("BTD,DV->BTV", x.astype(jnp.float32), w.astype(jnp.float32))
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets == IGNORED, 0, -picked)


@functools.partial(jax.jit, static_argnames=("softcap", "blocks"))
def value_and_gradients(x, w, targets, softcap, blocks):
    return jax.value_and_grad(lambda x, w: 0.37 * total_nats(x, w, targets, softcap, blocks), argnums=(0, 1))(x, w)


@functools.partial(jax.jit, static_argnames=("softcap",))
def naive_value_and_gradients(x, w, targets, softcap=None):
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jax.value_and_grad(lambda x, w: 0.37 * naive(x, w, targets, softcap).sum(), argnums=(0, 1))(x, w)


@pytest.mark.parametrize(("softcap", "blocks"), [(None, 2), (3.0, 1), (3.0, 2), (3.0, 4)])
def test_nats_of_tokens_and_their_sum_equal_log_softmax(softcap, blocks):
    x, w, targets = inputs()
    want = jax.jit(naive, static_argnums=3)(x, w, targets, softcap)
    # float32 logits of magnitude 8 and a sum over 40 of their exponentials
    nats = jax.jit(token_nats, static_argnames=("softcap", "blocks"))(x, w, targets, softcap=softcap, blocks=blocks)
    np.testing.assert_allclose(nats, want, atol=5e-6)
    np.testing.assert_allclose(value_and_gradients(x, w, targets, softcap, blocks)[0], 0.37 * want.sum(), rtol=1e-6)


@pytest.mark.parametrize(("softcap", "blocks"), [(None, 2), (3.0, 1), (3.0, 2), (3.0, 4)])
def test_gradients_of_a_scaled_sum_equal_those_through_log_softmax(softcap, blocks):
    x, w, targets = inputs()
    value, got = value_and_gradients(x, w, targets, softcap, blocks)
    want_value, want = naive_value_and_gradients(x, w, targets, softcap)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)  # float32 sums of 40 (x) and 16 (w) terms below 2


def test_nats_of_tokens_differentiate_like_their_sum():
    x, w, targets = inputs()
    one = jax.jit(jax.grad(lambda x, w: 0.37 * token_nats(x, w, targets, softcap=3.0, blocks=2).sum(), argnums=(0, 1)))(x, w)
    _, other = value_and_gradients(x, w, targets, 3.0, 2)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)  # as above


def test_zero_logits_cost_log_v_each_by_hand():
    _, w, targets = inputs(ignored=False)
    value, _ = value_and_gradients(jnp.zeros((B, T, D)), w, targets, None, 2)
    assert float(value) == pytest.approx(0.37 * 16 * math.log(40), rel=1e-6)


def test_an_ignored_target_counts_nothing_and_pulls_at_nothing():
    x, w, targets = inputs()
    value, (dx, _) = value_and_gradients(x, w, targets, None, 2)
    hidden = np.asarray(targets) == IGNORED
    assert (np.asarray(dx)[hidden] == 0).all()
    assert (np.abs(np.asarray(dx)[~hidden]).max(-1) > 0).all()
    moved = jnp.where((targets == IGNORED)[..., None], 100.0, x)
    assert float(value_and_gradients(moved, w, targets, None, 2)[0]) == float(value)


def test_when_all_targets_are_ignored_loss_and_gradients_are_exactly_zero():
    x, w, targets = inputs()
    value, (dx, dw) = value_and_gradients(x, w, jnp.full_like(targets, IGNORED), 3.0, 2)
    assert float(value) == 0
    assert (dx == 0).all()
    assert (dw == 0).all()


def test_bfloat16_stays_near_float32_and_keeps_the_types():
    x, w, targets = inputs(jnp.bfloat16)
    value, (dx, dw) = value_and_gradients(x, w, targets, None, 2)
    want, (want_x, want_w) = naive_value_and_gradients(x, w, targets)
    assert (value.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(value, want, rtol=3e-3)  # logits of magnitude 8 rounded to 8 bits, each off by up to 2**-6, 12 averaged
    for a, b in ((dx, want_x), (dw, want_w)):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=3e-2 * float(jnp.abs(b).max()))  # exp of such logits: 2 %


def largest_array(blocks: int) -> int:
    """Elements of the largest array in the compiled program of the loss and its gradients."""
    shape = jax.ShapeDtypeStruct
    x, w, targets = shape((2, 64, 8), jnp.float32), shape((8, 512), jnp.float32), shape((2, 64), jnp.int32)
    program = jax.jit(jax.grad(lambda x, w, t: total_nats(x, w, t, None, blocks), argnums=(0, 1))).lower(x, w, targets).compile()
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", program.as_text()))


def test_the_full_logits_never_exist_in_the_compiled_program():
    assert largest_array(1) == 2 * 64 * 512  # so the search finds them where they are
    assert largest_array(4) == 2 * 64 * 512 // 4


def test_temporary_memory_falls_with_the_number_of_blocks():
    shape = jax.ShapeDtypeStruct

    def temporary(blocks: int) -> int:
        f = jax.jit(jax.grad(lambda x, w, t: total_nats(x, w, t, None, blocks), argnums=(0, 1)))
        arguments = shape((2, 64, 8), jnp.float32), shape((8, 2048), jnp.float32), shape((2, 64), jnp.int32)
        return f.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 64 * 2048 * 4
    assert temporary(1) >= logits
    assert temporary(8) < logits / 2  # a block's logits and their gradient are a quarter; the rest is the head's sum


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_on_a_gpu_blocks_equal_log_softmax_forward_and_backward(dtype, softcap):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((2, 256, 128)), dtype), jnp.asarray(rng.standard_normal((128, 1024)) / 11, dtype)
    targets = jnp.asarray(rng.integers(-1, 1024, (2, 256)), jnp.int32)
    with jax.default_matmul_precision("float32"):  # tf32 would round fp32 inputs to 11 bits
        value, got = value_and_gradients(x, w, targets, softcap, 4)
        want, wanted = naive_value_and_gradients(x, w, targets, softcap)
    exact = dtype == jnp.float32
    np.testing.assert_allclose(value, want, rtol=1e-5 if exact else 1e-3)  # bf16 logits of magnitude 4, averaged over 500
    for a, b in zip(got, wanted, strict=True):
        error = float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        assert error < (1e-5 if exact else 1e-2)  # 8 bits of logits, of their gradient and of the result
