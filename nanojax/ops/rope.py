"""Rotary position embedding in Hugging Face's convention. T tokens, H head size; the two halves of H are rotated against each other."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rope = tuple[Float[Array, "*#B T H"], Float[Array, "*#B T H"]]
"""As `rope_table` makes it."""


def rope_table(positions: Int[Array, "*B T"], head_dim: int, base: float) -> tuple[Float[Array, "*B T H"], Float[Array, "*B T H"]]:
    """(cos, sin) in float32 for `rotate`: the angle of pair i is position * base ** (-2i / H). Su et al. 2021, arXiv:2104.09864, eq. 15.

    sin carries the sign of the half that it multiplies: minus for the first.
    """
    half = head_dim // 2
    # float32: bfloat16 cannot tell position 257 from 256 and would rotate both alike.
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * positions.ndim + (half,))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotate every pair (x_i, x_{i + H/2}) by +angle, computed in float32, in the dtype of x; a table [T, H] is for every row."""
    cos, sin = (table if table.ndim == 3 else table[None] for table in rope)
    x = x_BTNH.astype(jnp.float32)
    # A roll by half the head, rather than a concatenation of two products: XLA fuses it into one pass.
    swapped = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    return (x * cos[:, :, None] + swapped * sin[:, :, None]).astype(x_BTNH.dtype)
