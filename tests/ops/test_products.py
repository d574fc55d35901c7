"""Products of one input and several matrices, as functions each way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nanojax.ops.products import PLAIN_PRODUCTS, multiply

rng = np.random.default_rng(0)
X, W, V, DY = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 6, 8), (8, 4), (8, 3), (2, 6, 7)))
TOLERANCE = 1e-5  # sums of 7 to 12 products of order 1, in another order


def test_several_matrices_multiply_as_one_by_one_forward_and_backward():
    ys, kept = PLAIN_PRODUCTS.forward(X, (W, V))
    for y, w in zip(ys, (W, V), strict=True):
        np.testing.assert_allclose(y, X @ w, atol=TOLERANCE)
    _, vjp = jax.vjp(lambda x, w, v: jnp.concatenate([x @ w, x @ v], axis=-1), X, W, V)
    dx, *dws = vjp(DY)
    got_dx, got_dw = PLAIN_PRODUCTS.backward(kept, DY)
    np.testing.assert_allclose(got_dx, dx, atol=TOLERANCE)
    np.testing.assert_allclose(got_dw, jnp.concatenate(dws, axis=1), atol=TOLERANCE)


def test_one_matrix_has_the_gradients_of_a_plain_product():
    (y, vjp), (want, wanted) = (jax.vjp(f, X, W) for f in (lambda x, w: multiply(x, w, PLAIN_PRODUCTS), jnp.dot))
    np.testing.assert_allclose(y, want, atol=TOLERANCE)
    for a, b in zip(vjp(DY[..., :4]), wanted(DY[..., :4]), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)
