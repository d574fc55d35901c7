"""Attention over tokens on several devices against the reference on one. The devices are those of a vmap: collectives work on its axis."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.attention import jax_attention, reference_attention
from nanojax.ops.attention_context import AXIS, key_heads, over_context

B, T, N, H = 2, 16, 12, 8
SEGMENTS = jnp.asarray([[1] * 3 + [2] * 10 + [3] * 3, [1] * 16], jnp.int32)  # the second document crosses the borders of 2 and of 4 shards


def shards(x: jax.Array, devices: int) -> jax.Array:
    """[B, T, ...] -> [devices, B, T / devices, ...], in order."""
    return jnp.stack(jnp.split(x, devices, axis=1))


def with_gradients(attention, q, k, v, cotangent):
    """(output, dq, dk, dv), the forward pass done again backward, as rematerialisation has it."""
    out, vjp = jax.vjp(jax.checkpoint(attention), q, k, v)
    return out, *vjp(cotangent)


@pytest.mark.parametrize(
    ("context", "kv_heads", "window", "packed"),
    [
        (2, 2, None, True),
        (2, 12, 3, False),  # a window within a shard of 8 tokens
        (4, 2, 7, True),  # and one over three shards of 4; each head of keys on two devices
        (4, 6, None, False),  # each head of keys twice, and three on a device
    ],
)
def test_it_is_attention_on_one_device(context, kv_heads, window, packed):
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (N, kv_heads, kv_heads, N))
    segments = SEGMENTS if packed else None

    def on_a_device(q, k, v, segments):
        return over_context(reference_attention, context)(q, k, v, window=window, segments_BT=segments)

    def whole(q, k, v):
        return reference_attention(q, k, v, window=window, segments_BT=segments)

    def cut(q, k, v):
        parts = [None if x is None else shards(x, context) for x in (q, k, v, segments)]
        out = jax.vmap(on_a_device, in_axes=(0, 0, 0, 0 if packed else None), axis_name=AXIS)(*parts)
        return jnp.concatenate(list(out), axis=1)

    got, want = (jax.jit(functools.partial(with_gradients, attention))(q, k, v, cotangent) for attention in (cut, whole))
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)  # float32 up to 10; what copies of a key get is added up last


@pytest.mark.parametrize(("kv_heads", "context", "dealt"), [(6, 2, 6), (2, 4, 4), (1, 2, 2), (12, 4, 12), (6, 4, 12)])
def test_heads_of_keys_are_copied_no_more_often_than_they_must(kv_heads, context, dealt):
    assert key_heads(kv_heads, context) == dealt
    # The devices along context, then the queries of a device, go evenly over them.
    assert dealt % context == dealt % kv_heads == 0


def test_a_kernel_sees_whole_rows_and_its_share_of_the_heads():
    seen = []

    def kernel(q, k, v, *, window, segments_BT):
        seen.append((q.shape, k.shape, v.shape, window, segments_BT.shape))
        return jax_attention(q, k, v, implementation="xla", window=window, segments_BT=segments_BT)

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, B, T // 4, heads, H)), jnp.float32) for heads in (N, 2, 2))
    run = jax.vmap(lambda q, k, v, s: over_context(kernel, 4)(q, k, v, window=7, segments_BT=s), axis_name=AXIS)
    assert jax.eval_shape(run, q, k, v, shards(SEGMENTS, 4)).shape == (4, B, T // 4, N, H)
    assert seen == [((B, T, 3, H), (B, T, 1, H), (B, T, 1, H), 7, (B, T))]
