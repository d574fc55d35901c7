"""A SwiGLU feed-forward whose elementwise work is done where its products end: silu(gate) * up, and the gradients of both.

B batch, T tokens, D model, F feed-forward, Y gates and ups side by side, by turns of a square's columns (wgmma.side_by_side).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.kernels import wgmma
from nanojax.ops.kernels.spread import ROWS, Spread, alone
from nanojax.ops.kernels.swiglu import silu_times_backward
from nanojax.ops.kernels.wgmma import Place


class How(NamedTuple):
    """What does not change with the data."""

    spread: Spread = alone
    interpret: Any = None
    """Mosaic GPU's own parameters."""


HERE = How()


def feed_forward_reference(x_BTD: Array, w_gate_DF: Array, w_up_DF: Array, w_down_FD: Array) -> Array:
    """`feed_forward` written out."""
    return (jax.nn.silu(x_BTD @ w_gate_DF) * (x_BTD @ w_up_DF)) @ w_down_FD


def serves(tokens: int, d: int, f: int) -> bool:
    """Whether so many tokens of a device, B * T, are whole tiles of both kernels."""
    return wgmma.fits(tokens, d, f)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def feed_forward(
    x_BTD: Float[Array, "B T D"],
    w_gate_DF: Float[Array, "D F"],
    w_up_DF: Float[Array, "D F"],
    w_down_FD: Float[Array, "F D"],
    how: How = HERE,
) -> Float[Array, "B T D"]:
    """(silu(x w_gate) * (x w_up)) w_down, all bfloat16. Shazeer 2020, arXiv:2002.05202, equation 6.

    For compute capability 9.0, and tokens and sizes that `serves`.
    """
    return _feed_forward(x_BTD, w_gate_DF, w_up_DF, w_down_FD, how)[0]


def _feed_forward(x_BTD: Array, w_gate_DF: Array, w_up_DF: Array, w_down_FD: Array, how: How):
    with jax.named_scope("gate_up"):
        both_BTY, h_BTF = how.spread(functools.partial(_gate_and_up, how), (ROWS, (), ()), [ROWS, ROWS])(x_BTD, w_gate_DF, w_up_DF)
    with jax.named_scope("down"):
        return h_BTF @ w_down_FD, (x_BTD, (w_gate_DF, w_up_DF), w_down_FD, both_BTY, h_BTF)


def _gradients(how: How, kept: Any, dy_BTD: Array):
    x_BTD, ws, w_down_FD, both_BTY, h_BTF = kept
    with jax.named_scope("down"):
        d_both_BTY = how.spread(functools.partial(_down_backward, how), (ROWS, (), ROWS), ROWS)(dy_BTD, w_down_FD, both_BTY)
        dw_down_FD = jnp.einsum("BTF,BTD->FD", h_BTF, dy_BTD)
    with jax.named_scope("gate_up"):
        # On a mesh side by side where they are whole: the way forward has gathered them, and what else XLA is given it gathers anew.
        w_both_DY = how.spread(lambda *ws: wgmma.side_by_side(ws), ((), ()), ())(*ws)
        dx_BTD = jnp.einsum("BTY,DY->BTD", d_both_BTY, w_both_DY)
        dw_gate_DF, dw_up_DF = wgmma.apart(jnp.einsum("BTD,BTY->DY", x_BTD, d_both_BTY), 2)
    return dx_BTD, dw_gate_DF, dw_up_DF, dw_down_FD


feed_forward.defvjp(_feed_forward, _gradients)


def _gate_and_up(how: How, x_BTD: Array, w_gate_DF: Array, w_up_DF: Array) -> tuple[Array, Array]:
    """(gates and ups, silu(gates) * ups)."""
    places = Place(2, 0), Place(2, 1), Place(1, 0, array=1)
    product = wgmma.Product("gate_and_up", _end_forward, places, stages=5, slots=1, across=2)
    w_both_DY = wgmma.side_by_side((w_gate_DF, w_up_DF))
    (both, h), _ = wgmma.multiply(product, x_BTD.reshape(-1, x_BTD.shape[-1]), w_both_DY, interpret=how.interpret)
    return both.reshape(*x_BTD.shape[:2], -1), h.reshape(*x_BTD.shape[:2], -1)


def _down_backward(how: How, dy_BTD: Array, w_down_FD: Array, both_BTY: Array) -> Array:
    """Gradients of gates and ups."""
    places = Place(2, 0), Place(2, 1)
    product = wgmma.Product("down_backward", _end_backward, places, stages=4, slots=2, inputs=places)
    dy, both = (x.reshape(-1, x.shape[-1]) for x in (dy_BTD, both_BTY))
    # The copy is of a matrix that is whole already, and small beside what it is multiplied with.
    (d_both,), _ = wgmma.multiply(product, dy, w_down_FD.T, both, how.interpret)
    return d_both.reshape(both_BTY.shape)


def _end_forward(gate: Array, up: Array) -> tuple[Array, ...]:
    return gate, up, gate * up * _sigmoid(gate)


def _end_backward(dh: Array, gate: Array, up: Array) -> tuple[Array, ...]:
    return silu_times_backward(gate, up, dh, _sigmoid)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))  # Mosaic GPU has no logistic function
