"""A matrix product whose operands are rounded to 8 bits, forward and backward: Micikevicius et al. 2022, arXiv:2209.05433.

A tensor has one scale, a power of two made from its own values ("current scaling"): for a matrix the smallest into which its largest
fits, for activations and gradients at most 4 times that (kernels/both_ways.py). Letters: B batch, T tokens, N of both, I in, O out, Y the
outs of several matrices side by side.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.dot import dot
from nanojax.ops.kernels.both_ways import Rounded, both_ways_reference, narrowed, scale_for, size_of
from nanojax.ops.kernels.loss_gradient import Made
from nanojax.ops.kernels.swiglu import silu_times, silu_times_backward
from nanojax.ops.kernels.work import GIVEN, NORMED, Each, Work
from nanojax.ops.norm import Normed, gradient_like
from nanojax.ops.products import Products, multiply
from nanojax.ops.xent import Head

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
Round = Callable[[Work, tuple[Array, ...], DTypeLike], Rounded]
"""(work, tensors [B, T, _], type) -> what work makes of them, rounded."""
SWIGLU, SWIGLU_BACKWARD = Each(silu_times, (2,), warps=8), Each(silu_times_backward, (2, 1), 2, warps=8)

Ready = tuple["Matrices | None", "Matrices | None"]
"""Of gates and ups side by side, and of the last matrix."""


class Scaled(NamedTuple):
    """A tensor in 8 bits."""

    values: Array
    scale: Float[Array, ""]
    """float32; what the values are multiplied by."""


class Matrices(NamedTuple):
    """Matrices side by side, in E4M3 with one scale, read along what is summed over: forward in, backward outs."""

    turned: tuple[Float[Array, "_ I"], ...]
    """Each."""
    values: Float[Array, "I Y"]
    scale: Float[Array, ""]

    @classmethod
    def of(cls, ws: Sequence[Float[Array, "I _"]]) -> Matrices:
        """These, rounded."""
        w = to_fp8(jnp.concatenate(ws, axis=1), E4M3)
        ends = list(itertools.accumulate(w_IO.shape[1] for w_IO in ws))[:-1]
        return cls(tuple(jnp.split(w.values.T, ends)), w.values, w.scale)


def fp8_dot(
    x_BTI: Float[Array, "B T I"],
    w_IO: Float[Array, "I O"],
    *,
    name: str,
    key: Array | None = None,
    ready: Matrices | None = None,
    rounded: Round = both_ways_reference,
) -> Float[Array, "B T O"]:
    """x @ w in the type of x, of both in E4M3; dx and dw are products of what was rounded forward and of dy in E5M2.

    Without a `key`, from which nothing is drawn, it is the plain product: weights that are left out, and evaluation. What is not
    finite makes the whole result NaN. `rounded` rounds x and dy, and `ready` is w where it is rounded already.
    """
    if key is None:
        return dot(x_BTI, w_IO, name=name)
    return multiply(x_BTI, w_IO.astype(x_BTI.dtype), fp8_products(rounded), ready)


def to_fp8(x: Array, dtype: DTypeLike) -> Scaled:
    """The nearest values in an 8-bit type; NaN where x is not finite."""
    scale = scale_for(jnp.max(size_of(x)), dtype)
    return Scaled(narrowed(x, scale, dtype), scale)


def to_fp8_both_ways(work: Work, xs: tuple[Array, ...], dtype: DTypeLike, rounded: Round) -> tuple[Scaled, Scaled, Array | None]:
    """(what work makes, in 8 bits; the same turned; its sums): operands are read along what is summed over, which differs by direction."""
    x = rounded(work, xs, dtype)
    return Scaled(x.values, x.scale), Scaled(x.turned, x.scale), x.sums


def product(subscripts: str, a: Scaled, b: Scaled, dtype: DTypeLike, precision: jax.lax.Precision | None = None) -> Array:
    """An einsum of two in 8 bits, in `dtype`.

    Without HIGHEST, Hopper's tensor cores add up with 14 bits below the largest term or sum so far, and cut off the rest (DeepSeek-AI
    2024, arXiv:2412.19437, section 3.5.2).
    XLA makes one product of 8 bits of this, scales included, which are powers of two so that nothing is rounded where it does not.
    Behind a barrier: it would give values that are narrowed and widened back as they were, and scales a kernel that does that to them.
    """
    # One for each: what waits for the other cannot be gathered meanwhile.
    (x, x_scale), (y, y_scale) = map(jax.lax.optimization_barrier, (a, b))
    wide = x.astype(dtype) * x_scale.astype(dtype), y.astype(dtype) * y_scale.astype(dtype)
    return jnp.einsum(subscripts, *wide, preferred_element_type=dtype, precision=precision)


def forward(xs: tuple[Array, ...], ws: tuple[Array, ...], ready: Matrices | None, rounded: Round, work: Work = GIVEN):
    """x @ w for each matrix, all with one scale, or of those that are ready; x is what work makes of xs."""
    (x, turned, _), w = to_fp8_both_ways(work, xs, E4M3, rounded), Matrices.of(ws) if ready is None else ready
    ys = tuple(product("BTI,OI->BTO", x, Scaled(part, w.scale), xs[0].dtype) for part in w.turned)
    return ys, (turned, Scaled(w.values, w.scale))


def backward(kept: tuple[Scaled, Scaled], dys: tuple[Array, ...], rounded: Round, work: Work = GIVEN) -> tuple[Array, Array, Array | None]:
    """The gradients of x and of the matrices side by side, and the work's sums; dy [B, T, Y] is what work makes of dys."""
    (x, w), dtype, (dy, turned, sums) = kept, dys[0].dtype, to_fp8_both_ways(work, dys, E5M2, rounded)
    return product("BTY,IY->BTI", dy, w, dtype), product("IN,YN->IY", x, turned, dtype), sums


