"""A matrix product with all its operands in NVFP4, emulated: the pretraining recipe of NVIDIA 2025, arXiv:2509.25149, section 4.

Letters: B batch, T tokens, I in, O out. Operands are fake-quantised, and the products themselves run in the type of the activations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.dot import dot
from nanojax.ops.fp4 import dequantize, quantize

HADAMARD = 16  # tokens that are mixed, as many as share a scale
# One vector for the whole run, the one of Transformer Engine.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def full_recipe_dot(
    x_BTI: Float[Array, "B T I"], w_IO: Float[Array, "I O"], *, name: str, key: Array | None = None
) -> Float[Array, "B T O"]:
    """x @ w with x in 1x16 blocks, for a w that is on the 16x16 grid already; its gradients are products of 4-bit operands too.

    dx = SR(dy) w^T and dw = (H x)^T SR(H dy), each operand in 1x16 blocks along the axis that is summed over, where SR rounds
    stochastically and H, a random Hadamard transform, mixes 16 tokens at a time. Without a `key` nothing but w is in 4 bits:
    blocks that are left out, and evaluation. T must be a multiple of 16.
    """
    if key is None:
        return dot(x_BTI, w_IO, name=name)
    return quantized_dot(x_BTI, w_IO.astype(x_BTI.dtype), key)


@jax.custom_vjp
def quantized_dot(x_BTI: Array, w_IO: Array, key: Array) -> Array:
    """`full_recipe_dot` with a key."""
    del key
    return jnp.dot(nvfp4(x_BTI, -1), w_IO)


def quantized_dot_forward(x_BTI, w_IO, key):
    """The product, and the operands of those of the backward pass."""
    return quantized_dot(x_BTI, w_IO, key), (x_BTI, w_IO, key)


def quantized_dot_backward(operands, dy_BTO):
    """The two gradients, from 4-bit operands."""
    x_BTI, w_IO, key = operands
    key_x, key_w = jax.random.split(key)
    dx_BTI = jnp.dot(nvfp4(dy_BTO, -1, key_x), w_IO.T)
    dw_IO = jnp.einsum("BTI,BTO->IO", nvfp4(hadamard(x_BTI), 1), nvfp4(hadamard(dy_BTO), 1, key_w), preferred_element_type=jnp.float32)
    return dx_BTI, dw_IO.astype(w_IO.dtype), None


quantized_dot.defvjp(quantized_dot_forward, quantized_dot_backward)


def nvfp4(x: Float[Array, "B T D"], axis: int, key: Array | None = None) -> Float[Array, "B T D"]:
    """x on NVFP4's grid with 1x16 blocks along `axis`, stochastically where there is a key; NaN where x is not finite."""
    value = dequantize(quantize(x, "nvfp4", axis=axis, key=key), x.dtype)
    return jnp.where(jnp.isfinite(x), value, jnp.nan)


def hadamard(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Every 16 tokens times diag(signs) @ Hadamard / 4: orthogonal, so that it cancels in a sum over tokens."""
    h = jnp.ones((1, 1), jnp.float32)
    while len(h) < HADAMARD:
        h = jnp.block([[h, h], [h, -h]])  # Sylvester's construction
    mix = (jnp.array(SIGNS, jnp.float32)[:, None] * h / HADAMARD**0.5).astype(x_BTD.dtype)
    b, t, d = x_BTD.shape
    return jnp.einsum("BNSD,SK->BNKD", x_BTD.reshape(b, t // HADAMARD, HADAMARD, d), mix).reshape(b, t, d)
