"""A head whose product ends in the gradient of the loss, up to one factor a token: it is written once, and logits never are.

A cap c bounds the logits c tanh(z / c), so that none has to be known to be the largest: where the product z = x w ends, each becomes

    e = exp(c tanh(z / c) - c)    and    m = e (1 - tanh(z / c)^2).

The e of a token add up to s, and m / s is the gradient of its nats by z, but for the target's, which is (e / s - 1) (1 - tanh(z / c)^2).
1 / s then multiplies the states and their gradients, D numbers of a token, not V. Targets are IGNORED, or in [0, V).
B batch, T tokens, N of both, D model, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from nanojax.ops.kernels import wgmma
from nanojax.ops.xent import IGNORED, LARGEST_SHIFT, Head

LOG2E = math.log2(math.e)
TOKENS = 128  # of an instance that takes their tanh; as many divide all that are served


class Ready(NamedTuple):
    """The head, once for all blocks of a microbatch."""

    w_DV: Array
    rows_VD: Array


class Ended(NamedTuple):
    """What the product leaves behind, and what the target's logit is made of."""

    x_BTD: Array
    rows_VD: Array
    m_NV: Float[Array, "N V"]
    """bfloat16; the target's is still to be written over."""
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
def loss_head(softcap: float, interpret: Any = None) -> Head:
    """For compute capability 9.0, bfloat16, and what `serves`. `interpret`: Mosaic GPU's own parameters.

    On a GPU tanh is the hardware's, 5e-4 of its value off at most.
    """
    tanh_of_targets = jnp.tanh if interpret is not None else _hardware_tanh

    def end(z: Array) -> tuple[Array, Array]:
        tanh = jnp.tanh(z * (1 / softcap))
        e = _exponential(tanh, softcap)
        return e * (1 - tanh * tanh), e

    product = wgmma.Product("head_exponentials", end, (wgmma.Place(1, 0),), stages=5, slots=2, summed=True)

    def forward(x_BTD: Array, ready: Ready) -> tuple[Ended, Array]:
        (m_NV,), s_N = wgmma.multiply(product, x_BTD.reshape(-1, x_BTD.shape[-1]), ready.w_DV, interpret=interpret)
        assert s_N is not None
        return Ended(x_BTD, ready.rows_VD, m_NV, s_N), x_BTD

    return Head(lambda w_DV: Ready(w_DV, w_DV.T), forward, _backward, functools.partial(_nats_and_gradient, tanh_of_targets))


def _exponential(tanh: Array, softcap: float) -> Array:
    """e of a capped logit."""
    return jnp.exp2(tanh * (softcap * LOG2E) - softcap * LOG2E)


def _hardware_tanh(x_N: Float[Array, " N"]) -> Float[Array, " N"]:
    """As the product takes it: of a target whose probability is nearly 1, e and s must be off by the same."""

    def kernel(x_ref, y_ref):
        y_ref[...] = triton.approx_tanh(x_ref[...])

    own = pl.BlockSpec((TOKENS,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x_N.shape, jnp.float32),
        grid=(len(x_N) // TOKENS,),
        in_specs=[own],
        out_specs=own,
        compiler_params=triton.CompilerParams(num_warps=TOKENS // 32, num_stages=1),
        name="tanh_of_targets",
    )(x_N)


def _nats_and_gradient(tanh: Callable, ended: Ended, targets_BT: Int[Array, "B T"], softcap: float) -> tuple[Float[Array, "B T"], Weighted]:
    x_BTD, rows_VD, m_NV, s_N = ended
    targets_N = targets_BT.reshape(-1)
    valid_N, place_N = targets_N != IGNORED, jnp.maximum(targets_N, 0)
    z_N = jnp.einsum("ND,ND->N", x_BTD.reshape(-1, x_BTD.shape[-1]), rows_VD[place_N], preferred_element_type=jnp.float32)
    tanh_N = tanh(z_N * (1 / softcap))
    d_N = ((_exponential(tanh_N, softcap) - s_N) * (1 - jnp.square(tanh_N))).astype(m_NV.dtype)
    # Each token has one: no order to keep among them.
    m_NV = m_NV.at[jnp.arange(len(d_N)), place_N].set(d_N, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
    nats_N = jnp.where(valid_N, jnp.log(s_N) - softcap * (tanh_N - 1), 0)
    return nats_N.reshape(targets_BT.shape), Weighted(m_NV, jnp.where(valid_N, 1 / s_N, 0))


def _backward(x_BTD: Array, ready: Ready, d: Weighted) -> tuple[Array, Array]:
    weight_N1 = d.weight_N[:, None]
    dx_ND = weight_N1 * jnp.einsum("NV,DV->ND", d.m_NV, ready.w_DV, preferred_element_type=jnp.float32)
    x_ND = (weight_N1 * x_BTD.reshape(dx_ND.shape)).astype(x_BTD.dtype)
    dw_DV = jnp.einsum("ND,NV->DV", x_ND, d.m_NV, preferred_element_type=jnp.float32)
    return dx_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), dw_DV
