"""A SwiGLU feed-forward whose elementwise work is done by its products: silu(gate) * up, and the gradient of both.

B batch, T tokens, D model, F feed-forward. Gates and ups are kept side by side, [B, T, 2F].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.kernels import wgmma
from nanojax.ops.kernels.spread import ROWS, Spread, alone
from nanojax.ops.products import PLAIN_PRODUCTS


class How(NamedTuple):
    """What does not change with the data."""

    spread: Spread = alone
    interpret: Any = None


HERE = How()


def feed_forward_reference(x_BTD: Array, w_gate_DF: Array, w_up_DF: Array, w_down_FD: Array) -> Array:
    """`feed_forward` written out."""
    return (jax.nn.silu(x_BTD @ w_gate_DF) * (x_BTD @ w_up_DF)) @ w_down_FD


def serves(tokens: int, d: int, f: int) -> bool:
    """Whether so many tokens of a device, B * T, are whole tiles of both kernels."""
    return wgmma.fits(tokens, d, f, matrices=2) and wgmma.fits(tokens, d, f)


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
        both_BTF, h_BTF = how.spread(functools.partial(_gate_and_up, how), (ROWS, (), ()), [ROWS, ROWS])(x_BTD, w_gate_DF, w_up_DF)
    with jax.named_scope("down"):
        return h_BTF @ w_down_FD, (x_BTD, (w_gate_DF, w_up_DF), w_down_FD, both_BTF, h_BTF)


def _gradients(how: How, kept: Any, dy_BTD: Array):
    x_BTD, ws, w_down_FD, both_BTF, h_BTF = kept
    with jax.named_scope("down"):
        d_both_BTF = how.spread(functools.partial(_down_backward, how), (ROWS, (), ROWS), ROWS)(dy_BTD, w_down_FD, both_BTF)
        dw_down_FD = jnp.einsum("BTF,BTD->FD", h_BTF, dy_BTD)
    with jax.named_scope("gate_up"):
        # On a mesh side by side where they are whole: the way forward has gathered them, and what else XLA is given it gathers anew.
        w_both_DF = how.spread(lambda *ws: jnp.concatenate(ws, axis=1), ((), ()), ())(*ws)
        dx_BTD, dw_both_DF = PLAIN_PRODUCTS.backward((x_BTD, (w_both_DF,)), d_both_BTF)
    return dx_BTD, *jnp.split(dw_both_DF, 2, axis=1), dw_down_FD


feed_forward.defvjp(_feed_forward, _gradients)


def _gate_and_up(how: How, x_BTD: Array, w_gate_DF: Array, w_up_DF: Array) -> tuple[Array, Array]:
    """(gates and ups side by side, silu(gates) * ups)."""
    f = w_gate_DF.shape[1]
    product = wgmma.Product("gate_and_up", _end_forward, (), ((0, 0), (0, f), (1, 0)), (2 * f, f), stages=5, slots=1)
    both, h = wgmma.multiply(product, x_BTD.reshape(-1, x_BTD.shape[-1]), (w_gate_DF, w_up_DF), interpret=how.interpret)
    return both.reshape(*x_BTD.shape[:2], -1), h.reshape(*x_BTD.shape[:2], -1)


def _down_backward(how: How, dy_BTD: Array, w_down_FD: Array, both_BTF: Array) -> Array:
    """Gradients of gates and ups side by side."""
    f = len(w_down_FD)
    product = wgmma.Product("down_backward", _end_backward, (0, f), ((0, 0), (0, f)), (2 * f,), stages=4, slots=2)
    flat = (x.reshape(-1, x.shape[-1]) for x in (dy_BTD, both_BTF))
    # The copy is of a matrix that is whole already, and small beside what it is multiplied with.
    return wgmma.multiply(product, next(flat), (w_down_FD.T,), next(flat), how.interpret)[0].reshape(both_BTF.shape)


def _end_forward(gate: Array, up: Array) -> tuple[Array, ...]:
    return gate, up, gate * up * _sigmoid(gate)


def _end_backward(dh: Array, gate: Array, up: Array) -> tuple[Array, ...]:
    sigmoid = _sigmoid(gate)
    return dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))  # Mosaic GPU has no logistic function
