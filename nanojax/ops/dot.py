"""The one matrix product of the model."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(x: Float[Array, "... I"], w_IO: Float[Array, "I O"], *, name: str) -> Float[Array, "... O"]:
    """x @ w in the dtype of x; `name` says which matrix it is, for products that treat some apart."""
    del name
    return jnp.dot(x, w_IO.astype(x.dtype))
