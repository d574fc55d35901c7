"""The matrix products of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.packed import PackedMatrix, unpacked


def dot(x: Float[Array, "... I"], w: Float[Array, "I O"] | PackedMatrix, *, name: str, key: Array | None = None) -> Float[Array, "... O"]:
    """x @ w in the dtype of x. `name` says which matrix it is, and `key` is there to draw from, for products that do."""
    del name, key
    if isinstance(w, PackedMatrix):
        # Not before x is there: XLA would unpack the matrices of all layers in one go, and keep them.
        x, packed = jax.lax.optimization_barrier((x, w))
        return jnp.dot(x, unpacked(packed, x.dtype))
    return jnp.dot(x, w.astype(x.dtype))
