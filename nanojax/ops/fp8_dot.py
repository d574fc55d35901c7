"""A matrix product whose operands are rounded to 8 bits, forward and backward: Micikevicius et al. 2022, arXiv:2209.05433.

A tensor has one scale, made from its own largest value ("current scaling"). Letters: B batch, T tokens, I in, O out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.dot import dot

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


class Scaled(NamedTuple):
    """A tensor in 8 bits."""

    values: Array
    scale: Float[Array, ""]
    """float32; what the values are multiplied by."""


def fp8_dot(x_BTI: Float[Array, "B T I"], w_IO: Float[Array, "I O"], *, name: str, key: Array | None = None) -> Float[Array, "B T O"]:
    """x @ w in the type of x, of both in E4M3; dx and dw are products of what was rounded forward and of dy in E5M2.

    Without a `key`, from which nothing is drawn, it is the plain product: weights that are left out, and evaluation. What is not
    finite makes the whole result NaN.
    """
    if key is None:
        return dot(x_BTI, w_IO, name=name)
    return rounded_dot(x_BTI, w_IO.astype(x_BTI.dtype))


def to_fp8(x: Array, dtype: DTypeLike) -> Scaled:
    """The nearest values on the grid of an 8-bit type whose largest number is that of x; NaN where x is not finite."""
    top = float(jnp.finfo(dtype).max)
    # No smaller than a normal number: processors that flush denormals would divide by zero.
    scale = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32) / top, jnp.finfo(jnp.float32).tiny)
    # Cut off: the largest number, times a scale that was rounded, may lie beyond the grid, where E4M3 has nothing but NaN.
    return Scaled(jnp.clip(x.astype(jnp.float32) / scale, -top, top).astype(dtype), scale)


def product(subscripts: str, a: Scaled, b: Scaled, dtype: DTypeLike) -> Array:
    """An einsum of two in 8 bits, summed in float32, in `dtype`."""
    # Operands go in as they are. Widened first, they would be given back by XLA as they were before they were narrowed.
    y = jnp.einsum(subscripts, a.values, b.values, preferred_element_type=dtype)
    return (y * a.scale * b.scale).astype(dtype)  # not by their product, which may be too small for float32


@jax.custom_vjp
def rounded_dot(x_BTI: Array, w_IO: Array) -> Array:
    """`fp8_dot` with a key."""
    return rounded_dot_forward(x_BTI, w_IO)[0]


def rounded_dot_forward(x_BTI, w_IO):
    """The product, and its operands in 8 bits, which are those of the backward pass."""
    x, w = to_fp8(x_BTI, E4M3), to_fp8(w_IO, E4M3)
    return product("BTI,IO->BTO", x, w, x_BTI.dtype), (x, w, jnp.zeros((), w_IO.dtype))


def rounded_dot_backward(operands, dy_BTO):
    """The two gradients."""
    x, w, like = operands
    dy = to_fp8(dy_BTO, E5M2)
    return product("BTO,IO->BTI", dy, w, dy_BTO.dtype), product("BTI,BTO->IO", x, dy, jnp.float32).astype(like.dtype)


rounded_dot.defvjp(rounded_dot_forward, rounded_dot_backward)
