"""Attention over tokens that lie on several devices, a share on each.

B batch, T tokens, N query heads, K key and value heads, H head size; C devices along the axis.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from nanojax.ops.attention import AttentionFn

AXIS = "context"  # of the mesh


def over_context(attention: AttentionFn, context: int) -> AttentionFn:
    """The same attention for the inside of a shard_map, where each of `context` devices has the next T / C tokens of all N heads.

    All to all, they trade tokens for heads and back. Jacobs et al. 2023, arXiv:2309.14509 (Ulysses). A kernel sees whole rows, as on one
    device: so every backend serves, with windows and documents, and the work of a causal mask is shared evenly. A ring, or keys and
    values gathered, would cut no heads; but cuDNN's kernels have no mask that starts in the midst of a row (jax), or none with a window
    (Transformer Engine), and work is even only once tokens change places. N must be a multiple of `context`.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None, segments_BT=None):
        # A head of keys that serves queries on several devices goes to each.
        copies = key_heads(k_BTKH.shape[2], context) // k_BTKH.shape[2]
        k_BTKH, v_BTKH = (x if copies == 1 else jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
        q, k, v = (jax.lax.all_to_all(x, AXIS, 2, 1, tiled=True) for x in (q_BTNH, k_BTKH, v_BTKH))
        segments = None if segments_BT is None else jax.lax.all_gather(segments_BT, AXIS, axis=1, tiled=True)
        return jax.lax.all_to_all(attention(q, k, v, window=window, segments_BT=segments), AXIS, 1, 2, tiled=True)

    return attend


def key_heads(kv_heads: int, context: int) -> int:
    """Heads of keys, copies included, once `kv_heads` are dealt out evenly over `context` devices."""
    return math.lcm(kv_heads, context)
