"""A model given kernels against the same model without, and who cannot have them."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generating import packed

from nanojax.config import TrainConfig
from nanojax.model import give_keys, merge
from nanojax.ops.attention_request import Request
from nanojax.ops.elementwise import PLAIN, kernels, refusal
from nanojax.ops.fp8_dot import fp8_dot, fp8_products
from nanojax.ops.kernels import feed_forward as fused
from nanojax.ops.kernels.both_ways import both_ways
from nanojax.ops.kernels.spread import alone
from nanojax.ops.products import PLAIN_PRODUCTS
from nanojax.ops.xent import total_nats
from nanojax.precision import Rounding, prepare_step, prepare_weights, quantize_weights
from nanojax.step import microbatch_nats

GPU = Request(platform="gpu", capability="9.0", dtype=jnp.bfloat16, rows=1, tokens=64, heads=4, kv_heads=2, head_dim=128)


def test_who_cannot_have_kernels_is_told_why():
    assert refusal(GPU) is None
    assert refusal(dataclasses.replace(GPU, capability=None)) is None  # a GPU that is only compiled for
    for changes, words in (
        (dict(platform="cpu"), "NVIDIA GPUs, and the device is a cpu"),
        (dict(capability="7.5"), "8.0 or more, given 7.5"),
        (dict(dtype=jnp.float32), "bf16, given float32"),
        (dict(head_dim=96), "powers of two, given 96"),
    ):
        assert words in (refusal(dataclasses.replace(GPU, **changes)) or "")


@pytest.mark.parametrize(
    ("changes", "remat"),
    [
        ({}, True),
        (dict(norm="fixed", softcap=15.0, ffn="relu2"), False),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param(dict(qk_norm=False), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_loses_and_learns_the_same_with_kernels(tiny_model, changes, remat):
    rng = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(rng.integers(0, 64, (2, 12)), jnp.int32) for _ in range(2))

    def nats_and_gradients(between):
        graph, params = tiny_model(elementwise=between, remat=remat, **changes)

        def nats(params):
            model = merge(graph, params)
            return total_nats(model.hidden(tokens), model.head.w[...], targets, model.softcap, 2, between.nats_and_gradient)

        return jax.jit(jax.value_and_grad(nats))(params)

    (value, got), (want, wanted) = map(nats_and_gradients, (kernels(alone, PLAIN_PRODUCTS, interpret=True), PLAIN))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for name, g in wanted.items():
        np.testing.assert_allclose(got[name], g, atol=1e-5 * float(jnp.abs(g).max()), err_msg=name)  # sums of float32 in another order


def away(a: jax.Array, b: jax.Array) -> float:
    """How far a is from b, of its size."""
    return float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))


class Batch(NamedTuple):
    inputs: jax.Array
    targets: jax.Array
    segments: None = None


@pytest.mark.parametrize(
    "changes",
    [
        dict(depth=1),
        pytest.param(dict(depth=1, norm="fixed", ffn="relu2"), marks=pytest.mark.slow),
        pytest.param(dict(depth=2, qk_norm=False, n_kv_head=1), marks=pytest.mark.slow),
        pytest.param(dict(depth=2, qk_norm=False, remat=True), marks=pytest.mark.slow),
        pytest.param(dict(depth=2, n_kv_head=1, remat=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_in_8_bits_it_is_the_same_whatever_is_made_where_it_is_rounded(tiny_model, changes):
    """Norms, gradients of queries, keys and values, and matrices once a step or every time: gradients too, of gains among them."""
    rounded = functools.partial(both_ways, interpret=True)
    rng = np.random.default_rng(0)
    batch = Batch(*(jnp.asarray(rng.integers(0, 64, (2, 64)), jnp.int32) for _ in range(2)))

    def nats_and_gradients(products, once):
        between = kernels(alone, products, interpret=True)
        how = dict(compute_dtype=jnp.bfloat16, elementwise=between, dot=functools.partial(fp8_dot, rounded=rounded))
        graph, params = tiny_model(**how, **changes)
        prepare = functools.partial(prepare_weights, rounding=Rounding("fp8"), dtype=jnp.bfloat16)
        total = functools.partial(total_nats, blocks=2, of_logits=between.nats_and_gradient)

        @jax.jit
        def run(params):
            weights, rounds = prepare_step(
                params, prepare=prepare, rounding=Rounding("fp8"), train=TrainConfig(), whole=once, together=together
            )
            assert any(matrices is not None for matrices in rounds.values()) == once
            loss = functools.partial(microbatch_nats, graph, total=total, packed=False)
            return jax.value_and_grad(loss)(weights, batch, jax.random.key(0), rounds)

        return run(params)

    products, together = fp8_products(rounded), ("attention", "ffn") if changes.get("qk_norm", True) else ("ffn",)
    apart = products._replace(later=False, backward_of=None)
    (value, got), (want, wanted) = nats_and_gradients(products, True), nats_and_gradients(apart, False)
    np.testing.assert_allclose(value, want, rtol=1e-3)
    for name, g in wanted.items():
        assert got[name].dtype == g.dtype
        assert away(got[name], g) < 0.02, name


def test_without_keys_a_model_in_8_bits_is_the_plain_one(tiny_model):
    """As it is evaluated: what a layer reads is then written, on a GPU with products that do the work after them too."""
    products = fp8_products(functools.partial(both_ways, interpret=True))
    graph, params = tiny_model(elementwise=kernels(alone, products, hopper=1, interpret=True), dot=fp8_dot)
    plain, _ = tiny_model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
    got, want = (jax.jit(lambda params, g=g: merge(g, params)(tokens))(params) for g in (graph, plain))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rows_at_places_of_their_own_are_turned_one_by_one(tiny_model):
    """As decoding has them: the table is then of rows."""
    graph, params = tiny_model(elementwise=kernels(alone, PLAIN_PRODUCTS, interpret=True))
    plain, _ = tiny_model()
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 32)), jnp.float32)
    positions = jnp.asarray([[0, 1, 2, 3], [5, 6, 7, 8]])
    attends = [merge(plain, params).attention] * 2
    got, want = (jax.jit(lambda p, g=g: merge(g, p).through_blocks(x_BTD, positions, attends))(params) for g in (graph, plain))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_matrices_kept_in_4_bits_are_multiplied_one_by_one(tiny_model):
    """As they are where an export reads its prompts."""
    graph, params = tiny_model(depth=1, elementwise=kernels(alone, PLAIN_PRODUCTS, interpret=True))
    plain, _ = tiny_model(depth=1)
    weights = params | {name: packed(q) for name, q in jax.jit(quantize_weights, static_argnums=1)(params, Rounding("nvfp4")).items()}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
    got, want = (jax.jit(lambda weights, g=g: merge(g, weights)(tokens))(weights) for g in (graph, plain))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "devices", "within"), [(128, 1, True), (96, 1, False), (256, 2, True), (128, 2, False), (128, None, False)]
)
def test_products_end_in_swiglu_where_each_device_has_whole_tiles(monkeypatch, tiny_model, tokens, devices, within):
    taken = []

    def feed_forward(x_BTD, gate, up, down, how):
        taken.append(how)
        return fused.feed_forward_reference(x_BTD, gate, up, down)

    monkeypatch.setattr(fused, "feed_forward", feed_forward)
    sizes = dict(depth=1, d_model=64, d_ffn=128)
    graph, params = tiny_model(elementwise=kernels(alone, PLAIN_PRODUCTS, hopper=devices, interpret=True), **sizes)
    plain, _ = tiny_model(**sizes)
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, tokens // 2)), jnp.int32)
    got, want = (jax.jit(lambda params, g=g: merge(g, params)(inputs))(params) for g in (graph, plain))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert bool(taken) == within


@pytest.mark.parametrize("kind", ["8 bits", "the last in 4 bits"])
def test_products_of_other_kinds_do_not_end_in_swiglu(monkeypatch, tiny_model, kind):
    """Of whole tiles all the same."""
    monkeypatch.setattr(fused, "feed_forward", lambda *_: pytest.fail("multiplied in bfloat16"))
    rounded, sizes = functools.partial(both_ways, interpret=True), dict(depth=1, d_model=64, d_ffn=128)
    products, dot = (
        (fp8_products(rounded), dict(dot=functools.partial(fp8_dot, rounded=rounded))) if kind == "8 bits" else (PLAIN_PRODUCTS, {})
    )
    graph, params = tiny_model(elementwise=kernels(alone, products, hopper=1, interpret=True), **dot, **sizes)
    plain, _ = tiny_model(**sizes)
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 64)), jnp.int32)
    down = "blocks.0.ffn.down.w"
    codes = jax.jit(quantize_weights, static_argnums=1)(params, Rounding("nvfp4"))[down]
    weights = params if kind == "8 bits" else params | {down: packed(codes)}

    @jax.jit
    def run(weights):
        model = merge(graph, weights)
        if kind == "8 bits":
            give_keys(model, jax.random.key(0), dict.fromkeys(name for name in params if ".ffn." in name))
        return model(inputs)

    # Logits are of size 1, and three products of 8 bits far from them.
    np.testing.assert_allclose(run(weights), jax.jit(merge(plain, weights).__call__)(inputs), atol=0.2 if kind == "8 bits" else 1e-5)
