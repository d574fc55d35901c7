"""A matrix product whose operands are rounded to 8 bits, forward and backward: Micikevicius et al. 2022, arXiv:2209.05433.

A tensor has one scale, a power of two made from its own largest value ("current scaling"). Letters: B batch, T tokens, N of both,
I in, O out, Y the outs of several matrices side by side.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.dot import dot
from nanojax.ops.kernels.both_ways import both_ways_reference, narrowed
from nanojax.ops.products import Products, multiply

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
Round = Callable[[Array, Array, DTypeLike], tuple[Array, Array]]
"""(x [B, T, I], scale, type) -> x / scale rounded, and the same turned [I, N]."""


class Scaled(NamedTuple):
    """A tensor in 8 bits."""

    values: Array
    scale: Float[Array, ""]
    """float32; what the values are multiplied by."""


def fp8_dot(
    x_BTI: Float[Array, "B T I"], w_IO: Float[Array, "I O"], *, name: str, key: Array | None = None, rounded: Round = both_ways_reference
) -> Float[Array, "B T O"]:
    """x @ w in the type of x, of both in E4M3; dx and dw are products of what was rounded forward and of dy in E5M2.

    Without a `key`, from which nothing is drawn, it is the plain product: weights that are left out, and evaluation. What is not
    finite makes the whole result NaN. `rounded` rounds x and dy.
    """
    if key is None:
        return dot(x_BTI, w_IO, name=name)
    return multiply(x_BTI, w_IO.astype(x_BTI.dtype), fp8_products(rounded))


def scale_of(x: Array, dtype: DTypeLike) -> Float[Array, ""]:
    """The smallest power of two that, as scale, lets all of x into an 8-bit type; NaN where x is not finite."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    fraction, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    # Normal numbers, and their reciprocals too: processors that flush denormals would divide by zero.
    scale = jnp.ldexp(jnp.float32(1), jnp.clip(jnp.where(fraction == 0.5, exponent - 1, exponent), -126, 126))
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def to_fp8(x: Array, dtype: DTypeLike) -> Scaled:
    """The nearest values in an 8-bit type; NaN where x is not finite."""
    scale = scale_of(x, dtype)
    return Scaled(narrowed(x, scale, dtype), scale)


def both_ways(x_BTI: Float[Array, "B T I"], dtype: DTypeLike, rounded: Round) -> tuple[Scaled, Scaled]:
    """x in 8 bits, and [I, N]: products of 8 bits read operands along what is summed over, not the same forward and backward."""
    scale = scale_of(x_BTI, dtype)
    values_BTI, turned_IN = rounded(x_BTI, scale, dtype)
    return Scaled(values_BTI, scale), Scaled(turned_IN, scale)


def product(subscripts: str, a: Scaled, b: Scaled, dtype: DTypeLike) -> Array:
    """An einsum of two in 8 bits, in `dtype`.

    XLA makes one product of 8 bits of this, scales included, which are powers of two so that nothing is rounded where it does not.
    Behind a barrier: it would give values that are narrowed and widened back as they were.
    """
    wide = [jax.lax.optimization_barrier(x.values).astype(dtype) * x.scale.astype(dtype) for x in (a, b)]
    return jnp.einsum(subscripts, *wide, preferred_element_type=dtype)


def forward(x_BTI: Array, ws: tuple[Array, ...], rounded: Round):
    """x @ w for each matrix, all with one scale."""
    (x, turned), w = both_ways(x_BTI, E4M3, rounded), to_fp8(jnp.concatenate(ws, axis=1), E4M3)
    parts = jnp.split(w.values, list(itertools.accumulate(w_IO.shape[1] for w_IO in ws))[:-1], axis=1)
    return tuple(product("BTI,IO->BTO", x, Scaled(part, w.scale), x_BTI.dtype) for part in parts), (turned, w)


def backward(kept: tuple[Scaled, Scaled], dy_BTY: Array, rounded: Round):
    """The gradients of x and of the matrices side by side."""
    x, w = kept
    dy, turned = both_ways(dy_BTY, E5M2, rounded)
    dx_BTI = product("BTY,IY->BTI", dy, w, dy_BTY.dtype)
    return dx_BTI, product("IN,YN->IY", x, turned, dy_BTY.dtype)


@functools.cache
def fp8_products(rounded: Round) -> Products:
    """Of matrices that share what they multiply; `rounded` rounds it, and what comes back."""
    return Products(functools.partial(forward, rounded=rounded), functools.partial(backward, rounded=rounded))
