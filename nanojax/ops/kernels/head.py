"""A head whose product ends in the gradient of the loss, up to one factor a token: no logits are written, and no pass is made over them.

A cap c bounds the logits c tanh(z / c), so that none has to be known to be the largest: where the product z = x w ends, each becomes

    e = exp(c tanh(z / c) - c)    and    m = e (1 - tanh(z / c)^2).

The e of a token add up to s, and m / s is the gradient of its nats by z, but for the target's, which is (e / s - 1) (1 - tanh(z / c)^2).
1 / s then multiplies the states and their gradients, D numbers of a token, not V. B batch, T tokens, N of both, D model, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanojax.ops.kernels import wgmma
from nanojax.ops.xent import IGNORED, LARGEST_SHIFT, Head

LOG2E = math.log2(math.e)


class Ready(NamedTuple):
    """The head, once for all blocks of a microbatch."""

    w_DV: Array
    rows_VD: Array


class Ended(NamedTuple):
    """What the product leaves behind."""

    x_BTD: Array
    rows_VD: Array
    m_NV: Float[Array, "N V"]
    """bfloat16; the target's is still to be set."""
    s_N: Float[Array, " N"]
    """float32."""


class Weighted(NamedTuple):
    """The gradient of nats by logits."""

    m_NV: Float[Array, "N V"]
    weight_N: Float[Array, " N"]
    """What a token's are to be multiplied by, 0 where its target is ignored."""


def serves(tokens: int, d: int, v: int, softcap: float | None) -> bool:
    """Whether a device's block of so many tokens is whole tiles of the kernel, and the cap one that it can take."""
    return softcap is not None and softcap <= LARGEST_SHIFT and wgmma.fits(tokens, d, v)


@functools.cache
def loss_head(softcap: float, mosaic: Any = None) -> Head:
    """For compute capability 9.0, bfloat16, and what `serves`. `mosaic`: Mosaic GPU's own parameters of interpreting.

    On a GPU tanh is the hardware's, 5e-4 of its value off at most.
    """

    def end(z: Array) -> tuple[Array, Array]:
        tanh = jnp.tanh(z * (1 / softcap))
        e = jnp.exp2(tanh * (softcap * LOG2E) - softcap * LOG2E)
        return e * (1 - tanh * tanh), e

    product = wgmma.Product("head_exponentials", end, (wgmma.Place(1, 0),), stages=5, slots=2, summed=True)

    def forward(x_BTD: Array, ready: Ready) -> tuple[Ended, Array]:
        (m_NV,), s_N = wgmma.multiply(product, x_BTD.reshape(-1, x_BTD.shape[-1]), ready.w_DV, interpret=mosaic)
        assert s_N is not None
        return Ended(x_BTD, ready.rows_VD, m_NV, s_N), x_BTD

    return Head(lambda w_DV: Ready(w_DV, w_DV.T), forward, _backward, _nats_and_gradient)


def _nats_and_gradient(ended: Ended, targets_BT: Int[Array, "B T"], softcap: float) -> tuple[Float[Array, "B T"], Weighted]:
    x_BTD, rows_VD, m_NV, s_N = ended
    targets_N = targets_BT.reshape(-1)
    valid_N, place_N = targets_N != IGNORED, jnp.maximum(targets_N, 0)
    z_N = jnp.einsum("ND,ND->N", x_BTD.reshape(-1, x_BTD.shape[-1]), rows_VD[place_N], preferred_element_type=jnp.float32)
    tanh_N = jnp.tanh(z_N / softcap)
    shifted_N = softcap * tanh_N - softcap
    d_N = ((jnp.exp(shifted_N) - s_N) * (1 - jnp.square(tanh_N))).astype(m_NV.dtype)
    m_NV = m_NV.at[jnp.arange(len(d_N)), place_N].set(d_N, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
    nats_N = jnp.where(valid_N, jnp.log(s_N) - shifted_N, 0)
    return nats_N.reshape(targets_BT.shape), Weighted(m_NV, jnp.where(valid_N, 1 / s_N, 0))


def _backward(x_BTD: Array, ready: Ready, d: Weighted) -> tuple[Array, Array]:
    weight_N1 = d.weight_N[:, None]
    dx_ND = weight_N1 * jnp.einsum("NV,DV->ND", d.m_NV, ready.w_DV, preferred_element_type=jnp.float32)
    x_ND = (weight_N1 * x_BTD.reshape(dx_ND.shape)).astype(x_BTD.dtype)
    dw_DV = jnp.einsum("ND,NV->DV", x_ND, d.m_NV, preferred_element_type=jnp.float32)
    return dx_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), dw_DV