def of_norm(x_BTI: Array | Normed, ws: tuple[Array, ...], ready: Matrices | None, rounded: Round):
    """`forward` of an array, or of a norm that is made where it is rounded."""
    return forward(tuple(x_BTI), ws, ready, rounded, NORMED) if isinstance(x_BTI, Normed) else forward((x_BTI,), ws, ready, rounded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def feed_forward(
    x_BTD: Float[Array, "B T D"] | Normed, w_both_DY: Float[Array, "D Y"], w_down_FD: Float[Array, "F D"], ready: Ready, rounded: Round
) -> Float[Array, "B T D"]:
    """(silu(x w_gate) * (x w_up)) w_down of gate and up side by side, Y = 2F, its elementwise work done where its results are rounded."""
    return _feed_forward(x_BTD, w_both_DY, w_down_FD, ready, rounded)[0]


def _feed_forward(x_BTD: Array | Normed, w_both_DY: Array, w_down_FD: Array, ready: Ready, rounded: Round):
    with jax.named_scope("gate_up"):
        (both_BTY,), kept_both = of_norm(x_BTD, (w_both_DY,), ready[0], rounded)
    with jax.named_scope("down"):
        (y_BTD,), kept_down = forward((both_BTY,), (w_down_FD,), ready[1], rounded, SWIGLU)
    return y_BTD, (x_BTD, both_BTY, kept_both, kept_down)


def _feed_forward_backward(rounded: Round, kept: tuple[Array | Normed, Array, tuple, tuple], dy_BTD: Array):
    x_BTD, both_BTY, kept_both, kept_down = kept
    with jax.named_scope("down"):
        dh_BTF, dw_down_FD, _ = backward(kept_down, (dy_BTD,), rounded)
    with jax.named_scope("gate_up"):
        dx_BTD, dw_both_DY, _ = backward(kept_both, (both_BTY, dh_BTF), rounded, SWIGLU_BACKWARD)
    return gradient_like(x_BTD, dx_BTD), dw_both_DY, dw_down_FD, None


feed_forward.defvjp(_feed_forward, _feed_forward_backward)


@functools.cache
def fp8_head(rounded: Round, of_logits: Callable | None = None) -> Head:
    """The head in 8 bits: states and matrix in E4M3, the gradients of logits in E5M2, each block of a device's tokens with its own scales.

    `of_logits` is loss_gradient.nats_and_gradient where a kernel makes that gradient as it rounds.
    """

    def prepare(w_DV: Array) -> tuple[Scaled, Scaled]:
        w, turned, _ = to_fp8_both_ways(GIVEN, (w_DV[None],), E4M3, rounded)
        return Scaled(w.values[0], w.scale), turned

    def multiply(x_BTD: Array, prepared: tuple[Scaled, Scaled]) -> tuple[Array, Scaled]:
        x, turned, _ = to_fp8_both_ways(GIVEN, (x_BTD,), E4M3, rounded)
        return product("BTD,VD->BTV", x, prepared[1], x_BTD.dtype), turned

    def back(x: Scaled, prepared: tuple[Scaled, Scaled], d_BTV: Array | Made) -> tuple[Array, Array]:
        work, xs = d_BTV if isinstance(d_BTV, tuple) else (GIVEN, (d_BTV,))
        d, turned, _ = to_fp8_both_ways(work, xs, E5M2, rounded)
        # A target's -1 is beside a vocabulary of small probabilities, whose sum weighs as much and would be cut off.
        precise = jax.lax.Precision.HIGHEST
        return product("BTV,DV->BTD", d, prepared[0], xs[0].dtype, precise), product("DN,VN->DV", x, turned, jnp.float32, precise)

    return Head(prepare, multiply, back, of_logits)


@functools.cache
def fp8_products(rounded: Round) -> Products:
    """Of matrices that share what they multiply; `rounded` rounds it, and what comes back."""
    return Products(
        lambda x, ws, ready=None: of_norm(x, ws, ready, rounded),
        lambda kept, dy: backward(kept, (dy,), rounded)[:2],
        lambda kept, work, dys: backward(kept, dys, rounded, work),
        lambda x, w_both, w_down, ready=(None, None): feed_forward(x, w_both, w_down, ready, rounded),
        later=True,
    )
