"""Gradients of queries, keys and values that are rounded where they are made, against those that are made first."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.ops.fp8_dot import E5M2, fp8_products
from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
from nanojax.ops.kernels.norm_rope import norm_rope_reference
from nanojax.ops.kernels.qkv import How, qkv
from nanojax.ops.kernels.spread import alone
from nanojax.ops.kernels.turn_back import TURN_BACK
from nanojax.ops.kernels.work import GIVEN
from nanojax.ops.products import Products
from nanojax.ops.rope import rope_table


def inputs(rows: int, tokens: int, heads: int, kv: int, size: int, dtype=jnp.bfloat16) -> tuple[jax.Array, ...]:
    """What TURN_BACK takes; gradients are small, as those of attention are."""
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal((rows, tokens, n, size)) for n in (heads, kv, heads, kv, kv)]
    gains = [jnp.asarray(1 + 0.2 * rng.standard_normal(size), jnp.float32) for _ in range(2)]
    scaled = (jnp.asarray(x * (1 if i < 2 else 1e-3), dtype) for i, x in enumerate(draw))
    return *scaled, *gains, *rope_table(jnp.arange(tokens), size, 1e4)


def written(q, k, dq, dk, dv, gain_q, gain_k, *rope):
    """(gradients side by side, those of gains), by what is turned itself."""
    made = []
    for x, gain, d in ((q, gain_q, dq), (k, gain_k, dk)):
        made.append(jax.vjp(lambda x, gain: norm_rope_reference(x, gain, rope), x, gain)[1](d))
    flat = [x.reshape(*x.shape[:2], -1) for x in (made[0][0], made[1][0], dv)]
    return jnp.concatenate(flat, axis=-1), [dgain for _, dgain in made]


def check(got, xs, *, off: float) -> None:
    """The numbers of the way that is written out, but for those that lie between two, and the sums."""
    dy, dgains = written(*xs)
    want = both_ways_reference(GIVEN, (dy,), E5M2)
    assert got.scale == want.scale
    for a, b in ((got.values, want.values), (got.turned, want.turned)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8)).mean() < off
        near = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(*near, rtol=0.26, atol=2**-16)  # a step of E5M2, or its smallest number
    np.testing.assert_array_equal(
        np.asarray(got.values).reshape(len(dy[0]) * len(dy), -1).T.view(np.uint8), np.asarray(got.turned).view(np.uint8)
    )
    n = xs[0].shape[2]
    sums = np.asarray(got.sums, np.float64).reshape(len(got.sums), n + xs[1].shape[2], -1)
    for total, dgain in zip((sums[:, :n], sums[:, n:]), dgains, strict=True):
        np.testing.assert_allclose(total.sum((0, 1)), dgain, rtol=1e-3, atol=2e-3 * float(jnp.abs(dgain).max()))


SHAPES = [(2, 64, 3, 3, 16), (1, 192, 4, 1, 16), (3, 2, 2, 1, 8), (1, 7, 1, 1, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_rounded_as_if_they_had_been_written(shape):
    """Several squares of tokens and one, a word of them and less; key heads shared and not."""
    xs = inputs(*shape)
    for way in (functools.partial(both_ways, interpret=True), both_ways_reference):
        check(jax.jit(way, static_argnums=(0, 2))(TURN_BACK, xs, E5M2), xs, off=5e-3)


def test_what_did_not_fit_is_made_and_rounded_again():
    """A token that is not seen first, 2^20 larger than the others; then one that is not a number."""
    xs = inputs(1, 128, 2, 1, 16)
    for part, value in ((2, 2.0**20), (3, 2.0**20), (4, 2.0**20)):
        large = [x.at[0, 77].multiply(value) if i == part else x for i, x in enumerate(xs)]
        check(both_ways(TURN_BACK, tuple(large), E5M2, interpret=True), large, off=5e-3)
        bad = [x.at[0, 77, 0, 3].set(jnp.nan) if i == part else x for i, x in enumerate(xs)]
        assert np.isnan(both_ways(TURN_BACK, tuple(bad), E5M2, interpret=True).scale)


def results(products: Products, heads: int, kv: int, tokens: int, size: int, interpret: bool):
    """Gradients of x, of the matrices and of the gains of `qkv`."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, tokens, 64)), jnp.bfloat16)
    ws = tuple(jnp.asarray(rng.standard_normal((64, n * size)) / 8, jnp.bfloat16) for n in (heads, kv, kv))
    gains = tuple(jnp.asarray(1 + 0.2 * rng.standard_normal(size), jnp.float32) for _ in range(2))
    rope = rope_table(jnp.arange(tokens), size, 1e4)
    how = How(size, alone, products, interpret)
    y, vjp = jax.vjp(lambda x, ws, gains: qkv(x, ws, gains, rope, how), x, ws, gains)
    return jax.tree.leaves(vjp(tuple(jnp.asarray(rng.standard_normal(part.shape), jnp.bfloat16) for part in y)))


def agree(heads: int, kv: int, tokens: int, size: int, *, interpret: bool) -> None:
    """Made where they are rounded, or first."""
    products = fp8_products(functools.partial(both_ways, interpret=interpret))
    first = products._replace(backward_of=None)
    for a, b in zip(*(results(p, heads, kv, tokens, size, interpret) for p in (products, first)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=1e-2 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (4, 1)])
def test_the_gradients_of_a_layer_are_those_of_gradients_that_are_written(heads, kv):
    agree(heads, kv, 24, 16, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 10, 10, 128), (2, 512, 6, 2, 64), (2, 77, 4, 1, 128)])
def test_the_compiled_ones_agree_on_a_gpu(shape):
    xs = inputs(*shape)
    check(jax.jit(both_ways, static_argnums=(0, 2))(TURN_BACK, xs, E5M2), xs, off=5e-3)
    xs = tuple(x.at[0, 76].multiply(2.0**20) if i == 2 else x for i, x in enumerate(xs))
    check(jax.jit(both_ways, static_argnums=(0, 2))(TURN_BACK, xs, E5M2), xs, off=5e-3)
    agree(*shape[2:4], *shape[1::3], interpret=False)
