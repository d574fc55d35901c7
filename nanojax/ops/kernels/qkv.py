"""Queries, keys and values, whose gradients come back through one product instead of three that are added up.

B batch, T tokens, D model, N query heads, K key and value heads, H head size, Y all of these heads.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.kernels.norm_rope import Place, backward_into, norm_rope
from nanojax.ops.kernels.spread import HEADS, PARTS, ROWS, TABLE, Spread
from nanojax.ops.products import PLAIN_PRODUCTS, Products
from nanojax.ops.rope import Rope

Three = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]


class How(NamedTuple):
    """What does not change with the data."""

    head_dim: int
    spread: Spread
    products: Products = PLAIN_PRODUCTS
    interpret: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def qkv(x_BTD: Float[Array, "B T D"], ws: tuple[Array, ...], gains: tuple[Array, Array], rope: Rope, how: How) -> Three:
    """(norm_rope(x wq, gain), norm_rope(x wk, gain), x wv) for the three matrices [D, heads * H]."""
    return _qkv_forward(x_BTD, ws, gains, rope, how)[0]


def _qkv_forward(x_BTD: Array, ws: tuple[Array, ...], gains: tuple[Array, Array], rope: Rope, how: How):
    ys, kept = how.products.forward(x_BTD, ws)
    q, k, v = (y.reshape(*x_BTD.shape[:2], -1, how.head_dim) for y in ys)
    turn = how.spread(lambda x, gain, rope: norm_rope(x, gain, rope, how.interpret), (HEADS, (), TABLE), HEADS)
    return (turn(q, gains[0], rope), turn(k, gains[1], rope), v), (kept, gains, rope, q, k)


def _qkv_backward(how: How, kept: Any, cotangents: Three):
    operands, gains, rope, q, k = kept

    def side_by_side(raw, cotangents, gains, rope):
        (q, k), (dq, dk, dv) = raw, cotangents
        n, kv = q.shape[2], k.shape[2]
        dy, parts_q = backward_into(q, gains[0], rope, dq, Place(0, n + 2 * kv, None), how.interpret)
        dy, parts_k = backward_into(k, gains[1], rope, dk, Place(n, n + 2 * kv, dy), how.interpret)
        dy = dy.at[:, (n + kv) * how.head_dim :].set(dv.reshape(len(dy), -1))
        return dy.reshape(*q.shape[:2], -1), parts_q, parts_k

    spread = how.spread(side_by_side, (HEADS, HEADS, (), TABLE), [ROWS, PARTS, PARTS])
    dy_BTY, *parts = spread((q, k), cotangents, gains, rope)
    dx_BTD, dw_DY = how.products.backward(operands, dy_BTY)
    ends = [q.shape[2] * how.head_dim, (q.shape[2] + k.shape[2]) * how.head_dim]
    dgains = tuple(jnp.sum(part, axis=0).astype(gain.dtype) for part, gain in zip(parts, gains, strict=True))
    return dx_BTD, tuple(jnp.split(dw_DY, ends, axis=1)), dgains, jax.tree.map(jnp.zeros_like, rope)


qkv.defvjp(_qkv_forward, _qkv_backward)
