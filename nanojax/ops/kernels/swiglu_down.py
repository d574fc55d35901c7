"""What follows gates and ups in a SwiGLU feed-forward: silu(gate) * up times the last matrix. The way back from that is one kernel, a
product that ends in the gradients of gates and ups.

B batch, T tokens, D model, F feed-forward. Gates and ups are side by side, [B, T, 2F].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.kernels import wgmma
from nanojax.ops.kernels.spread import ROWS, Spread, alone
from nanojax.ops.kernels.swiglu import silu_times_backward, swiglu, swiglu_reference


class How(NamedTuple):
    """What does not change with the data."""

    spread: Spread = alone
    interpret: bool = False
    """Of the kernel forward."""
    mosaic: Any = None
    """Mosaic GPU's own parameters of interpreting, of the one backward."""


HERE = How()


def swiglu_down_reference(both_BTF: Array, w_down_FD: Array) -> Array:
    """`swiglu_down` written out; F of the first is both gates and ups here."""
    return swiglu_reference(both_BTF) @ w_down_FD


def serves(tokens: int, d: int, f: int) -> bool:
    """Whether so many tokens of a device, B * T, are whole tiles of the kernel."""
    return wgmma.fits(tokens, d, f)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu_down(both_BTF: Float[Array, "B T Y"], w_down_FD: Float[Array, "F D"], how: How = HERE) -> Float[Array, "B T D"]:
    """(silu(gate) * up) w_down, all bfloat16; Y is 2F. Shazeer 2020, arXiv:2002.05202, equation 6.

    For compute capability 9.0, and tokens and sizes that `serves`. Forward, what is between is written: a product that made gate and up
    and ended in silu(gate) * up was not faster than two kernels (scripts/bench/LOG.md).
    """
    return _forward(both_BTF, w_down_FD, how)[0]


def _forward(both_BTF: Array, w_down_FD: Array, how: How):
    h_BTF = how.spread(lambda both: swiglu(both, how.interpret), (ROWS,), ROWS)(both_BTF)
    return h_BTF @ w_down_FD, (both_BTF, w_down_FD, h_BTF)


def _backward(how: How, kept: tuple[Array, Array, Array], dy_BTD: Array):
    both_BTF, w_down_FD, h_BTF = kept
    d_both_BTF = how.spread(functools.partial(_down_backward, how), (ROWS, (), ROWS), ROWS)(dy_BTD, w_down_FD, both_BTF)
    return d_both_BTF, jnp.einsum("BTF,BTD->FD", h_BTF, dy_BTD)


swiglu_down.defvjp(_forward, _backward)


def _down_backward(how: How, dy_BTD: Array, w_down_FD: Array, both_BTF: Array) -> Array:
    """Gradients of gates and ups side by side."""
    f = len(w_down_FD)
    product = wgmma.Product("down_backward", _end, inputs=(0, f), results=(0, f), stages=4, slots=2)
    flat = (x.reshape(-1, x.shape[-1]) for x in (dy_BTD, both_BTF))
    # The copy is of a matrix that is whole already, and small beside what it is multiplied with.
    return wgmma.multiply(product, next(flat), w_down_FD.T, next(flat), how.mosaic)[0].reshape(both_BTF.shape)


def _end(dh: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    return silu_times_backward(gate, up, dh, _sigmoid)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))  # Mosaic GPU has no logistic function
