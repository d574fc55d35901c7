"""Causal attention backends behind one signature, with the resolver that picks one.

B batch, T tokens, S keys, N query heads, K key and value heads, G = N / K, H head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class AttentionFn(Protocol):
    """Training attention, T == S. `window` counts keys including the token itself; `segments` hides other documents of the row."""

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        *,
        window: int | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T N H"]: ...


def visible(tokens: int, window: int | None, segments_BT: Int[Array, "B T"] | None) -> Array:
    """Boolean [B or 1, T, S]: which keys each token sees."""
    t, s = jnp.arange(tokens)[:, None], jnp.arange(tokens)[None, :]
    mask = (s <= t) if window is None else (s <= t) & (t - s < window)
    return mask[None] if segments_BT is None else mask[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def reference_attention(q_BTNH, k_BTKH, v_BTKH, *, window=None, segments_BT=None):
    """softmax(q k^T / sqrt(H)) v, written out, in float32. Vaswani et al. 2017, equation 1; grouped queries: arXiv:2305.13245."""
    b, t, n, h = q_BTNH.shape
    k = k_BTKH.shape[2]
    q = q_BTNH.reshape(b, t, k, n // k, h).astype(jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BTKH.astype(jnp.float32)) / math.sqrt(h)
    mask = visible(t, window, segments_BT)[:, None, None]
    probs = jax.nn.softmax(jnp.where(mask, scores_BKGTS, -jnp.inf), axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", probs, v_BTKH.astype(jnp.float32))
    return out.reshape(b, t, n, h).astype(q_BTNH.dtype)


def jax_attention(q_BTNH, k_BTKH, v_BTKH, *, implementation: Literal["cudnn", "xla"], window=None, segments_BT=None):
    """`jax.nn.dot_product_attention`. Its local window (W - 1, 0) holds W keys; it has no segments, so they become a dense mask."""
    tokens = q_BTNH.shape[1]
    if implementation == "cudnn" and tokens % 2:
        # cuDNN trains on even lengths only. One more token at the end is seen by none but itself.
        q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    mask = None if segments_BT is None else visible(q_BTNH.shape[1], None, segments_BT)[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=mask,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out_BTNH[:, :tokens]


BACKENDS: Mapping[str, Callable[..., Array]] = {
    "cudnn": functools.partial(jax_attention, implementation="cudnn"),
    "xla": functools.partial(jax_attention, implementation="xla"),
    "reference": reference_attention,
}
AUTO_ORDER = ("cudnn", "xla")


def refusal(name: str, *, platform: str, dtype: DTypeLike, head_dim: int, packed: bool) -> str | None:
    """Why a backend cannot serve, or None when it can."""
    if name != "cudnn":
        return None
    if platform not in ("gpu", "cuda"):
        return f"cudnn runs on NVIDIA GPUs, and the device is a {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn takes bf16 or fp16, and activations are {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"cudnn takes head sizes up to 128 that 8 divides, given {head_dim}"
    if packed:
        return "cudnn has no segments, so it cannot hide documents from each other"
    return None


def resolve(name: str, *, platform: str, dtype: DTypeLike, head_dim: int, packed: bool) -> tuple[str, str]:
    """(backend, why) for a named backend or `auto`, decided once at the start of a run.

    Raises ValueError when the named backend cannot serve: there is no silent fall-back.
    """
    facts: dict[str, Any] = dict(platform=platform, dtype=dtype, head_dim=head_dim, packed=packed)
    if name != "auto":
        if reason := refusal(name, **facts):
            raise ValueError(f"attn_impl={name}: {reason}; try --attn-impl auto")
        return name, "asked for"
    reasons = []
    for candidate in AUTO_ORDER:
        if (reason := refusal(candidate, **facts)) is None:
            return candidate, "; ".join(reasons) or "fastest that can serve"
        reasons.append(reason)
    raise AssertionError("xla serves everything")
