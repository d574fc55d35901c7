"""Attention backends: the reference against loops, every other one against the reference, and the resolver."""

from __future__ import annotations

import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.config import Attention
from nanojax.ops.attention import BACKENDS, resolve

HEADS = {"MHA": (3, 3, 16), "GQA": (8, 2, 64), "MQA": (4, 1, 16)}  # query heads, key heads, head size
T = 13
CASES = list(itertools.product(HEADS, (None, 5), (False, True)))
GPU = dict(platform="gpu", dtype=jnp.bfloat16, head_dim=128, packed=False)
CPU = dict(platform="cpu", dtype=jnp.float32, head_dim=128, packed=False)


def inputs(heads: str, packed: bool = False, *, tokens: int = T, dtype=jnp.float32, seed: int = 0):
    """(q, k, v, cotangent, segments): two rows, whose documents end at different places."""
    n, k, h = HEADS[heads] if heads in HEADS else tuple(map(int, heads.split(",")))
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.standard_normal((2, tokens, heads, h)), dtype) for heads in (n, k, k, n)]
    segments = jnp.asarray(np.stack([1 + (np.arange(tokens) >= 4) + (np.arange(tokens) >= 9), 1 + (np.arange(tokens) >= 7)]), jnp.int32)
    return *arrays, segments if packed else None


