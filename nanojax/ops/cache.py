"""Keys and values that decoding keeps, in a ring of slots for each layer, and attention that reads it.

B batch, T new tokens, S slots or keys, N query heads, K key and value heads, G = N / K, H head size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


class Cache(NamedTuple):
    """One layer's. Position p lies in slot p mod S: a window of S keys goes round, and what S is long enough for never does."""

    # Heads before slots: each head of a row is one matrix, which products read without a transpose.
    k_BKSH: Float[Array, "B K S H"]
    v_BKSH: Float[Array, "B K S H"]


def empty_cache(batch: int, heads: int, slots: int, head_dim: int, dtype: DTypeLike) -> Cache:
    """A cache that holds nothing yet: K = heads, S = slots."""
    zeros = jnp.zeros((batch, heads, slots, head_dim), dtype)
    return Cache(zeros, zeros)


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with more slots; only for one that has not gone round yet."""
    return Cache(*(jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))) for x in cache))


def held(newest_B: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
    """Position in each slot once a row has written up to position `newest`; negative where there is none."""
    behind_BS = (newest_B[:, None] - jnp.arange(slots)[None, :]) % slots
    return newest_B[:, None] - behind_BS


def write(
    cache: Cache,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
) -> Cache:
    """The cache with the valid tokens in it, the newest S of them where there are more."""
    tokens, slots = positions_BT.shape[1], cache.k_BKSH.shape[2]
    newest_B1 = jnp.max(jnp.where(valid_BT, positions_BT, -1), axis=1, keepdims=True)
    kept_BT = valid_BT & (positions_BT > newest_B1 - slots)
    # The others get slots that do not exist, each its own, and are dropped.
    slots_BT = jnp.where(kept_BT, positions_BT % slots, slots + jnp.arange(tokens)[None])
    rows_B1 = jnp.arange(len(positions_BT))[:, None]
    k_BKSH, v_BKSH = (
        old.at[rows_B1, :, slots_BT].set(new, mode="drop", unique_indices=True) for old, new in zip(cache, (k_BTKH, v_BTKH), strict=True)
    )
    return Cache(k_BKSH, v_BKSH)


def attend(
    q_BTNH: Float[Array, "B T N H"], cache: Cache, positions_BT: Int[Array, "B T"], held_BS: Int[Array, "B S"], window: int | None
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over the keys at or before each token, the last `window` of them, by position; scores are float32."""
    b, t, n, h = q_BTNH.shape
    kv_heads = cache.k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(b, t, kv_heads, n // kv_heads, h)
    scores_BKGTS = einsum_in_float32("BTKGH,BKSH->BKGTS", q_BTKGH, cache.k_BKSH) / math.sqrt(h)
    behind_BTS = positions_BT[:, :, None] - held_BS[:, None, :]
    seen_BTS = (behind_BTS >= 0) & (held_BS >= 0)[:, None]
    if window is not None:
        seen_BTS &= behind_BTS < window
    probs_BKGTS = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf), axis=-1).astype(q_BTNH.dtype)
    y_BTKGH = einsum_in_float32("BKGTS,BKSH->BTKGH", probs_BKGTS, cache.v_BKSH)
    return y_BTKGH.reshape(b, t, n, h).astype(q_BTNH.dtype)


def einsum_in_float32(spec: str, x: Array, y: Array) -> Array:
    """An einsum of two arrays of any shapes, summed and returned in float32."""
    return jax.lax.platform_dependent(
        x,
        y,
        # XLA has no such product of bf16 on CPUs.
        cpu=lambda x, y: jnp.einsum(spec, x.astype(jnp.float32), y.astype(jnp.float32)),
        default=lambda x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32),
    )


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache: Cache,
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """(what new tokens at consecutive positions see of the cache and of each other, the cache with the valid ones in it).

    The cache holds all that came before, or its last `window`. Rows whose tokens are not valid get values that mean nothing, but finite.
    """
    new, slots = write(cache, k_BTKH, v_BTKH, positions_BT, valid_BT), cache.k_BKSH.shape[2]
    if q_BTNH.shape[1] == 1:  # what a single token overwrites has just left its window, so it reads the cache as it stands
        return attend(q_BTNH, new, positions_BT, held(positions_BT[:, 0], slots), window), new
    # Of more tokens the later would overwrite what the earlier see: they read the cache as it was, and themselves.
    own = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
    both = Cache(*(jnp.concatenate(parts, axis=2) for parts in zip(cache, own, strict=True)))
    held_BS = jnp.concatenate([held(positions_BT[:, 0] - 1, slots), positions_BT], axis=1)
    return attend(q_BTNH, both, positions_BT, held_BS, window), new
