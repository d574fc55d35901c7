"""How far an attention backend is from the reference, forward and backward, on this device.

B batch, T tokens, N query heads, K key and value heads, H head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nanojax.ops.attention import BACKENDS, AttentionFn, make_attention
from nanojax.ops.attention_request import Request

RESULTS = ("output", "dq", "dk", "dv")
# Largest deviation from the reference, of the largest value or of 1 if that is smaller. bf16 and fp16: two roundings, of the weights
# and of the result, to 8 and 11 bits, and sums of such terms. fp32: another order of the same sums.
TOLERANCES = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 3e-5}


def draw(request: Request, seed: int = 0) -> tuple[Array, Array, Array, Array, Array | None]:
    """(q, k, v, cotangent of the output, segments or None), normal numbers; rows are cut at different places.

    The first row has as many documents as may be, one-token documents among them, the others fewer and fewer, the last only one.
    """
    rng = np.random.default_rng(seed)
    b, t, n, k, h = request.rows, request.tokens, request.heads, request.kv_heads, request.head_dim
    arrays = [jnp.asarray(rng.standard_normal((b, t, heads, h)), request.dtype) for heads in (n, k, k, n)]
    if request.documents is None:
        return arrays[0], arrays[1], arrays[2], arrays[3], None
    begins_BT = np.zeros((b, t), np.int32)
    for row, count in enumerate(np.linspace(min(request.documents, t), 1, b).astype(int)):
        begins_BT[row, rng.choice(np.arange(1, t), count - 1, replace=False)] = 1
    return arrays[0], arrays[1], arrays[2], arrays[3], jnp.asarray(1 + np.cumsum(begins_BT, axis=1), jnp.int32)


def with_gradients(attention: AttentionFn, window: int | None) -> Callable[..., tuple[Array, ...]]:
    """jitted (q, k, v, cotangent, segments) -> (output, dq, dk, dv)."""

    def run(q, k, v, cotangent, segments):
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, window=window, segments_BT=segments), q, k, v)
        return out, *vjp(cotangent)

    return jax.jit(run)


def deviation(name: str, request: Request) -> float:
    """Largest deviation of a backend from the reference in float32, as a share of what is tolerated: above 1 it is wrong.

    Every window of the request, output and gradients. NaN counts as infinity. Raises whatever the backend raises.
    """
    inputs = draw(request)
    *floats, segments = inputs
    worst = 0.0
    for window in dict.fromkeys(request.windows):
        got = with_gradients(make_attention(name, request.documents), window)(*inputs)
        with jax.default_matmul_precision("highest"):  # GPUs would multiply float32 as TF32
            want = with_gradients(BACKENDS["reference"], window)(*(x.astype(jnp.float32) for x in floats), segments)
        for a, b in zip(got, want, strict=True):
            if a.dtype != jnp.dtype(request.dtype) or a.shape != b.shape:
                raise ValueError(f"{name} gave {a.dtype}{list(a.shape)} where {jnp.dtype(request.dtype)}{list(b.shape)} was due")
            worst = max(worst, share_of_tolerance(np.asarray(a, np.float64), np.asarray(b, np.float64), str(jnp.dtype(request.dtype))))
    return worst


def share_of_tolerance(got: np.ndarray, want: np.ndarray, dtype: str) -> float:
    """Largest |got - want| over max(1, largest |want|) times the tolerance of the type; infinity where either is not finite."""
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got - want).max() / (TOLERANCES[dtype] * max(1.0, np.abs(want).max())))


def small(request: Request) -> Request:
    """A case of the same kind that takes a moment: head size, ratio of heads, documents and one window, on two short rows."""
    group = request.heads // request.kv_heads
    windows = [window for window in request.windows if window is not None]
    return dataclasses.replace(
        request,
        rows=2,
        tokens=min(request.tokens, 256),
        heads=2 * group,
        kv_heads=2,
        windows=(None, min(windows[0], 100)) if windows and None in request.windows else (min(windows[0], 100),) if windows else (None,),
    )


def self_test(name: str, request: Request) -> float:
    """`deviation` on a small case of a request's kind. Raises ValueError, naming backend and error, where it is wrong or fails."""
    case = small(request)
    try:
        share = deviation(name, case)
    except Exception as error:  # whatever a kernel raises is the finding
        what = (str(error).splitlines() or [""])[0]
        raise ValueError(f"attn_impl={name} failed its self-test: {type(error).__name__}: {what:.200}; try another --attn-impl") from error
    if not share <= 1:
        raise ValueError(
            f"attn_impl={name} failed its self-test: {share:.3g} times the tolerated deviation from the reference "
            f"({case.heads} heads, {case.kv_heads} kv, of {case.head_dim}); try another --attn-impl"
        )
    return share