def loops(q, k, v, window, segments):
    """Attention with nothing clever in it, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            for t in range(q.shape[1]):
                head = n * k.shape[2] // q.shape[2]
                seen = [s for s in range(t + 1) if window is None or t - s < window]
                seen = [s for s in seen if segments is None or segments[b, s] == segments[b, t]]
                scores = np.array([q[b, t, n] @ k[b, s, head] for s in seen]) / np.sqrt(q.shape[-1])
                weights = np.exp(scores - scores.max())
                out[b, t, n] = (weights / weights.sum()) @ v[b, seen, head]
    return out


@functools.partial(jax.jit, static_argnames=("name", "window"))
def with_gradients(name: str, q, k, v, cotangent, segments, window):
    """(output, dq, dk, dv)."""
    out, vjp = jax.vjp(lambda q, k, v: BACKENDS[name](q, k, v, window=window, segments_BT=segments), q, k, v)
    return out, *vjp(cotangent)


@pytest.mark.parametrize(("heads", "window", "packed"), CASES)
def test_the_reference_equals_loops(heads, window, packed):
    q, k, v, cotangent, segments = inputs(heads, packed)
    got, *_ = with_gradients("reference", q, k, v, cotangent, segments, window)
    np.testing.assert_allclose(got, loops(q, k, v, window, segments), atol=5e-6)  # float32 sums of 64 products and 13 weights


@pytest.mark.parametrize(("heads", "window", "packed"), CASES)
def test_xla_equals_the_reference_forward_and_backward(heads, window, packed):
    *arrays, segments = inputs(heads, packed)
    got, want = (with_gradients(name, *arrays, segments, window) for name in ("xla", "reference"))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)  # two orders of the same float32 sums, of magnitude up to 10


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize(
    ("window", "means"),
    [(None, [0, 0.5, 1, 1.5, 2, 2.5]), (3, [0, 0.5, 1, 2, 3, 4])],
)
def test_the_window_counts_keys_including_the_token_itself(name, window, means):
    # All scores are equal, so the output is the mean position of the keys seen.
    zeros, v = jnp.zeros((1, 6, 1, 16)), jnp.broadcast_to(jnp.arange(6.0)[None, :, None, None], (1, 6, 1, 16))
    out, *_ = with_gradients(name, zeros, zeros, v, zeros, None, window)
    np.testing.assert_allclose(out[0, :, 0, 0], means, rtol=1e-6)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_a_window_of_one_returns_the_values(name):
    q, k, v, cotangent, _ = inputs("MHA")
    np.testing.assert_array_equal(with_gradients(name, q, k, v, cotangent, None, 1)[0], v)


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("window", [None, 5])
def test_no_key_or_value_outside_of_sight_has_a_gradient(name, window):
    q, k, v, cotangent, _ = inputs("MQA")
    only_8 = cotangent * (jnp.arange(T) == 8)[None, :, None, None]
    for which, g in enumerate(with_gradients(name, q, k, v, only_8, None, window)[2:]):
        touched = np.asarray(jnp.abs(g).max(axis=(0, 2, 3))) > 0
        first = 0 if window is None else 4
        assert touched.tolist() == [first <= s <= 8 for s in range(T)], "kv"[which]


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_grouped_queries_equal_repeated_keys_and_their_gradient_is_the_sum_over_the_group(name):
    q, k, v, cotangent, _ = inputs("GQA")
    out, dq, dk, dv = with_gradients(name, q, k, v, cotangent, None, None)
    repeated = [jnp.repeat(x, 4, axis=2) for x in (k, v)]  # query head n reads key head n // 4
    out_r, dq_r, dk_r, dv_r = with_gradients(name, q, *repeated, cotangent, None, None)
    for a, b in ((out, out_r), (dq, dq_r), *((g, r.reshape(2, T, 2, 4, 64).sum(3)) for g, r in ((dk, dk_r), (dv, dv_r)))):
        np.testing.assert_allclose(a, b, atol=2e-5)  # as above


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_bfloat16_in_is_bfloat16_out(name):
    q, k, v, cotangent, _ = inputs("GQA", dtype=jnp.bfloat16)
    out, *_ = with_gradients(name, q, k, v, cotangent, None, None)
    assert out.dtype == jnp.bfloat16
    # 8 bits of |v| <= 4, and weights in bf16 too
    np.testing.assert_allclose(np.asarray(out, np.float64), loops(q, k, v, None, None), atol=3e-2)


def test_one_table_and_the_command_line_know_the_same_backends():
    assert set(BACKENDS) | {"auto"} == set(typing.get_args(Attention))


def test_auto_on_a_cpu_is_xla_and_says_why_not_cudnn():
    assert resolve("auto", **CPU) == ("xla", "cudnn runs on NVIDIA GPUs, and the device is a cpu")


def test_auto_on_a_gpu_is_cudnn():
    assert resolve("auto", **GPU)[0] == "cudnn"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(platform="cpu"), "the device is a cpu"),
        (dict(packed=True), "cannot hide documents"),
        (dict(dtype=jnp.float32), "activations are float32"),
        (dict(head_dim=256), "given 256"),
        (dict(head_dim=36), "given 36"),
    ],
)
def test_a_named_backend_that_cannot_serve_raises_and_auto_goes_on_with_the_same_reason(change, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        resolve("cudnn", **(GPU | change))
    assert "\n" not in str(caught.value)
    assert "attn_impl=cudnn" in str(caught.value)
    name, why = resolve("auto", **(GPU | change))
    assert name == "xla"
    assert reason in why


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_named_backend_that_can_serve_is_taken(name):
    assert resolve(name, **CPU)[0] == name


@pytest.mark.gpu
@pytest.mark.parametrize("heads", ["4,4,64", "8,2,64", "4,4,128", "8,2,128", "8,1,128"])
@pytest.mark.parametrize(("tokens", "window"), [(128, None), (128, 17), (77, None), (77, 17)])
def test_cudnn_equals_the_reference_forward_and_backward(heads, tokens, window):
    q, k, v, cotangent, _ = inputs(heads, tokens=tokens, dtype=jnp.bfloat16)
    got = with_gradients("cudnn", q, k, v, cotangent, None, window)
    want = with_gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v, cotangent)), None, window)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        # bf16 weights and output: 2 roundings of 2**-8 of the largest, and sums over up to 8 heads x 128 tokens of such terms
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=2e-2 * max(1.0, float(jnp.abs(b).max())), err_msg=name)
        assert float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) < 1e-2, name  # and on average far better
