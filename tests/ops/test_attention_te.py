"""Transformer Engine's side of attention: what it is told, on a stand-in that does what its sources say, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.attention import reference_attention
from nanojax.ops.attention_check import draw
from nanojax.ops.attention_request import Request
from nanojax.ops.attention_te import has_kernel, lengths_and_starts, refusal, te_attention, without_empty_residuals

REQUEST = Request(platform="gpu", capability="9.0", dtype=jnp.bfloat16, rows=3, tokens=29, heads=4, kv_heads=2, head_dim=16)
YES, NO = (lambda request, window: True), (lambda request, window: False)


class Names:
    """Members of an enumeration, by their own names."""

    def __getattr__(self, name: str) -> str:
        return name


@pytest.fixture
def te(monkeypatch) -> dict[str, Any]:
    """A stand-in for transformer_engine.jax.attention; what it was called with."""
    calls: dict[str, Any] = {}

    class SequenceDescriptor:
        from_seqlens = staticmethod(lambda lengths: (lengths, None))
        from_seqlens_and_offsets = staticmethod(lambda lengths, offsets: (lengths, offsets))

    def fused_attn(qkv, bias, sequences, seed, **settings):
        calls["fused_attn"] = settings
        assert bias is None
        assert seed is None
        lengths, starts = sequences
        assert lengths.dtype == jnp.int32
        tokens = qkv[0].shape[1]
        if starts is None:
            segments, sound = None, lengths == tokens
        else:
            first, at = starts[:, :-1, None], jnp.arange(tokens)[None, None, :]
            inside = (at >= first) & (at < first + lengths[..., None])  # row, document, token
            segments = jnp.argmax(inside, axis=1)
            sound = (inside.sum(axis=1) == 1).all(axis=1) & ((lengths == 0) == (starts[:, :-1] == -1)).all(axis=1)
        window = settings["window_size"]
        out = reference_attention(*qkv, window=None if window is None else window[0] + 1, segments_BT=segments)
        return out * jnp.where(sound, 1, jnp.nan)[:, None, None, None]  # a row with tokens in no sequence, or in two

    def is_fused_attn_kernel_available(**settings):
        calls["available"] = settings
        return True

    names = dict.fromkeys(("AttnBiasType", "AttnMaskType", "QKVLayout", "AttnSoftmaxType"), Names())
    module = types.SimpleNamespace(
        fused_attn=fused_attn,
        is_fused_attn_kernel_available=is_fused_attn_kernel_available,
        SequenceDescriptor=SequenceDescriptor,
        **names,
    )
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.jax", types.SimpleNamespace(attention=module))
    return calls


@pytest.mark.parametrize("documents", [None, 5])
@pytest.mark.parametrize("window", [None, 1, 7, 29, 99])
def test_what_te_is_told_means_the_same_attention(te, documents, window):
    q, k, v, _, segments = draw(dataclasses.replace(REQUEST, dtype=jnp.float32, documents=documents))
    got = te_attention(q, k, v, window=window, segments_BT=segments, max_documents=documents or 1)
    np.testing.assert_allclose(got, reference_attention(q, k, v, window=window, segments_BT=segments), atol=1e-6)
    said = te["fused_attn"]
    assert said["window_size"] == (None if window in (None, 29, 99) else (window - 1, 0))
    assert said["scaling_factor"] == 0.25  # of a head of 16
    assert said["max_segments_per_seq"] == (documents or 1)
    assert said["qkv_layout"] == ("THD_THD_THD" if documents else "BSHD_BSHD_BSHD")
    assert said["attn_mask_type"] == ("PADDING_CAUSAL_MASK" if documents else "CAUSAL_MASK")
    assert said["context_parallel_axis"]


@pytest.mark.parametrize("documents", [None, 5])
def test_gradients_go_through_what_te_is_told(te, documents):
    q, k, v, g, segments = draw(dataclasses.replace(REQUEST, dtype=jnp.float32, documents=documents))
    want = jax.vjp(lambda *qkv: reference_attention(*qkv, window=7, segments_BT=segments), q, k, v)[1](g)
    attention = jax.checkpoint(lambda *qkv: te_attention(*qkv, window=7, segments_BT=segments, max_documents=documents or 1))
    for got, expected in zip(jax.jit(lambda *qkv: jax.vjp(attention, *qkv)[1](g))(q, k, v), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_no_array_without_elements_is_kept_for_the_backward_pass():
    """As one does in TE; in a shard_map on two devices XLA ends the process over it (jax 0.11.2)."""

    @jax.custom_vjp
    def f(q, k, v):
        return q * k + v

    f.defvjp(lambda q, k, v: (f(q, k, v), (jnp.zeros((0, 3)), q, jnp.zeros(0, jnp.int32), k)), lambda kept, g: backward(*kept, g))

    def backward(empty, q, none, k, g):
        assert (empty.shape, empty.dtype, none.shape, none.dtype) == ((0, 3), jnp.float32, (0,), jnp.int32)
        return g * k, g * q, g

    def kept(f):
        return [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(f, *x)[1], *[jnp.ones(4)] * 3))]

    def all_but_empty(q, k, v):
        return without_empty_residuals(lambda q, k, v, segments: f(q, k, v))(q, k, v, None)

    assert (0, 3) in kept(f)
    assert kept(all_but_empty) == [(4,), (4,)]
    ones, twos, threes = (jnp.full(4, x) for x in (1.0, 2.0, 3.0))
    out, pull = jax.vjp(all_but_empty, ones, twos, threes)
    assert (out[0], *(x[0] for x in pull(threes))) == (5, 6, 3, 3)


def test_lengths_and_starts_of_documents_by_hand():
    segments = jnp.array([[1, 1, 1, 2, 2], [1, 2, 3, 4, 4], [1, 1, 1, 1, 1]], jnp.int32)
    lengths, starts = jax.jit(lengths_and_starts, static_argnums=1)(segments, 4)
    assert lengths.tolist() == [[3, 2, 0, 0], [1, 1, 1, 2], [5, 0, 0, 0]]
    assert starts.tolist() == [[0, 3, -1, -1, -1], [0, 1, 2, 3, -1], [0, -1, -1, -1, -1]]
    assert lengths.dtype == starts.dtype == jnp.int32


@pytest.mark.parametrize("documents", [None, 5])
def test_te_is_asked_for_the_kernel_that_it_will_be_told_to_run(te, documents):
    request = dataclasses.replace(REQUEST, documents=documents)
    assert has_kernel(request, 7)
    asked = te["available"]
    arrays = draw(request)
    te_attention(*arrays[:3], window=7, segments_BT=arrays[4], max_documents=documents or 1)
    told = te["fused_attn"]
    for name in set(asked) & set(told):
        assert asked[name] == told[name], name
    assert {"qkv_layout", "attn_mask_type", "window_size", "max_segments_per_seq", "is_training"} <= set(asked) & set(told)
    assert (asked["batch_size"], asked["q_max_seqlen"], asked["kv_max_seqlen"]) == (3, 29, 29)
    assert (asked["q_num_heads"], asked["kv_num_heads"], asked["head_dim_qk"], asked["head_dim_v"]) == (4, 2, 16, 16)
    assert asked["q_dtype"] == asked["kv_dtype"] == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "available", "reason"),
    [
        (dict(platform="cpu"), YES, "the device is a cpu"),
        (dict(dtype=jnp.float32), YES, "activations are float32"),
        (dict(), lambda request, window: None, r"not installed \(pip install 'nanojax\[te\]'\)"),
        (dict(head_dim=36), NO, "no kernel for 3 rows of 29 tokens, 4 heads .2 kv. of 36, no window, on compute capability 9.0"),
        (dict(documents=9), NO, "in up to 9 documents"),
        (dict(windows=(None, 7)), lambda request, window: window is None, "a window of 7"),
    ],
)
def test_a_refusal_says_why_in_one_line(change, available, reason):
    said = refusal(dataclasses.replace(REQUEST, **change), available)
    assert said is not None
    assert re.search(reason, said)
    assert "\n" not in said


def test_te_serves_only_if_it_has_a_kernel_for_every_window():
    asked = []

    def available(request, window):
        asked.append(window)
        return True

    assert refusal(dataclasses.replace(REQUEST, windows=(None, 7, None, 9)), available) is None
    assert asked == [None, 7, 9]


def test_without_transformer_engine_there_is_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # import raises ImportError
    assert has_kernel(REQUEST, None) is None
