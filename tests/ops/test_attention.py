"""Attention backends: the reference against loops, XLA's against the reference, the resolver, and what a compiled step calls."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.config import Attention
from nanojax.ops.attention import AUTO_ORDER, BACKENDS, KERNELS, REFUSALS, Request, compiled_kernels, make_attention, resolve

HEADS = {"MHA": (3, 3, 128), "GQA": (8, 2, 64), "MQA": (4, 1, 128)}  # query heads, key heads, head size
T = 13
CASES = list(itertools.product(HEADS, (None, 5), (False, True)))
OTHER_SIZES = list(itertools.product(("3,3,64", "8,2,128", "4,1,64"), (None, 5), (False, True)))
GPU = Request(platform="gpu", capability="9.0", dtype=jnp.bfloat16, rows=32, tokens=2048, heads=6, kv_heads=6, head_dim=128)
CPU = dataclasses.replace(GPU, platform="cpu", capability=None, dtype=jnp.float32)
# The answers of a machine where TE is installed, and of one where it is not.
WITH_TE = {**REFUSALS, "te": lambda request: None}
WITHOUT_TE = {**REFUSALS, "te": lambda request: "te is not installed"}


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


@pytest.mark.parametrize(("heads", "window", "packed"), [*CASES, *OTHER_SIZES])
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
    assert set(REFUSALS) == set(BACKENDS)
    assert set(KERNELS) | set(AUTO_ORDER) <= set(BACKENDS)


def test_auto_on_a_cpu_is_xla_and_says_why_nothing_faster():
    te, cudnn = "te runs on NVIDIA GPUs, and the device is a cpu", "cudnn runs on NVIDIA GPUs, and the device is a cpu"
    assert resolve("auto", CPU) == ("xla", f"{te}; {cudnn}")


def test_auto_on_a_gpu_is_te_then_cudnn_then_xla():
    assert resolve("auto", GPU, WITH_TE) == ("te", "fastest that can serve")
    assert resolve("auto", GPU, WITHOUT_TE) == ("cudnn", "te is not installed")
    assert resolve("auto", dataclasses.replace(GPU, documents=8), WITHOUT_TE)[0] == "xla"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(platform="cpu"), "the device is a cpu"),
        (dict(documents=64), "cannot hide documents"),
        (dict(dtype=jnp.float32), "activations are float32"),
        (dict(head_dim=256), "given 256"),
        (dict(head_dim=36), "given 36"),
        (dict(capability="7.5"), "given 7.5"),
    ],
)
def test_a_named_backend_that_cannot_serve_raises_and_auto_goes_on_with_the_same_reason(change, reason):
    request = dataclasses.replace(GPU, **change)
    with pytest.raises(ValueError, match=reason) as caught:
        resolve("cudnn", request, WITHOUT_TE)
    assert "\n" not in str(caught.value)
    assert "attn_impl=cudnn" in str(caught.value)
    assert "try --attn-impl auto" in str(caught.value)
    name, why = resolve("auto", request, WITHOUT_TE)
    assert name == "xla"
    assert why.startswith("te is not installed; ")
    assert reason in why


@pytest.mark.parametrize("change", [dict(capability="10.3"), dict(tokens=2047), dict(windows=(None, 64)), dict(head_dim=64, kv_heads=1)])
def test_cudnn_serves_new_devices_odd_lengths_windows_and_few_keys(change):
    assert resolve("cudnn", dataclasses.replace(GPU, **change)) == ("cudnn", "asked for")


def test_a_backend_is_asked_about_the_whole_request():
    asked = []
    resolve("auto", GPU, {**REFUSALS, "te": asked.append})
    assert asked == [GPU]


def test_te_that_is_named_and_refuses_raises():
    with pytest.raises(ValueError, match="attn_impl=te: te is not installed; try --attn-impl auto"):
        resolve("te", GPU, WITHOUT_TE)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_named_backend_that_can_serve_is_taken(name):
    assert resolve(name, CPU) == (name, "asked for")


def test_only_te_is_told_how_many_documents_a_row_may_have():
    assert {name: getattr(make_attention(name, 9), "keywords", {}).get("max_documents") for name in BACKENDS} == {
        "te": 9, "cudnn": None, "xla": None, "reference": None,
    }  # fmt: skip
    assert make_attention("te", None) is BACKENDS["te"]


def hlo(*targets: str) -> str:
    """Lines as a compiled program has them."""
    return "".join(
        f'  %custom-call.{i} = (bf16[8,64]) custom-call(%p), custom_call_target="{target}", api_version=API_VERSION_TYPED_FFI\n'
        for i, target in enumerate(targets)
    )


TE = ("te_fused_attn_forward_ffi", "te_fused_attn_backward_ffi")
CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("te", (*TE, *TE, "cublas"), "te_fused_attn_backward_ffi (2), te_fused_attn_forward_ffi (2)"),
        ("cudnn", (*CUDNN, CUDNN[0]), "__cudnn$fmhaSoftmax (2), __cudnn$fmhaSoftmaxBackward (1)"),
        ("cudnn", ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"), "Bias"),
        ("xla", ("__cublas$lt$matmul",), "no fused kernel"),
        ("reference", (), "no fused kernel"),
    ],
)
def test_a_compiled_step_is_read_for_the_kernels_that_it_calls(name, targets, words):
    assert words in compiled_kernels(name, hlo(*targets))


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("te", (), "must call te_fused_attn_forward_ffi and te_fused_attn_backward_ffi, and the compiled step calls no fused kernel"),
        ("te", CUDNN, "calls __cudnn"),
        ("te", (TE[0],), "must call te_fused_attn_backward_ffi,"),
        ("cudnn", (CUDNN[0],), "Backward"),
        ("cudnn", (CUDNN[1],), "calls __cudnn.fmhaSoftmaxBackward .1."),
        ("cudnn", TE, "calls te_fused"),
    ],
)
def test_a_step_without_the_kernels_of_its_backend_is_refused_in_one_line(name, targets, words):
    with pytest.raises(ValueError, match=words) as caught:
        compiled_kernels(name, hlo(*targets))
    assert "\n" not in str(caught.value)
