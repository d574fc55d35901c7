"""Attention of one new token a row to its cache: norms, rotation, the write to the cache and the reading of it in one pass.

B batch, N query heads, K key and value heads, G = N / K, H head size, S slots, Y = N + 2K heads that the
projections make, X = N H, P parts, C = H / 2 pairs.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from nanojax.ops.cache import Cache, cached_attention
from nanojax.ops.kernels.matvec import AS_IS, Feed
from nanojax.ops.norm import EPS, rms_norm
from nanojax.ops.rope import rotate

SLOTS_AT_ONCE, WARPS = 64, 4
NOTHING = -1e30  # a score of what is not seen; finite, so that differences of two are numbers


class NewTokens(NamedTuple):
    """One more token of each row, projected."""

    qkv_BYH: Float[Array, "B Y H"]
    """Queries, keys, values."""
    rope_2BC: Float[Array, "2 B C"]
    """The first halves of what `rope_table` makes: cosine, and minus sine."""
    position_B: Int[Array, " B"]
    valid_B: Bool[Array, " B"]
    """Whether the token is to be in the cache. What one sees that is not means nothing."""
    came_BK: Int[Array, "B K"]
    """Zeros, in which instances that share a head count who is done. Handed from layer to layer: zeroing takes as long as joining."""


Gains = tuple[Float[Array, " H"], Float[Array, " H"]]
"""Of the norms on queries and keys."""


def decode_attention_reference(
    new: NewTokens, cache: Cache, gains: Gains | None, *, window: int | None = None, feed: Feed = AS_IS
) -> tuple[Array, Cache, Array]:
    """`decode_attention` by the functions that prompts are read with."""
    kv_heads = cache.k_BKSH.shape[1]
    cuts = (new.qkv_BYH.shape[1] - 2 * kv_heads, new.qkv_BYH.shape[1] - kv_heads)
    q_B1NH, k_B1KH, v_B1KH = (x[:, None] for x in jnp.split(new.qkv_BYH, cuts, axis=1))
    if gains is not None:
        q_B1NH, k_B1KH = rms_norm(q_B1NH, gains[0]), rms_norm(k_B1KH, gains[1])
    cos_BC, minus_sin_BC = new.rope_2BC
    rope = (jnp.concatenate([cos_BC, cos_BC], axis=1)[:, None], jnp.concatenate([minus_sin_BC, -minus_sin_BC], axis=1)[:, None])
    q_B1NH, k_B1KH = rotate(q_B1NH, rope), rotate(k_B1KH, rope)
    y_B1NH, cache = cached_attention(q_B1NH, k_B1KH, v_B1KH, cache, new.position_B[:, None], new.valid_B[:, None], window)
    y_BX = y_B1NH.reshape(len(y_B1NH), -1)
    return feed.of(y_BX, y_BX.dtype).astype(y_BX.dtype), cache, new.came_BK


def best_parts(instances: int, slots: int) -> int:
    """How many share a head's slots, where a batch has so many heads; by measurements on an H200 (scripts/bench/LOG.md)."""
    parts = 1
    while parts < 8 and instances * parts < 128 and slots // (2 * parts) >= SLOTS_AT_ONCE:
        parts *= 2
    return parts


