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
from nanojax.ops.attention_te import has_kernel, lengths_and_starts, refusal, te_attention

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
        segments = None
        if starts is None:
            np.testing.assert_array_equal(lengths, tokens)
        else:
            segments = np.zeros((len(lengths), tokens), np.int32)  # 0 where the kernel would compute nothing
            for row, many in zip(segments, zip(lengths, starts[:, :-1], strict=True), strict=True):
                for number, (length, start) in enumerate(zip(*map(np.asarray, many), strict=True), 1):
                    assert (length == 0) == (start == -1)
                    row[start : start + length] = number if length else row[start : start + length]
            assert segments.min() > 0, "tokens in no sequence"
        window = settings["window_size"]
        segments = None if segments is None else jnp.asarray(segments)
        return reference_attention(*qkv, window=None if window is None else window[0] + 1, segments_BT=segments)

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
        (dict(devices=2), YES, "te serves one device: for 2"),
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
