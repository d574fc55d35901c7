"""A cache in a ring, held to attention over all keys at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops import cache as cache_module
from nanojax.ops.attention import reference_attention
from nanojax.ops.cache import cached_attention, empty_cache, grow, held

H = 4
write, reference = jax.jit(cache_module.write), jax.jit(reference_attention, static_argnames="window")
cached = jax.jit(cached_attention, static_argnames="window")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_slot_holds_the_newest_position_that_belongs_in_it():
    np.testing.assert_array_equal(held(jnp.array([5, 3, 1]), 4), [[4, 5, 2, 3], [0, 1, 2, 3], [0, 1, -2, -1]])


def in_pieces(q, k, v, pieces, *, slots, window):
    """What tokens see that come in pieces of these lengths."""
    cache, seen, start = empty_cache(q.shape[0], k.shape[2], slots, H, jnp.float32), [], 0
    for length in pieces:
        part = slice(start, start + length)
        positions = jnp.broadcast_to(jnp.arange(start, start + length)[None], (q.shape[0], length))
        y, cache = cached(q[:, part], k[:, part], v[:, part], cache, positions, positions >= 0, window=window)
        seen.append(y)
        start += length
    return np.concatenate(seen, axis=1)


@pytest.mark.parametrize(("kv_heads", "slots", "window"), [(2, 12, None), (2, 16, 5), (2, 5, 5), (2, 1, 1), (4, 5, 5), (1, 12, None)])
def test_tokens_in_pieces_see_what_they_see_at_once(kv_heads, slots, window):
    """Rings of just the window wrap round several times, within a piece of 7 too."""
    q, k, v = random(2, 12, 4, H), random(2, 12, kv_heads, H, seed=1), random(2, 12, kv_heads, H, seed=2)
    at_once = reference(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), window=window)
    for pieces in ([12], [1] * 12, [3, 1, 1, 7]):
        y = in_pieces(q, k, v, pieces, slots=slots, window=window)
        np.testing.assert_allclose(y, at_once, atol=2e-6)  # float32, |values| of order 1, sums in another order


def test_tokens_that_are_not_valid_leave_no_trace_in_a_ring_that_goes_round():
    k, v = random(2, 6, 1, H), random(2, 6, 1, H, seed=1)
    positions = jnp.arange(6)[None] + jnp.zeros((2, 1), jnp.int32)
    valid = jnp.array([[True] * 6, [True] * 2 + [False] * 4])
    cache = write(empty_cache(2, 1, 4, H, jnp.float32), jnp.asarray(k), jnp.asarray(v), positions, valid)
    np.testing.assert_array_equal(cache.k_BKSH[0, 0], k[0, [4, 5, 2, 3], 0])
    np.testing.assert_array_equal(cache.v_BKSH[1, 0], np.concatenate([v[1, :2, 0], np.zeros((2, H))]))
    backwards = (jnp.asarray(x[:, ::-1]) for x in (k, v, positions, valid))  # which token comes last makes no difference
    np.testing.assert_array_equal(write(empty_cache(2, 1, 4, H, jnp.float32), *backwards).k_BKSH, cache.k_BKSH)
    again = write(cache, jnp.asarray(k), jnp.asarray(v), positions + 6, valid & False)
    np.testing.assert_array_equal(again.k_BKSH, cache.k_BKSH)


def test_a_row_that_is_not_valid_stays_finite():
    q, k = jnp.asarray(random(1, 1, 2, H)), jnp.asarray(random(1, 1, 1, H))
    for tokens in (1, 3):
        position, valid = jnp.zeros((1, tokens), jnp.int32), jnp.zeros((1, tokens), bool)
        many = jnp.tile(k, (1, tokens, 1, 1))
        y, _ = cached(jnp.tile(q, (1, tokens, 1, 1)), many, many, empty_cache(1, 1, 4, H, jnp.float32), position, valid)
        assert np.isfinite(y).all()


def test_a_cache_that_grew_holds_what_it_held():
    k = random(1, 4, 2, H)
    positions = jnp.arange(4)[None]
    small = write(empty_cache(1, 2, 4, H, jnp.float32), jnp.asarray(k), jnp.asarray(k), positions, positions >= 0)
    large = grow(small, 8)
    q, new = jnp.asarray(random(1, 1, 2, H, seed=3)), jnp.asarray(random(1, 1, 2, H, seed=4))
    at = jnp.full((1, 1), 4)
    y, _ = cached(q, new, new, large, at, at > 0)
    every = jnp.concatenate([jnp.asarray(k), new], axis=1)
    whole = reference(jnp.tile(q, (1, 5, 1, 1)), every, every)[:, -1:]
    np.testing.assert_allclose(y, whole, atol=2e-6)  # as above


def test_keys_stay_in_the_type_of_the_cache_and_scores_are_float32():
    for tokens in (1, 3):
        q, k = (jnp.asarray(random(1, tokens, 2, H, seed=s), jnp.bfloat16) for s in (0, 1))
        at = jnp.arange(tokens)[None]
        empty = empty_cache(1, 2, 4, H, jnp.bfloat16)
        y, cache = cached(q, k, k, empty, at, at >= 0)
        assert (y.dtype, cache.k_BKSH.dtype) == (jnp.bfloat16, jnp.bfloat16)
        np.testing.assert_allclose(y.astype(float), reference(q, k, k).astype(float), atol=2e-2)  # 8 bits, |values| < 3
        text = str(jax.make_jaxpr(lambda *a: cached_attention(*a)[0])(q, k, k, empty, at, at >= 0))
        assert text.count("preferred_element_type=float32") >= 2
