"""Decoding's attention kernel against the functions that prompts are read with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.cache import Cache
from nanojax.ops.kernels.decode_attention import NewTokens, best_parts, decode_attention, decode_attention_reference
from nanojax.ops.kernels.matvec import Feed
from nanojax.ops.rope import rope_table

# Slots, window, position of each row: an empty cache, one in its middle, a full one, rings that have gone round.
CASES = {
    "full": (64, None, (0, 5, 63)),
    "long": (256, None, (130, 7, 255)),
    "window of the ring": (64, 64, (3, 64, 1000)),
    "odd ring": (100, 100, (3, 100, 1033)),
    "window in a longer cache": (128, 100, (3, 100, 126)),
}


def make(heads: int, kv_heads: int, size: int, case: str, dtype) -> tuple[NewTokens, Cache, tuple, int | None]:
    slots, window, at = CASES[case]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    position_B = jnp.asarray(at, jnp.int32)
    rope_2BC = jnp.stack([table_B1H[:, 0, : size // 2] for table_B1H in rope_table(position_B[:, None], size, 1e4)])
    none_came = jnp.zeros((3, kv_heads), jnp.int32)
    new = NewTokens(normal(3, heads + 2 * kv_heads, size), rope_2BC, position_B, jnp.ones(3, bool), none_came)
    cache = Cache(normal(3, kv_heads, slots, size), normal(3, kv_heads, slots, size))
    return new, cache, (1 + 0.1 * normal(size), 1 + 0.1 * normal(size)), window


# Heads, heads of keys, parts, feed: each is met, and each case is, before all of them are with all.
SHAPES = [(4, 4, 1, Feed()), (6, 2, 4, Feed(16, 2.0)), (4, 1, 2, Feed()), (4, 2, 1, Feed(32))]
DAILY = {("full", 0), ("long", 1), ("window of the ring", 2), ("odd ring", 3), ("window in a longer cache", 1)}


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        pytest.param(case, shape, id=f"{case}-{n}", marks=() if (case, n) in DAILY else pytest.mark.slow)
        for case in CASES
        for n, shape in enumerate(SHAPES)
    ],
)
def test_it_is_the_attention_of_prompts_for_one_token(case, shape):
    heads, kv_heads, parts, feed = shape
    new, cache, gains, window = make(heads, kv_heads, 16, case, jnp.float32)

    @jax.jit
    def both(new, cache):
        return [
            (
                decode_attention(new, cache, norms, window=window, feed=feed, parts=parts, interpret=True),
                decode_attention_reference(new, cache, norms, window=window, feed=feed),
            )
            for norms in (gains, None)
        ]

    for got, want in both(new, cache):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)  # sums of float32 in another order


def test_a_token_that_is_not_valid_is_not_written():
    new, cache, gains, _ = make(4, 2, 16, "full", jnp.float32)
    new = new._replace(valid_B=jnp.array([True, False, True]))
    _, written, _ = decode_attention(new, cache, gains, interpret=True)
    changed = [(np.asarray(a) != np.asarray(b)).any(axis=(1, 3)) for a, b in zip(cache, written, strict=True)]
    for slots in changed:
        assert [np.flatnonzero(row).tolist() for row in slots] == [[0], [], [63]]


def test_heads_share_their_slots_among_more_instances_while_the_gpu_has_room():
    assert best_parts(10, 256) == 4
    assert best_parts(10, 1024) == 8
    assert best_parts(640, 1024) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "parts"), [(4, 4, 128, 1), (6, 2, 64, 4), (8, 1, 128, 2)])
def test_the_compiled_kernel_agrees_on_a_gpu(heads, kv_heads, size, parts, case):
    new, cache, gains, window = make(heads, kv_heads, size, case, jnp.bfloat16)

    def run(f, **kw):
        return jax.jit(lambda *args: f(*args, window=window, feed=Feed(16), **kw))(new, cache, gains)

    for a, b in zip(run(decode_attention, parts=parts), run(decode_attention_reference), strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=2e-2)  # bf16 of values of order 1
