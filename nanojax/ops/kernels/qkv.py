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
from nanojax.ops.kernels.turn_back import TURN_BACK
from nanojax.ops.norm import Normed, gradient_like
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
def qkv(
    x_BTD: Float[Array, "B T D"] | Normed, ws: tuple[Array, ...], gains: tuple[Array, Array], rope: Rope, how: How, ready: Any = None
) -> Three:
    """(norm_rope(x wq, gain), norm_rope(x wk, gain), x wv) for three matrices [D, heads * H]; `ready` is what was made of them before."""
    return _qkv_forward(x_BTD, ws, gains, rope, how, ready)[0]


def _qkv_forward(x_BTD: Array | Normed, ws: tuple[Array, ...], gains: tuple[Array, Array], rope: Rope, how: How, ready: Any = None):
    ys, kept = how.products.forward(x_BTD, ws, ready)
    q, k, v = (y.reshape(*x_BTD.shape[:2], -1, how.head_dim) for y in ys)
    turn = how.spread(lambda x, gain, rope: norm_rope(x, gain, rope, how.interpret), (HEADS, (), TABLE), HEADS)
    return (turn(q, gains[0], rope), turn(k, gains[1], rope), v), (x_BTD, kept, gains, rope, q, k)


def _qkv_backward(how: How, kept: Any, cotangents: Three):
    x_BTD, operands, gains, rope, q, k = kept
    widths = q.shape[2] * how.head_dim, (q.shape[2] + k.shape[2]) * how.head_dim
    if how.products.backward_of is not None:
        known = tuple(gain.astype(jnp.float32) for gain in gains)
        dx_BTD, dw_DY, sums_PNH = how.products.backward_of(operands, TURN_BACK, (q, k, *cotangents, *known, *rope))
        assert sums_PNH is not None
        parts = jnp.split(sums_PNH.reshape(*sums_PNH.shape[:2], -1), [q.shape[2]], axis=1)
        dgains = tuple(jnp.sum(part, axis=(0, 1)).astype(gain.dtype) for part, gain in zip(parts, gains, strict=True))
        return gradient_like(x_BTD, dx_BTD), tuple(jnp.split(dw_DY, widths, axis=1)), dgains, jax.tree.map(jnp.zeros_like, rope), None

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
    dgains = tuple(jnp.sum(part, axis=0).astype(gain.dtype) for part, gain in zip(parts, gains, strict=True))
    return gradient_like(x_BTD, dx_BTD), tuple(jnp.split(dw_DY, widths, axis=1)), dgains, jax.tree.map(jnp.zeros_like, rope), None


qkv.defvjp(_qkv_forward, _qkv_backward)
