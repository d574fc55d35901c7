"""Muon and AdamW against plain numpy, which parameter goes where, and every learning rate worked out by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanojax.config import OptimConfig
from nanojax.optim import MuonState, label, optimizer, orthogonalise_all, scale_by_muon, schedule

SHAPES = {
    "embedding": (24, 16),
    "head.w": (16, 24),
    "norm.gain": (16,),
    "blocks.0.attention.q.w": (16, 16),
    "blocks.0.ffn.up.w": (16, 40),
}
# Learning rates constant and at their configured values: no warm-up, no warm-down, no clipping, reference width and batch.
PLAIN = OptimConfig(warmup_steps=0, warmdown=0.0, clip=None)
DECAYING = dataclasses.replace(PLAIN, weight_decay=0.1)


def random(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


@functools.cache  # for the compiled function: a second or two each
def runner(c: OptimConfig, batch_tokens: int, d_model: int) -> Callable:
    tx = optimizer(c, steps=100, batch_tokens=batch_tokens, d_model=d_model, ns_dtype=jnp.float32)

    @jax.jit
    def all_steps(grads, params):
        def step(state, g):
            update, state = tx.update(g, state, params)
            return state, update

        return jax.lax.scan(step, tx.init(params), jax.tree.map(lambda *g: jnp.stack(g), *grads))[1]

    return all_steps


def run(c: OptimConfig, grads: list[dict], *, batch_tokens: int = 2**19, d_model: int = 768) -> list[dict]:
    """The updates of a few steps, all at the parameters random(9)."""
    updates = runner(c, batch_tokens, d_model)(grads, random(9))
    return [jax.tree.map(lambda u, t=t: u[t], updates) for t in range(len(grads))]


def newton_schulz(g_OI: np.ndarray, steps: int = 5) -> np.ndarray:
    """Keller Jordan's zeropower_via_newtonschulz5 and the factor of his Muon, in float64, for torch's [out, in] weights."""
    x = g_OI.astype(np.float64)
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if transposed else x
    return x * max(1.0, g_OI.shape[0] / g_OI.shape[1]) ** 0.5


orthogonalised = jax.jit(orthogonalise_all, static_argnums=(1, 2))


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)], ids=str)
def test_one_muon_update_equals_newton_schulz_of_the_transposed_kernel(shape):
    g_IO = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    tx = scale_by_muon(PLAIN, jnp.float32)
    # The first step's momentum is a multiple of the gradient, and the direction does not depend on the multiple.
    update, _ = jax.jit(tx.update)({"w": jnp.asarray(g_IO)}, tx.init({"w": jnp.asarray(g_IO)}))
    np.testing.assert_allclose(update["w"], newton_schulz(g_IO.T).T, atol=1e-4)  # five float32 rounds that amplify by up to 3.4 each


@pytest.mark.parametrize(("shape", "factor"), [((16, 64), 2.0), ((64, 16), 1.0), ((32, 32), 1.0)], ids=str)
def test_five_steps_bring_singular_values_near_one_times_the_factor(shape, factor):
    g = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    values = np.linalg.svd(np.asarray(orthogonalised({"w": g}, 5, jnp.float32)["w"]), compute_uv=False) / factor
    assert values.min() > 0.6
    assert values.max() < 1.2


@pytest.mark.parametrize("shape", [(8, 96), (96, 8)], ids=str)
def test_products_are_taken_on_the_small_side(shape):
    program = str(jax.make_jaxpr(lambda g: orthogonalise_all({"w": g}, 5, jnp.float32))(jnp.ones(shape)))
    assert "[1,8,8]" in program
    assert "[1,96,96]" not in program


def test_bfloat16_iterations_stay_near_float32_and_return_float32():
    g = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((32, 48)), jnp.float32)}
    low, high = (orthogonalised(g, 5, dtype)["w"] for dtype in (jnp.bfloat16, jnp.float32))
    assert low.dtype == jnp.float32
    assert float(jnp.linalg.norm(low - high) / jnp.linalg.norm(high)) < 0.1  # 8 bits through five rounds that amplify
    values = np.linalg.svd(np.asarray(low), compute_uv=False) / (48 / 32) ** 0.5
    assert 0.6 < values.min() <= values.max() < 1.25


def test_matrices_of_one_shape_come_out_as_if_alone():
    rng = np.random.default_rng(0)
    tree = {name: jnp.asarray(rng.standard_normal((8, 24) if name != "c" else (24, 8)), jnp.float32) for name in "abcd"}
    together = orthogonalised(tree, 5, jnp.float32)
    for name, leaf in tree.items():
        alone = orthogonalised({name: leaf}, 5, jnp.float32)[name]
        np.testing.assert_allclose(together[name], alone, atol=1e-5, err_msg=name)  # a batched product may sum in another order
    assert float(jnp.abs(together["a"] - together["b"]).max()) > 0.1


def test_momentum_and_nesterov_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 8, 12)).astype(np.float32)
    tx = scale_by_muon(OptimConfig(momentum=(0.5, 0.5)), jnp.float32)
    update = jax.jit(tx.update)
    _, state = update({"w": jnp.asarray(a)}, tx.init({"w": jnp.asarray(a)}))
    np.testing.assert_allclose(state.momentum["w"], 0.5 * a, rtol=1e-6)
    second, state = update({"w": jnp.asarray(b)}, state)
    np.testing.assert_allclose(state.momentum["w"], 0.25 * a + 0.5 * b, rtol=1e-5)
    # Nesterov looks one step ahead: 0.5 (0.25 a + 0.5 b) + 0.5 b
    np.testing.assert_allclose(second["w"], newton_schulz((0.125 * a + 0.75 * b).T).T, atol=1e-4)  # as above


def test_the_momentum_rises_over_its_warm_up():
    tx = scale_by_muon(PLAIN, jnp.float32)
    one = {"w": jnp.ones((2, 2))}
    for step, momentum in ((0, 0.85), (150, 0.90), (300, 0.95), (3000, 0.95)):
        _, state = tx.update(one, MuonState(jnp.asarray(step), {"w": jnp.zeros((2, 2))}))
        np.testing.assert_allclose(state.momentum["w"], 1 - momentum, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_zero_gradient_gives_a_zero_finite_update(dtype):
    tx = scale_by_muon(PLAIN, dtype)
    zero = {"w": jnp.zeros((8, 8))}
    update, _ = tx.update(zero, tx.init(zero))
    assert (update["w"] == 0).all()


def test_the_rest_follows_adamw_and_gains_do_not_decay():
    grads, params = [random(seed) for seed in range(3)], random(9)
    updates = run(DECAYING, grads)
    rest = {"embedding": (0.2, 0.1), "head.w": (0.004, 0.1), "norm.gain": (0.004, 0.0)}
    for name, (lr, decay) in rest.items():
        p, m, v = np.asarray(params[name], np.float64), 0.0, 0.0
        for t in range(3):
            g = np.asarray(grads[t][name], np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            step = (m / (1 - 0.8 ** (t + 1))) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-10)
            np.testing.assert_allclose(updates[t][name], -lr * (step + decay * p), rtol=2e-5, atol=1e-7, err_msg=name)  # float32


def test_matrices_take_muons_step_at_their_own_rate_and_do_not_decay():
    grads = random()
    updates = run(DECAYING, [grads] * 3)[0]
    for name in ("blocks.0.attention.q.w", "blocks.0.ffn.up.w"):
        want = -0.02 * newton_schulz(np.asarray(grads[name]).T).T
        np.testing.assert_allclose(updates[name], want, atol=2e-6, err_msg=name)  # as above, times the rate


def test_every_parameter_of_every_block_has_its_group(tiny_model):
    for config in (dict(), dict(ffn="relu2", norm="fixed")):
        _, params = tiny_model(**config)
        matrices = {"q", "k", "v", "o", "gate", "up", "down"} - ({"gate"} if config else set())
        groups = label(params)
        assert groups.pop("embedding") == "embedding"
        assert groups.pop("head.w") == "head"
        for i in range(2):
            found = {name.split(".")[3] for name, group in groups.items() if group == "matrix" and name.startswith(f"blocks.{i}.")}
            assert found == matrices
        gains = {name for name, group in groups.items() if group == "gain"}
        assert gains == {name for name in params if name.endswith("gain")}
        assert set(groups.values()) == ({"matrix"} if config else {"matrix", "gain"})


def ratios(c: OptimConfig = PLAIN, **changes) -> dict[str, float]:
    """By how much the first update grows when the run changes."""
    grads = [random(), random()]
    before, after = run(PLAIN, grads)[0], run(c, grads, **changes)[0]
    return {name: float(jnp.linalg.norm(after[name]) / jnp.linalg.norm(before[name])) for name in SHAPES}


def test_four_times_the_batch_doubles_every_learning_rate():
    assert ratios(batch_tokens=2**21) == pytest.approx(dict.fromkeys(SHAPES, 2.0), rel=1e-5)


def test_without_a_reference_batch_the_batch_changes_nothing():
    unscaled = dataclasses.replace(PLAIN, reference_batch=None)
    assert ratios(unscaled, batch_tokens=2**21) == pytest.approx(dict.fromkeys(SHAPES, 1.0), rel=1e-5)


def test_four_times_the_width_halves_the_rates_of_embedding_and_head_alone():
    want = dict.fromkeys(SHAPES, 1.0) | {"embedding": 0.5, "head.w": 0.5}
    assert ratios(d_model=4 * 768) == pytest.approx(want, rel=1e-5)


def test_the_schedule_by_hand():
    multiplier = schedule(OptimConfig(), 1000)  # 40 steps up, the last 650 down to 0.05
    rise = {0: 1 / 40, 1: 2 / 40, 38: 39 / 40, 39: 1.0, 40: 1.0, 350: 1.0}
    values = rise | {351: 649 / 650 + 0.05 / 650, 675: 0.525, 1000: 0.05, 2000: 0.05}
    assert {step: float(multiplier(step)) for step in values} == pytest.approx(values, rel=1e-6)


def test_warm_up_and_warm_down_may_be_absent():
    flat = schedule(PLAIN, 10)
    assert [float(flat(step)) for step in range(10)] == [1.0] * 10


def test_warm_up_and_warm_down_that_meet_take_the_smaller():
    multiplier = schedule(OptimConfig(warmup_steps=8, warmdown=1.0, final_lr=0.0), 10)
    assert [float(multiplier(s)) for s in (0, 3, 4, 5, 9)] == pytest.approx([1 / 8, 4 / 8, 6 / 10, 5 / 10, 1 / 10])


def test_the_schedule_multiplies_every_update():
    grads = [random(), random()]
    warm = run(dataclasses.replace(PLAIN, warmup_steps=4), grads)
    plain = run(PLAIN, grads)
    for t, share in enumerate((1 / 4, 2 / 4)):
        for name in SHAPES:
            np.testing.assert_allclose(warm[t][name], share * plain[t][name], rtol=1e-5, atol=1e-8)  # two products in another order


def test_a_gradient_beyond_the_clip_counts_as_if_it_were_scaled_down_to_it():
    def norm_of(tree: dict, norm: float) -> dict:
        return jax.tree.map(lambda g: g * (norm / optax.tree.norm(tree)), tree)

    # Adam's second step feels how long the first gradient was, so the two steps together tell whether it was cut.
    clipped = dataclasses.replace(PLAIN, clip=1.0)
    one, other = norm_of(random(0), 10.0), norm_of(random(1), 0.5)
    got = run(clipped, [one, other])[1]
    want = run(PLAIN, [norm_of(one, 1.0), other])[1]
    unclipped = run(PLAIN, [one, other])[1]
    for name in SHAPES:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)  # float32, Muon amplifies
        assert float(jnp.abs(got[name] - unclipped[name]).max()) > 1e-4, name
