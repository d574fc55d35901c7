"""The measure that `nanojax doctor` and the start of a run take of a backend, and with it every backend that a GPU has."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops import attention as backends
from nanojax.ops.attention import BACKENDS, REFUSALS, reference_attention
from nanojax.ops.attention_check import Worst, draw, prepared, prepared_all, self_test, share, small, worst_of
from nanojax.ops.attention_request import Request

REQUEST = Request(platform="cpu", dtype=jnp.float32, rows=2, tokens=13, heads=4, kv_heads=2, head_dim=16)
HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (4, 1)}  # query heads, key heads


@pytest.mark.parametrize("documents", [None, 4])
def test_xla_is_within_the_tolerance_and_the_reference_at_no_distance_from_itself(documents):
    request = dataclasses.replace(REQUEST, windows=(None, 5), documents=documents)
    assert share(prepared("reference", request)()) == 0
    assert share(prepared("xla", request)()) < 1


def without_the_window(*qkv, window=None, segments_BT=None):
    return reference_attention(*qkv, segments_BT=segments_BT)


def without_the_documents(*qkv, window=None, segments_BT=None):
    return reference_attention(*qkv, window=window)


def without_a_gradient_of_v(q, k, v, **sight):
    return reference_attention(q, k, jax.lax.stop_gradient(v), **sight)


def with_other_groups(q, k, v, **sight):
    return reference_attention(q, k[:, :, ::-1], v[:, :, ::-1], **sight)


def raising(*qkv, **sight):
    raise RuntimeError("no execution plan\nfor this graph")


@pytest.fixture
def plug(monkeypatch):
    """plug(attention): make it the backend of the name `xla`."""
    return lambda attention: monkeypatch.setattr(backends, "BACKENDS", {**BACKENDS, "xla": attention})


@pytest.mark.parametrize("wrong", [without_the_window, without_the_documents, without_a_gradient_of_v, with_other_groups])
def test_a_backend_that_errs_is_far_beyond_the_tolerance(plug, wrong):
    plug(wrong)
    request = dataclasses.replace(REQUEST, windows=(5,), documents=4)
    assert share(prepared("xla", request)()) > 100
    with pytest.raises(ValueError, match=r"attn_impl=xla failed its self-test: .* times the tolerated deviation") as caught:
        self_test("xla", request)
    assert "\n" not in str(caught.value)


def test_a_backend_that_raises_is_named_with_its_error(plug):
    plug(raising)
    with pytest.raises(ValueError, match="attn_impl=xla failed its self-test: RuntimeError: no execution plan; try") as caught:
        self_test("xla", REQUEST)
    assert "\n" not in str(caught.value)


def test_a_result_of_another_type_is_an_error(plug):
    plug(lambda *qkv, **sight: reference_attention(*qkv, **sight).astype(jnp.float16))
    with pytest.raises(ValueError, match="float16"):
        self_test("xla", REQUEST)


def test_shares_of_the_tolerance_by_hand():
    want = np.array([[1.0, -8.0]])
    assert worst_of(np.array([[1.0, -7.92]]), want, "bfloat16").share == pytest.approx(0.5)  # 0.08 of 8 * 0.02
    assert worst_of(np.array([0.01]), np.array([0.0]), "bfloat16").share == pytest.approx(0.5)  # of 1 * 0.02
    assert worst_of(np.zeros((1, 2)), want, "bfloat16") == Worst(50, (0, 1), got=0, want=-8, beyond=2, size=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_far(bad):
    finite, not_finite = np.array([0.0, 0.0]), np.array([0.0, bad])
    assert worst_of(not_finite, finite, "float32")[:2] == (np.inf, (1,))
    assert worst_of(finite, not_finite, "float32").share == np.inf
    assert worst_of(not_finite, not_finite, "float32").share == np.inf


def too_far(found: dict[str, Worst]) -> dict[str, Worst]:
    """Those that are wrong: what a failure shows."""
    return {result: worst for result, worst in found.items() if not worst.share < 1}


def test_a_wrong_result_is_told_from_right_ones_with_its_place(plug):
    plug(without_a_gradient_of_v)
    found = prepared("xla", dataclasses.replace(REQUEST, windows=(None, 5)))()
    assert set(too_far(found)) == {"dv, window None", "dv, window 5"}
    worst = found["dv, window 5"]
    assert worst.got == 0
    assert worst.want == reference_dv(5)[worst.place]
    assert (worst.beyond, worst.size) == (2 * 13 * 2 * 16, 2 * 13 * 2 * 16)


def reference_dv(window):
    q, k, v, cotangent, _ = draw(REQUEST)
    return jax.vjp(lambda v: reference_attention(q, k, v, window=window), v)[1](cotangent)[0]


def test_rows_are_drawn_with_as_many_documents_as_may_be_and_with_one():
    *_, segments = draw(dataclasses.replace(REQUEST, documents=5, rows=3))
    assert segments is not None
    assert segments.max(axis=1).tolist() == [5, 3, 1]
    assert (jnp.diff(segments, axis=1) >= 0).all()
    assert (segments[:, 0] == 1).all()


def test_a_self_test_is_small_and_of_the_same_kind():
    big = dataclasses.replace(REQUEST, rows=32, tokens=2048, heads=16, kv_heads=4, head_dim=128, windows=(512, None), documents=64)
    case = small(big)
    assert (case.rows, case.tokens, case.heads, case.kv_heads, case.head_dim) == (2, 256, 8, 2, 128)
    assert (case.windows, case.documents) == ((None, 100), 64)
    assert small(dataclasses.replace(big, windows=(None,))).windows == (None,)
    assert small(dataclasses.replace(big, windows=(7,), heads=6, kv_heads=6)).heads == 2


# On a GPU, in bf16: one odd length a cell, and all that may go wrong with it crossed. XLA takes a second a cell.
TABLE = list(itertools.product(BACKENDS, HEADS, (None, 17), (None, 6), (64, 128)))


def cell(heads: str, window: int | None, documents: int | None, size: int) -> Request:
    (n, k), device = HEADS[heads], jax.devices()[0]
    return Request(
        platform=device.platform, capability=getattr(device, "compute_capability", None), dtype=jnp.bfloat16,
        rows=2, tokens=77, heads=n, kv_heads=k, head_dim=size, windows=(window,), documents=documents,
    )  # fmt: skip


@functools.cache
def compiled() -> dict[tuple, Callable[[], dict[str, Worst]]]:
    """What runs every cell that its backend does not refuse."""
    served = [(name, *case) for name, *case in TABLE if REFUSALS[name](cell(*case)) is None]
    return dict(zip(served, prepared_all([(name, cell(*case)) for name, *case in served]), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "heads", "window", "documents", "size"),
    [pytest.param(*case, marks=pytest.mark.te if case[0] == "te" else ()) for case in TABLE],
)
def test_a_backend_on_a_gpu_agrees_with_the_reference_forward_and_backward(name, heads, window, documents, size):
    case = (heads, window, documents, size)
    refused = REFUSALS[name](cell(*case))
    if name == "cudnn" and documents is not None:
        assert "segments" in (refused or ""), "its public API has none"
        return
    assert refused is None
    assert too_far(compiled()[name, *case]()) == {}


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.parametrize("tokens", [2, 3, 64, 255, 2048])
def test_te_takes_short_even_and_odd_rows_and_many_documents(tokens):
    for documents in (None, 64):
        request = dataclasses.replace(cell("GQA", 17, documents, 128), tokens=tokens)
        assert REFUSALS["te"](request) is None
        assert too_far(prepared("te", request)()) == {}
