"""Causal attention backends behind one signature, with the resolver that picks one.

B batch, T tokens, S keys, N query heads, K key and value heads, G = N / K, H head size.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanojax.ops import attention_te
from nanojax.ops.attention_request import Request


@runtime_checkable
class AttentionFn(Protocol):
    """Training attention, T == S. `window` counts keys including the token itself; segments hide other documents of the row.

    They number its documents 1, 2, ... in their order, as data/packing.py does.
    """

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
    "te": attention_te.te_attention,
    "cudnn": functools.partial(jax_attention, implementation="cudnn"),
    "xla": functools.partial(jax_attention, implementation="xla"),
    "reference": reference_attention,
}
AUTO_ORDER = ("te", "cudnn", "xla")
PROMPT_ORDER = ("cudnn", "xla")  # by the time to the first token, with and without te (scripts/bench/LOG.md)
# Patterns of the custom calls, forward and backward, without which a compiled train step does not run that backend.
KERNELS = {
    "te": (r"te_fused_attn_forward_ffi", r"te_fused_attn_backward_ffi"),
    "cudnn": (r"__cudnn\$fmha(?!\w*Backward)\w+", r"__cudnn\$fmha\w*Backward\w*"),
}


def make_attention(name: str, documents: int | None) -> AttentionFn:
    """The backend, for rows of at most `documents` documents; None: of one."""
    return functools.partial(BACKENDS[name], max_documents=documents) if name == "te" and documents is not None else BACKENDS[name]


def cudnn_refusal(request: Request) -> str | None:
    """Why jax's cudnn attention cannot serve a request, or None when it can."""
    if request.platform not in ("gpu", "cuda"):
        return f"cudnn runs on NVIDIA GPUs, and the device is a {request.platform}"
    if request.capability is not None and float(request.capability) < 8:
        return f"cudnn takes compute capability 8.0 or more, given {request.capability}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn takes bf16 or fp16, and activations are {jnp.dtype(request.dtype).name}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"cudnn takes head sizes up to 128 that 8 divides, given {request.head_dim}"
    if request.documents is not None:
        return "cudnn has no segments, so it cannot hide documents from each other"
    return None


def no_refusal(request: Request) -> str | None:
    """XLA's own products and masks serve everything."""
    del request


REFUSALS: Mapping[str, Callable[[Request], str | None]] = {
    "te": attention_te.refusal,
    "cudnn": cudnn_refusal,
    "xla": no_refusal,
    "reference": no_refusal,
}


def resolve(
    name: str,
    request: Request,
    refusals: Mapping[str, Callable[[Request], str | None]] = REFUSALS,
    *,
    order: Sequence[str] = AUTO_ORDER,
) -> tuple[str, str]:
    """(backend, why) for a named backend or `auto`, the first of `order` that can serve, decided once at the start of a run.

    Raises ValueError when the named backend cannot serve: there is no silent fall-back.
    """
    if name != "auto":
        if reason := refusals[name](request):
            raise ValueError(f"attn_impl={name}: {reason}; try --attn-impl auto")
        return name, "asked for"
    reasons = []
    for candidate in order:
        if (reason := refusals[candidate](request)) is None:
            return candidate, "; ".join(reasons) or "fastest that can serve"
        reasons.append(reason)
    raise AssertionError("xla serves everything")


def compiled_kernels(name: str, text: str) -> str:
    """Which fused attention kernels a compiled train step calls and how often, in words, from its HLO text.

    Raises ValueError where one that the backend consists of is missing.
    """
    found = Counter(re.findall(r'custom_call_target="(te_fused_attn_\w+|__cudnn\$fmha\w+)"', text))
    words = ", ".join(f"{target} ({n})" for target, n in sorted(found.items())) or "no fused kernel"
    if missing := [pattern for pattern in KERNELS.get(name, ()) if not any(re.fullmatch(pattern, target) for target in found)]:
        raise ValueError(
            f"attn_impl={name} must call {' and '.join(missing)}, and the compiled step calls {words}; try another --attn-impl"
        )
    return words
