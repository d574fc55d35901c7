"""The matrix products of the model."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(x: Float[Array, "... I"], w_IO: Float[Array, "I O"], *, name: str, key: Array | None = None) -> Float[Array, "... O"]:
    """x @ w in the dtype of x. `name` says which matrix it is, and `key` is there to draw from, for products that do."""
    del name, key
    return jnp.dot(x, w_IO.astype(x.dtype))