def decode_attention(
    new: NewTokens,
    cache: Cache,
    gains: Gains | None,
    *,
    window: int | None = None,
    feed: Feed = AS_IS,
    parts: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B X"], Cache, Int[Array, "B K"]]:
    """(what each new token sees, the cache with it in it where valid, `came_BK` as it was), like `cached_attention` of one token.

    No `gains`: there are no norms. `feed`: of the matrix that takes the result. `parts`, a power of two: instances that share a head's
    slots; the last of them joins what they found. The cache and `came_BK` are written in place where donated.
    """
    batch, heads, size = new.qkv_BYH.shape
    _, kv_heads, slots, _ = cache.k_BKSH.shape
    queries = heads - 2 * kv_heads
    parts = parts or best_parts(batch * kv_heads, slots)
    arrays = [new.qkv_BYH, new.rope_2BC, *(gains or ()), new.position_B.astype(jnp.int32), new.valid_B.astype(jnp.int32)]
    arrays += [*cache, new.came_BK]

    def whole(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda b, k, p: (0,) * len(x.shape))

    results = [jax.ShapeDtypeStruct((batch, queries * size), new.qkv_BYH.dtype)]
    if parts > 1:  # largest score and sum of weights of each part and head, weighted values in the order of the result
        sums = jax.ShapeDtypeStruct((batch, parts, queries), jnp.float32)
        results += [sums, sums, jax.ShapeDtypeStruct((batch, parts, queries * size), jnp.float32)]
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*cache, new.came_BK)]
    job = _Job(gains is not None, queries // kv_heads, kv_heads, size // 2, slots, window, parts, feed, interpret)
    y_BX, *_, k_BKSH, v_BKSH, came_BK = pl.pallas_call(
        functools.partial(_kernel, job),
        out_shape=results,
        grid=(batch, kv_heads, parts),
        in_specs=[whole(x) for x in arrays],
        out_specs=[whole(x) for x in results],
        input_output_aliases={len(arrays) - n: len(results) - n for n in (1, 2, 3)},
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="decode_attention",
        interpret=interpret,
    )(*arrays)
    return y_BX, Cache(k_BKSH, v_BKSH), came_BK


class _Job(NamedTuple):
    """What a kernel is compiled for."""

    normed: bool
    group: int
    kv_heads: int
    half: int
    slots: int
    window: int | None
    parts: int
    feed: Feed
    interpret: bool


def _kernel(job: _Job, qkv_ref, rope_ref, *refs):
    """One instance: one key and value head of one row, and a part of its slots."""
    q_gain, k_gain = refs[:2] if job.normed else (None, None)
    position_ref, valid_ref, k_ref, v_ref, _, y_ref, *part_refs, new_k_ref, new_v_ref, came_ref = refs[2 * job.normed :]
    b, k, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    halves, dtype, position = (pl.ds(0, job.half), pl.ds(job.half, job.half)), k_ref.dtype, position_ref[b]
    angle, queries = [rope_ref[i, b, :] for i in range(2)], job.group * job.kv_heads

    step = min(SLOTS_AT_ONCE, 1 << (job.slots // job.parts).bit_length() - 1)
    turns = -(-job.slots // (step * job.parts))
    used = (jnp.minimum(position, job.slots) + step - 1) // step

    def place(i):
        """(first slot of a turn, where it is read): parts take turns, so that those of a short text share it; the last is moved back."""
        first = (i * job.parts + part) * step
        return first, jnp.minimum(first, job.slots - step)

    def load(i):
        at = pl.ds(place(i)[1], step)
        return *(k_ref[b, k, at, half] for half in halves), v_ref[b, k, at, :]

    def turned(head, gain_ref):
        gains = None if gain_ref is None else [gain_ref[at] for at in halves]
        return _turned([qkv_ref[b, head, at] for at in halves], gains, angle)

    first = load(0)  # on its way while the new token is normalised
    asked = [[x / math.sqrt(2 * job.half) for x in turned(k * job.group + g, q_gain)] for g in range(job.group)]
    key, value = turned(queries + k, k_gain), qkv_ref[b, queries + job.kv_heads + k, :].astype(jnp.float32)

    @pl.when((part == 0) & (valid_ref[b] != 0))
    def _():
        slot = position % job.slots
        new_k_ref[b, k, slot, halves[0]], new_k_ref[b, k, slot, halves[1]] = (x.astype(dtype) for x in key)
        new_v_ref[b, k, slot, :] = value.astype(dtype)

    # The token itself is taken from registers, by the first part: in memory it appears at any time.
    own = (part == 0).astype(jnp.float32)
    states = tuple((jnp.sum(x[0] * key[0] + x[1] * key[1]), own, own * value) for x in asked)

    def read(i, carry):
        tile, states = carry
        following, (begin, at) = load(jnp.minimum(i + 1, turns - 1)), place(i)
        slot = at + jnp.arange(step)
        # The slot of the position before holds that, the slot before the position before it, and so on, round the ring.
        behind = 1 + (position - 1 - slot + job.slots) % job.slots
        seen = (slot >= begin) & (behind <= position) & (behind < (job.slots if job.window is None else job.window))
        low, high, values = (x.astype(jnp.float32) for x in tile)
        return following, tuple(_softmax_step(x, state, (low, high), values, seen) for x, state in zip(asked, states, strict=True))

    _, states = jax.lax.fori_loop(0, (used - part + job.parts - 1) // job.parts, read, (first, states))
    found = [(k * job.group + g, state) for g, state in enumerate(states)]
    if job.parts > 1:
        _join(job, found, part_refs, y_ref, came_ref)
    else:
        for head, (_, total, y) in found:
            y_ref[b, _places(job, head)] = (y / total * job.feed.growth).astype(y_ref.dtype)


def _places(job: _Job, head: Any) -> Array:
    """Where a head's values lie in the result."""
    size = 2 * job.half
    return job.feed.at(head * size + jnp.arange(size), job.group * job.kv_heads * size)


def _join(job: _Job, found: list[tuple[Any, Any]], part_refs, y_ref, came_ref):
    """Leaves what an instance found of its heads; the last of those that share them makes one softmax of all their parts."""
    most_ref, total_ref, sum_ref = part_refs
    b, k, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    for head, (most, total, y) in found:
        most_ref[b, part, head], total_ref[b, part, head], sum_ref[b, part, _places(job, head)] = most, total, y
    if not job.interpret:
        triton.debug_barrier()  # all threads of the instance have written; the addition then shows it to those that come later
    came = triton.atomic_add(came_ref, (b, k), jnp.ones((), jnp.int32))

    @pl.when(came == job.parts - 1)
    def _():
        came_ref[b, k] = 0
        for head, _ in found:
            at, shape = _places(job, head), (job.parts, 2 * job.half)
            scale_P = jnp.exp(most_ref[b, :, head] - jnp.max(most_ref[b, :, head]))
            total = jnp.sum(total_ref[b, :, head] * scale_P)
            sums_PH = sum_ref[b, jnp.broadcast_to(jnp.arange(job.parts)[:, None], shape), jnp.broadcast_to(at[None], shape)]
            y_ref[b, at] = (jnp.sum(sums_PH * scale_P[:, None], axis=0) / total * job.feed.growth).astype(y_ref.dtype)


def _turned(head, gains, angle):
    """A head's two halves, normalised and rotated, rounded where `rms_norm` and `rotate` round."""
    dtype = head[0].dtype
    x, y = (half.astype(jnp.float32) for half in head)
    if gains is not None:
        over = jax.lax.rsqrt(jnp.sum(x * x + y * y) / (2 * x.shape[0]) + EPS)
        x, y = (
            (half * over * gain.astype(jnp.float32)).astype(dtype).astype(jnp.float32) for half, gain in zip((x, y), gains, strict=True)
        )
    cos, minus_sin = angle
    return [half.astype(dtype).astype(jnp.float32) for half in (x * cos + y * minus_sin, y * cos - x * minus_sin)]


def _softmax_step(x, state, keys, values, seen):
    """(largest score, sum of weights, sum of weighted values) after some more keys. Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3."""
    most, total, y = state
    scores = jnp.where(seen, jnp.sum(keys[0] * x[0][None] + keys[1] * x[1][None], axis=1), NOTHING)
    new = jnp.maximum(most, jnp.max(scores))
    kept, weights = jnp.exp(most - new), jnp.where(seen, jnp.exp(scores - new), 0.0)
    return new, total * kept + jnp.sum(weights), y * kept + jnp.sum(values * weights[:, None], axis=0)
