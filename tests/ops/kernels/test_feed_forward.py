"""The feed-forward whose products do its elementwise work, against the function written out, gradients too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Public from jax 0.11 on.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from nanojax.analysis.hlo import OWN_NAMES
from nanojax.mesh import make_mesh, sharded
from nanojax.ops.kernels import wgmma
from nanojax.ops.kernels.feed_forward import How, feed_forward, feed_forward_reference, serves

ERROR = 0.01  # bf16 inputs and results; gates, ups and their gradients are rounded to it in between


def results(f, rows, t, d, hidden, dtype):
    """(value, gradients) of a function, with a random cotangent."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.bfloat16).astype(dtype)

    ws = normal(d, hidden, scale=d**-0.5), normal(d, hidden, scale=d**-0.5), normal(hidden, d, scale=hidden**-0.5)
    y, vjp = jax.vjp(f, normal(rows, t, d), *ws)
    return y, *vjp(normal(*y.shape))


def assert_alike(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, jnp.bfloat16)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=ERROR * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("processors", "sizes"),
    [
        (1, (2, 64, 64, 128)),
        # several tiles each, an odd number of them; more depths than are fetched ahead; blocks that cross rows
        pytest.param(2, (3, 128, 320, 384), marks=pytest.mark.slow),
        pytest.param(5, (1, 256, 128, 256), marks=pytest.mark.slow),
    ],
)
def test_it_is_a_swiglu_feed_forward_and_backward(monkeypatch, processors, sizes):
    """Interpreted, which also checks that no barrier is left waiting or unobserved."""
    monkeypatch.setattr(wgmma, "PROCESSORS", processors)
    interpreted = functools.partial(feed_forward, how=How(interpret=InterpretGPUParams()))
    assert_alike(results(interpreted, *sizes, jnp.bfloat16), results(feed_forward_reference, *sizes, jnp.float32))


def test_spread_over_a_mesh_it_is_the_same(monkeypatch):
    """By its products written out: which part goes where, on a mesh of one device."""
    monkeypatch.setattr(wgmma, "multiply", wgmma.multiply_reference)
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
    sizes = (3, 5, 8, 12)
    spread = functools.partial(feed_forward, how=How(functools.partial(sharded, mesh=mesh)))
    got, want = (jax.jit(results, static_argnums=range(6))(f, *sizes, jnp.float32) for f in (spread, feed_forward_reference))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_its_kernels_are_those_whose_flops_are_counted(monkeypatch):
    taken = []

    def multiply(product, *arguments, **how):
        taken.append(product.name)
        return wgmma.multiply_reference(product, *arguments, **how)

    monkeypatch.setattr(wgmma, "multiply", multiply)
    results(feed_forward, 1, 2, 4, 6, jnp.float32)
    assert taken == ["gate_and_up", "down_backward"]
    assert set(taken) < set(OWN_NAMES)


def test_whole_tiles_are_served():
    """128 tokens, 64 of the model, and 128 of the feed-forward."""
    assert serves(128, 64, 128)
    assert serves(65536, 768, 2048)
    assert not serves(0, 64, 128)
    assert not serves(64, 64, 128)
    assert not serves(128, 96, 128)
    assert not serves(128, 64, 192)


@pytest.mark.parametrize(("shape", "dtype"), [((64, 64), jnp.bfloat16), ((128, 96), jnp.bfloat16), ((128, 64), jnp.float32)])
def test_what_is_not_whole_tiles_of_bfloat16_is_refused(shape, dtype):
    x, w = jnp.zeros((1, *shape), dtype), jnp.zeros((shape[1], 128), dtype)
    with pytest.raises(ValueError, match=rf"tiles of 128 x 64 by 64 x 128, .*given {jnp.dtype(dtype).name} \[{shape[0]}, {shape[1]}\]"):
        feed_forward(x, w, w, w.T)


@pytest.mark.parametrize(
    ("b", "read"), [((64, 128, "float32"), (128, 256)), ((128, 128, "bfloat16"), (128, 256)), ((64, 128, "bfloat16"), (256, 256))]
)
def test_operands_that_do_not_go_together_are_refused(b, read):
    product = wgmma.Product("pair", lambda z, x: (z + x,), (wgmma.Place(1, 0),), 4, 2, (wgmma.Place(2, 1),))
    with pytest.raises(ValueError, match="pair multiplies bfloat16"):
        wgmma.multiply(product, jnp.zeros((128, 64), jnp.bfloat16), jnp.zeros(b[:2], b[2]), jnp.zeros(read, jnp.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(3, 128, 64, 128), (5, 384, 192, 640), (2, 2048, 1280, 3584), (16, 2048, 768, 2048)])
def test_the_compiled_kernel_agrees_on_a_gpu(sizes):
    """Fewer tiles than processors, and many more; numbers of depths that are no multiple of those fetched ahead."""
    got = jax.jit(lambda: results(feed_forward, *sizes, jnp.bfloat16))()
    assert_alike(got, jax.jit(lambda: results(feed_forward_reference, *sizes, jnp.float32))())
