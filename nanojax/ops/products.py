"""One input times several matrices, as a function each way: what a gradient that is written out calls instead of autodiff.

B batch, T tokens, I in, O out, Y the outs of all matrices together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.kernels.work import Work


class Products(NamedTuple):
    """How to multiply. What the first function keeps is what the second is given."""

    forward: Callable[[Any, tuple[Array, ...], Any], tuple[tuple[Array, ...], Any]]
    """(x [B, T, I], or a Normed where norms are `later`, matrices [I, O] in its type, what was made of them before or None) -> (x @ each,
    what is kept).
    """
    backward: Callable[[Any, Array], tuple[Array, Array]]
    """(what was kept, gradients of the results side by side [B, T, Y]) -> those of x and of the matrices side by side [I, Y]."""
    backward_of: Callable[[Any, Work, tuple[Array, ...]], tuple[Array, Array, Array | None]] | None = None
    """`backward` of gradients that are made of others (kernels/work.py), and what is summed on the way; or None where they are made
    first.
    """
    feed_forward: Callable[[Any, Array, Array, tuple[Any, Any]], Array] | None = None
    """(x [B, T, D], gate and up side by side [D, 2F], down [F, D], what was made of these two before) -> SwiGLU's feed-forward, or None
    where its work is apart.
    """
    later: bool = False
    """Whether a norm may be left to them."""


def forward(x_BTI: Float[Array, "B T I"], ws: tuple[Array, ...], ready: Any = None):
    """x @ w for each."""
    del ready
    return tuple(x_BTI @ w_IO for w_IO in ws), (x_BTI, ws)


def backward(kept: tuple[Array, tuple[Array, ...]], dy_BTY: Float[Array, "B T Y"]):
    """One product each, instead of one a matrix and their sum."""
    x_BTI, ws = kept
    # Not by a transposed copy: on a mesh XLA gathers one again, where it has the matrix from the way forward.
    return jnp.einsum("BTY,IY->BTI", dy_BTY, jnp.concatenate(ws, axis=1)), jnp.einsum("BTI,BTY->IY", x_BTI, dy_BTY)


PLAIN_PRODUCTS = Products(forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(x_BTI: Float[Array, "B T I"], w_IO: Float[Array, "I O"], products: Products, ready: Any = None) -> Float[Array, "B T O"]:
    """x @ w by these products; `ready` is what was made of w before."""
    return _multiply_forward(x_BTI, w_IO, products, ready)[0]


def _multiply_forward(x_BTI: Array, w_IO: Array, products: Products, ready: Any = None):
    (y_BTO,), kept = products.forward(x_BTI, (w_IO,), ready)
    return y_BTO, kept


def _multiply_backward(products: Products, kept: Any, dy_BTO: Array):
    return *products.backward(kept, dy_BTO), None


multiply.defvjp(_multiply_forward, _multiply_backward)
