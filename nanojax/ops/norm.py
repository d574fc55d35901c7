"""RMSNorm. B batch, T tokens, D the normalised axis."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6


def rms_norm(x: Float[Array, "... D"], gain_D: Float[Array, " D"] | None = None, eps: float = EPS) -> Float[Array, "... D"]:
    """gain * x / rms(x), computed in float32, in the dtype of x. Zhang & Sennrich 2019, arXiv:1910.07467, equation 4."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (y if gain_D is None else y * jnp.expand_dims(gain_D.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)


class Normed(NamedTuple):
    """rms_norm(x, gain), which is left to what reads it, and never written.

    Its gradient is that of the norm and comes back in x: what makes one takes it on from there.
    """

    x: Float[Array, "B T D"]
    over: Float[Array, "B T"]
    """1 / rms(x)."""
    gain: Float[Array, " D"]
    """float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> Any:
        return self.x.dtype


def written(x: Array | Normed) -> Array:
    """What a norm stands for, as an array."""
    return _written(x) if isinstance(x, Normed) else x


@jax.custom_vjp
def _written(x: Normed) -> Array:
    return (x.x.astype(jnp.float32) * x.over[..., None] * x.gain[None, None]).astype(x.dtype)


_written.defvjp(lambda x: (_written(x), None), lambda _, d_BTD: (Normed(d_BTD, None, None),))  # pyright: ignore[reportArgumentType]  # no gradient


def gradient_like(x: Array | Normed, d_BTD: Array) -> Any:
    """The gradient of x, of which d is that of the array that it is or stands for."""
    return Normed(d_BTD, None, None) if isinstance(x, Normed) else d_BTD  # pyright: ignore[reportArgumentType]  # no gradient
