"""A matrix product whose operands are rounded to 8 bits, forward and backward: Micikevicius et al. 2022, arXiv:2209.05433.

A tensor has one scale, a power of two made from its own values ("current scaling"): for a matrix the smallest into which its largest
fits, for activations and gradients at most 4 times that (kernels/both_ways.py). Letters: B batch, T tokens, N of both, I in, O out, Y the
outs of several matrices side by side.
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
from nanojax.ops.kernels.both_ways import GIVEN, Work, both_ways_reference, narrowed, scale_for, size_of
from nanojax.ops.kernels.swiglu import silu_times, silu_times_backward
from nanojax.ops.products import Products, multiply

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
Round = Callable[[Work, tuple[Array, ...], DTypeLike], tuple[Array, Array, Array]]
"""(work, tensors [B, T, _], type) -> what work makes of them, [B, T, I], over a scale and rounded, the same turned [I, N], the scale."""
SWIGLU, SWIGLU_BACKWARD = Work(silu_times, (2,)), Work(silu_times_backward, (2, 1), 2)


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


def to_fp8(x: Array, dtype: DTypeLike) -> Scaled:
    """The nearest values in an 8-bit type; NaN where x is not finite."""
    scale = scale_for(jnp.max(size_of(x)), dtype)
    return Scaled(narrowed(x, scale, dtype), scale)


def to_fp8_both_ways(work: Work, xs: tuple[Array, ...], dtype: DTypeLike, rounded: Round) -> tuple[Scaled, Scaled]:
    """What work makes, in 8 bits, and the same turned: operands are read along what is summed over, which differs forward and backward."""
    values_BTI, turned_IN, scale = rounded(work, xs, dtype)
    return Scaled(values_BTI, scale), Scaled(turned_IN, scale)


def product(subscripts: str, a: Scaled, b: Scaled, dtype: DTypeLike) -> Array:
    """An einsum of two in 8 bits, in `dtype`.

    XLA makes one product of 8 bits of this, scales included, which are powers of two so that nothing is rounded where it does not.
    Behind a barrier: it would give values that are narrowed and widened back as they were.
    """
    wide = [jax.lax.optimization_barrier(x.values).astype(dtype) * x.scale.astype(dtype) for x in (a, b)]
    return jnp.einsum(subscripts, *wide, preferred_element_type=dtype)


def forward(xs: tuple[Array, ...], ws: tuple[Array, ...], rounded: Round, work: Work = GIVEN):
    """x @ w for each matrix, all with one scale; x is what work makes of xs."""
    dtype = xs[0].dtype
    (x, turned), w = to_fp8_both_ways(work, xs, E4M3, rounded), to_fp8(jnp.concatenate(ws, axis=1), E4M3)
    parts = jnp.split(w.values, list(itertools.accumulate(w_IO.shape[1] for w_IO in ws))[:-1], axis=1)
    return tuple(product("BTI,IO->BTO", x, Scaled(part, w.scale), dtype) for part in parts), (turned, w)


def backward(kept: tuple[Scaled, Scaled], dys: tuple[Array, ...], rounded: Round, work: Work = GIVEN):
    """The gradients of x and of the matrices side by side; dy [B, T, Y] is what work makes of dys."""
    (x, w), dtype = kept, dys[0].dtype
    dy, turned = to_fp8_both_ways(work, dys, E5M2, rounded)
    return product("BTY,IY->BTI", dy, w, dtype), product("IN,YN->IY", x, turned, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def feed_forward(
    x_BTD: Float[Array, "B T D"], w_both_DY: Float[Array, "D Y"], w_down_FD: Float[Array, "F D"], rounded: Round
) -> Float[Array, "B T D"]:
    """(silu(x w_gate) * (x w_up)) w_down of gate and up side by side, Y = 2F, its elementwise work done where its results are rounded."""
    return _feed_forward(x_BTD, w_both_DY, w_down_FD, rounded)[0]


def _feed_forward(x_BTD: Array, w_both_DY: Array, w_down_FD: Array, rounded: Round):
    with jax.named_scope("gate_up"):
        (both_BTY,), kept_both = forward((x_BTD,), (w_both_DY,), rounded)
    with jax.named_scope("down"):
        (y_BTD,), kept_down = forward((both_BTY,), (w_down_FD,), rounded, SWIGLU)
    return y_BTD, (both_BTY, kept_both, kept_down)


def _feed_forward_backward(rounded: Round, kept: tuple[Array, tuple, tuple], dy_BTD: Array):
    both_BTY, kept_both, kept_down = kept
    with jax.named_scope("down"):
        dh_BTF, dw_down_FD = backward(kept_down, (dy_BTD,), rounded)
    with jax.named_scope("gate_up"):
        dx_BTD, dw_both_DY = backward(kept_both, (both_BTY, dh_BTF), rounded, SWIGLU_BACKWARD)
    return dx_BTD, dw_both_DY, dw_down_FD


feed_forward.defvjp(_feed_forward, _feed_forward_backward)


@functools.cache
def fp8_products(rounded: Round) -> Products:
    """Of matrices that share what they multiply; `rounded` rounds it, and what comes back."""
    return Products(
        lambda x, ws: forward((x,), ws, rounded),
        lambda kept, dy: backward(kept, (dy,), rounded),
        lambda x, w_both, w_down: feed_forward(x, w_both, w_down, rounded),
    )
