"""Transformer Engine's fused attention, and what it refuses.

B batch, T tokens, N query heads, K key and value heads, H head size, M most documents in a row.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from nanojax.ops.attention_request import Request


def te_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    window: int | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    max_documents: int = 1,
) -> Float[Array, "B T N H"]:
    """Causal attention of bf16 or fp16 by cuDNN through Transformer Engine 2.20, on the device's own rows and heads.

    `max_documents` is static. What comes after a row's first `max_documents` documents is lost without a word: the packer caps them.
    Ask `refusal` first; the kernel raises on what it does not have.
    """
    attend = functools.partial(fused, window=window, max_documents=max_documents)
    return without_empty_residuals(attend)(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def fused(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"] | None,
    window: int | None,
    max_documents: int,
) -> Float[Array, "B T N H"]:
    """Transformer Engine's own function."""
    from transformer_engine.jax import attention as te  # pyright: ignore[reportMissingImports]  # optional

    rows, tokens, _, size = q_BTNH.shape
    packed = segments_BT is not None
    if packed:
        sequences = te.SequenceDescriptor.from_seqlens_and_offsets(*lengths_and_starts(segments_BT, max_documents))
    else:
        sequences = te.SequenceDescriptor.from_seqlens(jnp.full(rows, tokens, jnp.int32))
    return te.fused_attn(
        (q_BTNH, k_BTKH, v_BTKH),
        None,
        sequences,
        None,
        **kind(te, packed),
        scaling_factor=1 / math.sqrt(size),
        dropout_probability=0.0,
        is_training=True,
        max_segments_per_seq=max_documents if packed else 1,
        window_size=span(window, tokens),
        # Any name will do: a device has its own rows and heads. Without it TE looks for a global MeshResource as soon as a mesh is set, in
        # the backward pass too, where no context manager of ours is open any more.
        context_parallel_axis="context",
    )


def without_empty_residuals(
    f: Callable[[Array, Array, Array, Array | None], Array],
) -> Callable[[Array, Array, Array, Array | None], Array]:
    """f, differentiable in its first three arguments, whose backward pass is handed no array without elements.

    TE hands itself some, for a bias that is not there; each leaves the shard_map around attention, and XLA (jax 0.11.2) ends the process
    while it compiles an empty array that is cut over several devices.
    """

    def forward(q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Callable[[], Callable]]:
        out, pull = jax.vjp(lambda q, k, v: f(q, k, v, segments), q, k, v)
        leaves, tree = jax.tree.flatten(pull)
        empty = [None if x.size else jax.typeof(x) for x in leaves]

        def whole(*kept: ArrayLike) -> Callable:
            rest = iter(kept)
            return tree.unflatten([next(rest) if e is None else jnp.zeros(e.shape, e.dtype) for e in empty])

        return out, jax.tree_util.Partial(whole, *(x for x in leaves if x.size))

    def backward(pull: Callable[[], Callable], g: Array) -> tuple[Array, Array, Array, None]:
        return *pull()(g), None

    lean = jax.custom_vjp(f)
    lean.defvjp(forward, backward)
    return lean


def require_deterministic() -> None:
    """Have Transformer Engine choose only kernels whose results repeat: it reads this as it chooses one, and allows others by default."""
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"


def kind(te: Any, packed: bool) -> dict[str, Any]:
    """What the kernel and the question whether there is one must say alike. THD is BSHD with several sequences in a row."""
    return {
        "attn_bias_type": te.AttnBiasType.NO_BIAS,
        "attn_mask_type": te.AttnMaskType.PADDING_CAUSAL_MASK if packed else te.AttnMaskType.CAUSAL_MASK,
        "qkv_layout": te.QKVLayout.THD_THD_THD if packed else te.QKVLayout.BSHD_BSHD_BSHD,
        "softmax_type": te.AttnSoftmaxType.VANILLA_SOFTMAX,
    }


def span(window: int | None, tokens: int) -> tuple[int, int] | None:
    """Keys to the left and to the right of a token that it sees beside itself; None: all that came before."""
    return None if window is None or window >= tokens else (window - 1, 0)


def lengths_and_starts(segments_BT: Int[Array, "B T"], max_documents: int) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"]]:
    """(lengths int32, 0 for a document that is not there; starts int32, -1 for it and in the last column) of a row's documents.

    Segments number the documents of a row 1, 2, ... in their order and fill it (data/packing.py). TE would find the same in the numbers
    themselves (from_segment_ids_and_pos), by scatters and a branch in every layer, forward and backward; this is one comparison.
    """
    numbers_M = jnp.arange(1, max_documents + 1, dtype=jnp.int32)
    lengths_BM = jnp.sum(segments_BT[:, None, :] == numbers_M[None, :, None], axis=-1, dtype=jnp.int32)
    starts_BM = jnp.cumsum(lengths_BM, axis=-1, dtype=jnp.int32) - lengths_BM
    return lengths_BM, jnp.pad(jnp.where(lengths_BM > 0, starts_BM, -1), ((0, 0), (0, 1)), constant_values=-1)


def has_kernel(request: Request, window: int | None) -> bool | None:
    """Whether TE has a fused kernel, forward and backward, for a request and one of its windows; None where TE is not installed."""
    try:
        from transformer_engine.jax import attention as te  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        return None
    return te.is_fused_attn_kernel_available(
        **kind(te, request.documents is not None),
        is_training=True,
        batch_size=request.rows,
        q_dtype=jnp.dtype(request.dtype),
        kv_dtype=jnp.dtype(request.dtype),
        dropout_probability=0.0,
        q_num_heads=request.heads,
        kv_num_heads=request.kv_heads,
        q_max_seqlen=request.tokens,
        kv_max_seqlen=request.tokens,
        head_dim_qk=request.head_dim,
        head_dim_v=request.head_dim,
        window_size=span(window, request.tokens),
        max_segments_per_seq=request.documents or 1,
    )


def refusal(request: Request, available: Callable[[Request, int | None], bool | None] = has_kernel) -> str | None:
    """Why TE cannot serve a request, in each of its windows, or None when it can."""
    if request.platform not in ("gpu", "cuda"):
        return f"te runs on NVIDIA GPUs, and the device is a {request.platform}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"te takes bf16 or fp16, and activations are {jnp.dtype(request.dtype).name}"
    for window in dict.fromkeys(request.windows):
        found = available(request, window)
        if found is None:
            return "te needs Transformer Engine, which is not installed (pip install 'nanojax[te]')"
        if not found:
            return (
                f"te has no kernel for {request.rows} rows of {request.tokens} tokens"
                f"{'' if request.documents is None else f' in up to {request.documents} documents'}, {request.heads} heads "
                f"({request.kv_heads} kv) of {request.head_dim}, {'no window' if window is None else f'a window of {window}'}"
                f"{'' if request.capability is None else f', on compute capability {request.capability}'}"
            )
    return None
