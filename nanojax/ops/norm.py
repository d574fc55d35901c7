"""RMSNorm. D is the normalised axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6


def rms_norm(x: Float[Array, "... D"], gain_D: Float[Array, " D"] | None = None, eps: float = EPS) -> Float[Array, "... D"]:
    """gain * x / rms(x), computed in float32, in the dtype of x. Zhang & Sennrich 2019, arXiv:1910.07467, equation 4."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (y if gain_D is None else y * jnp.expand_dims(gain_D.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)
