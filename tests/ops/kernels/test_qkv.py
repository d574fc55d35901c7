"""Queries, keys and values with one product backward against three products and what turns them, gradients too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.kernels.norm_rope import norm_rope_reference
from nanojax.ops.kernels.qkv import How, qkv
from nanojax.ops.kernels.spread import alone
from nanojax.ops.rope import rope_table

HOW = How(16, alone, interpret=True)


def reference(x, ws, gains, rope, how):
    q, k, v = ((x @ w).reshape(*x.shape[:2], -1, how.head_dim) for w in ws)
    return norm_rope_reference(q, gains[0], rope), norm_rope_reference(k, gains[1], rope), v


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def results(f, heads, kv, dtype, how, tokens=24):
    """(queries, keys, values, gradients of x, of the matrices and of the gains), with random cotangents."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, tokens, 48)), dtype)
    ws = tuple(jnp.asarray(rng.standard_normal((48, n * how.head_dim)) / 7, dtype) for n in (heads, kv, kv))
    gains = tuple(jnp.asarray(1 + 0.2 * rng.standard_normal(how.head_dim), jnp.float32) for _ in range(2))
    rope = rope_table(jnp.arange(tokens), how.head_dim, 1e4)
    y, vjp = jax.vjp(lambda x, ws, gains: f(x, ws, gains, rope, how), x, ws, gains)
    return jax.tree.leaves((y, vjp(tuple(jnp.asarray(rng.standard_normal(part.shape), dtype) for part in y))))


@pytest.mark.parametrize(("heads", "kv"), [pytest.param(3, 3, marks=pytest.mark.slow), (4, 1)])
def test_they_and_their_gradients_are_those_of_three_products(heads, kv):
    for a, b in zip(*(results(f, heads, kv, jnp.float32, HOW) for f in (qkv, reference)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))  # sums of float32 in another order


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv", "tokens"), [(6, 6, 256), (6, 2, 77)])
def test_the_compiled_products_agree_on_a_gpu(heads, kv, tokens):
    how = How(128, HOW.spread)
    got, want = (results(f, heads, kv, jnp.bfloat16, how, tokens) for f in (qkv, reference))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=2e-2 * float(jnp.abs(b).max()))  # bf16
