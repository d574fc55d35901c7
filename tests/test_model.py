"""The GPT: counts to the last parameter, a transformer written in numpy, who sees whom, and what every switch does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanojax.config import ModelConfig, nanochat
from nanojax.model import GPT, merge, parameters, split
from nanojax.ops.attention import BACKENDS, reference_attention
from nanojax.ops.xent import total_nats
from nanojax.sizes import count_parameters, flops_per_token

T = 12


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, T)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graph, params, tokens, segments=None):
    return merge(graph, params)(tokens, segments)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(graph, params, tokens):
    def loss(params):
        model = merge(graph, params)
        return total_nats(model.hidden(tokens), model.head.w[...], jnp.roll(tokens, -1, 1), model.softcap, 1)

    return jax.value_and_grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def influence(graph, params, x_BTD, t, segments=None):
    """[T]: the largest gradient of the hidden state at position t with respect to each embedded token."""

    def at_t(x_BTD):
        return merge(graph, params).from_embeddings(x_BTD, segments)[0, t] @ jnp.arange(1.0, 1 + x_BTD.shape[-1])

    return jnp.abs(jax.grad(at_t)(x_BTD)).max(axis=(0, 2))


def embedded(tokens: int = T, width: int = 32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).standard_normal((1, tokens, width)), jnp.float32)


def shapes_of(c: ModelConfig) -> tuple[dict, dict]:
    """(shapes, logical axes) by name, no array made."""
    with nnx.use_eager_sharding(False):
        return split(lambda: GPT(c, attention=reference_attention, key=jax.random.key(0)))[1:]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ModelConfig(depth=12), 135_288_576),
        (ModelConfig(depth=12, n_kv_head=2), 125_851_392),
        (ModelConfig(depth=20), 490_266_880),
        (ModelConfig(depth=24), 780_221_952),
        (nanochat(20, vocab_size=65_536), 560_988_160),
    ],
    ids=["d12", "d12-2kv", "d20", "d24", "nanochat-d20"],
)
def test_parameters_are_as_many_as_the_architecture_says(config, count):
    assert count_parameters(config).total == count
    assert sum(x.size for x in shapes_of(config)[0].values()) == count


@pytest.mark.parametrize(
    "change",
    [{}, dict(norm="fixed"), dict(qk_norm=False), dict(ffn="relu2"), dict(n_kv_head=2), dict(d_ffn=None), dict(depth=3, head_dim=32)],
    ids=str,
)
def test_every_kind_of_parameter_is_counted_as_the_model_has_it(tiny_config, change):
    c = tiny_config(**change)
    shapes, axes = shapes_of(c)
    kinds = {"embedding": 0, "head": 0, "matrices": 0, "gains": 0}
    for name, leaf in shapes.items():
        kinds[{"embedding": "embedding", "head.w": "head"}.get(name, "matrices" if leaf.ndim == 2 else "gains")] += leaf.size
        assert len(axes[name]) == leaf.ndim, name
    assert kinds == vars(count_parameters(c))


def test_flops_are_nanochats():
    # nanochat.md, section 1.4: 6 (N - V D) + 12 L D T, printed to five digits there
    assert flops_per_token(nanochat(20, vocab_size=65_536)) == pytest.approx(3.4918e9, rel=2e-5)
    assert flops_per_token(nanochat(32, vocab_size=65_536)) == pytest.approx(1.20796e10, rel=2e-5)


def test_flops_by_hand_count_only_the_keys_in_the_window(tiny_config):
    # q 32x32, k and v 32x16, o 32x32, three of 32x48: 7680 a layer; gains 2 * (32 + 32 + 16 + 16) + 32 = 224; head 32 * 64
    outside_embedding = 2 * 7680 + 224 + 2048
    assert flops_per_token(tiny_config()) == 6 * outside_embedding + 12 * 2 * 32 * 12
    assert flops_per_token(tiny_config(window=5)) == 6 * outside_embedding + 12 * 2 * 32 * 5
    assert flops_per_token(tiny_config(window=99)) == flops_per_token(tiny_config())


def naive_modern(p: dict, tokens: np.ndarray, base: float) -> np.ndarray:
    """The modern preset in float64 numpy: one row, 2 query heads of 16 on 1 key head."""
    p = {name: np.asarray(x, np.float64) for name, x in p.items()}

    def norm(x, gain=1.0):
        return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def rope(x_TH):
        a, b = x_TH[:, :8], x_TH[:, 8:]
        angle = np.arange(len(x_TH))[:, None] / base ** (np.arange(8) / 8)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    x = norm(p["embedding"][tokens])
    for i in range(2):
        w = {name.removeprefix(f"blocks.{i}."): v for name, v in p.items() if name.startswith(f"blocks.{i}.")}
        h = norm(x, w["norm_1.gain"])
        k = rope(norm(h @ w["attention.k.w"], w["attention.k_norm.gain"]))
        heads = []
        for n in range(2):
            q = rope(norm((h @ w["attention.q.w"])[:, 16 * n : 16 * n + 16], w["attention.q_norm.gain"]))
            scores = np.where(np.tri(len(tokens), dtype=bool), q @ k.T / 4, -np.inf)
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(probs / probs.sum(-1, keepdims=True) @ (h @ w["attention.v.w"]))
        x = x + np.concatenate(heads, 1) @ w["attention.o.w"]
        h = norm(x, w["norm_2.gain"])
        gate = h @ w["ffn.gate.w"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn.up.w"])) @ w["ffn.down.w"]
    return norm(x, p["norm.gain"]) @ p["head.w"]


def test_the_modern_preset_equals_a_transformer_written_in_numpy(tiny_model, tokens):
    graph, params = tiny_model(rope_base=100.0)  # small, so that 12 positions turn every pair
    got = logits_of(graph, params, tokens)
    for row in range(2):
        want = naive_modern(params, np.asarray(tokens[row]), 100.0)
        np.testing.assert_allclose(got[row], want, atol=1e-4)  # float32 through two blocks, |logits| <= 10
    assert np.abs(got).max() > 1


def test_future_tokens_have_no_influence(tiny_model):
    reach = influence(*tiny_model(), embedded(), 5)
    assert (reach[6:] == 0).all()
    assert (reach[:6] > 0).all()


def test_a_window_hides_keys_and_layers_widen_it(tiny_model):
    # 3 keys including the token: each layer looks 2 further back
    assert (influence(*tiny_model(depth=1, window=3), embedded(), 8) > 0).tolist() == [6 <= s <= 8 for s in range(T)]
    assert (influence(*tiny_model(depth=2, window=3), embedded(), 8) > 0).tolist() == [4 <= s <= 8 for s in range(T)]


def test_a_pattern_gives_each_layer_its_own_window(tiny_model):
    # S sees 3 keys, L all: the last layer, L, reaches every token before.
    assert (influence(*tiny_model(depth=2, window=3, window_pattern="SL"), embedded(), 8) > 0).tolist() == [s <= 8 for s in range(T)]


def test_documents_of_one_row_have_no_influence_on_each_other(tiny_model):
    segments = jnp.array([[1] * 5 + [2] * 7])
    assert (influence(*tiny_model(), embedded(), 9, segments) > 0).tolist() == [5 <= s <= 9 for s in range(T)]
    assert (influence(*tiny_model(), embedded(), 3, segments) > 0).tolist() == [s <= 3 for s in range(T)]


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_a_document_reads_the_same_wherever_it_stands_in_a_row(tiny_model, tokens, backend):
    graph, params = tiny_model(attention=BACKENDS[backend])
    packed = logits_of(graph, params, tokens, jnp.array([[1] * 5 + [2] * 7] * 2))
    alone = logits_of(graph, params, jnp.roll(tokens, -5, 1), jnp.array([[1] * 7 + [2] * 5] * 2))
    np.testing.assert_allclose(packed[:, 5:], alone[:, :7], atol=2e-4)  # float32 angles at shifted positions, |logits| <= 10


BASE: dict = dict(window=None, softcap=None)


@pytest.fixture(scope="module")
def base_logits(tiny_model, tokens):
    graph, params = tiny_model(**BASE)
    return set(params), np.asarray(logits_of(graph, params, tokens))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (dict(rope_base=50.0), "same"),
        (dict(softcap=2.0), "same"),
        (dict(embed_norm=False), "same"),
        (dict(window=4), "same"),
        (dict(norm="fixed"), "fewer"),
        (dict(qk_norm=False), "fewer"),
        (dict(ffn="relu2"), "fewer"),
    ],
    ids=str,
)
def test_every_switch_changes_what_the_model_computes(tiny_model, tokens, base_logits, change, names):
    graph, params = tiny_model(**(BASE | change))
    all_names, want = base_logits
    assert set(params) == all_names if names == "same" else set(params) < all_names
    # The base model's parameters wherever they exist, so that the switch alone makes the difference.
    _, base = tiny_model(**BASE)
    got = logits_of(graph, {name: base[name] for name in params}, tokens)
    assert np.abs(np.asarray(got) - want).max() > 1e-2


def test_gains_exist_where_norms_learn_and_nowhere_else(tiny_config):
    def gains(**change):
        return {name for name in shapes_of(tiny_config(depth=1, **change))[0] if name.endswith("gain")}

    outer = {"norm.gain", "blocks.0.norm_1.gain", "blocks.0.norm_2.gain"}
    assert gains() == outer | {"blocks.0.attention.q_norm.gain", "blocks.0.attention.k_norm.gain"}
    assert gains(qk_norm=False) == outer
    assert gains(norm="fixed") == set()


def test_softcap_bounds_the_logits(tiny_model, tokens):
    graph, params = tiny_model(softcap=2.0)
    got = np.asarray(logits_of(graph, params, tokens))
    plain = np.asarray(logits_of(*tiny_model(), tokens))
    np.testing.assert_allclose(got, 2 * np.tanh(plain / 2), atol=1e-5)  # float32 logits of magnitude 10
    assert np.abs(plain).max() > 2 > np.abs(got).max()


def test_grouped_queries_equal_repeated_key_kernels_and_their_gradients_are_sums_over_the_group(tiny_model, tokens):
    graph, params = tiny_model(depth=1, d_model=64, n_kv_head=2)
    full, _ = tiny_model(depth=1, d_model=64, n_kv_head=4)

    def repeat(name, w):
        return jnp.repeat(w.reshape(64, 2, 16), 2, axis=1).reshape(64, 64) if name.endswith((".k.w", ".v.w")) else w

    loss, grads = loss_and_gradients(graph, params, tokens)
    full_loss, full_grads = loss_and_gradients(full, {name: repeat(name, w) for name, w in params.items()}, tokens)
    np.testing.assert_allclose(loss, full_loss, rtol=1e-6)
    for name, g in grads.items():
        other = full_grads[name]
        if other.shape != g.shape:
            other = other.reshape(64, 2, 2, 16).sum(2).reshape(g.shape)
        # float32 sums in another order, next to the largest entry
        np.testing.assert_allclose(g, other, atol=1e-5 * float(jnp.abs(g).max()), err_msg=name)


@pytest.fixture(scope="module")
def fresh() -> tuple:
    """(graph, params) as a run starts with them, drawn by the model itself."""
    c = ModelConfig(depth=2, d_model=64, head_dim=32, n_kv_head=1, d_ffn=192, seq_len=T, vocab_size=256)

    def build() -> GPT:
        return GPT(c, attention=reference_attention, key=jax.random.key(3))

    with nnx.use_eager_sharding(False):
        graph, _, _ = split(build)
        return graph, jax.jit(lambda: parameters(build()))()


def test_every_parameter_starts_with_the_spread_that_it_should(fresh):
    _, params = fresh
    square = 64**-0.5
    want = {"embedding": 1.0, "head.w": 0.0}
    for i in range(2):
        # k and v map 64 to 32: sqrt(32 / 64) / sqrt(64)
        spread = dict(q=square, k=square * 0.5**0.5, v=square * 0.5**0.5, o=0.0)
        want |= {f"blocks.{i}.attention.{name}.w": std for name, std in spread.items()}
        want |= {f"blocks.{i}.ffn.{name}.w": std for name, std in dict(gate=square, up=square, down=0.0).items()}
    assert set(want) == {name for name, w in params.items() if w.ndim == 2}
    for name, std in want.items():
        w = np.asarray(params[name])
        assert w.std() == pytest.approx(std, rel=4 / (2 * w.size) ** 0.5), name  # four standard errors of a standard deviation
        assert abs(w.mean()) <= 4 * std / w.size**0.5, name
    assert all((w == 1).all() for w in params.values() if w.ndim == 1)


def test_no_two_matrices_are_drawn_alike(fresh):
    drawn = {name: np.sort(np.asarray(w).ravel())[-8:] for name, w in fresh[1].items() if w.ndim == 2 and (w != 0).any()}
    firsts = {tuple(np.round(x / x[-1], 6)) for x in drawn.values()}  # relative, for the spreads differ
    assert len(firsts) == len(drawn) == 11


def test_a_zero_head_costs_log_v_a_token(fresh, tokens):
    loss, grads = loss_and_gradients(*fresh, tokens)
    assert (logits_of(*fresh, tokens) == 0).all()
    np.testing.assert_allclose(loss / tokens.size, np.log(256), rtol=1e-6)  # a float32 sum of 24 equal terms
    assert float(jnp.abs(grads["head.w"]).max()) > 0  # and the head can leave zero


def test_rematerialisation_changes_no_gradient(tiny_model, tokens):
    loss, grads = loss_and_gradients(*tiny_model(), tokens)
    again, regrads = loss_and_gradients(*tiny_model(remat=True), tokens)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for name, g in grads.items():
        # XLA fuses the two otherwise, so float32 sums differ in order
        np.testing.assert_allclose(regrads[name], g, atol=1e-5 * float(jnp.abs(g).max()), err_msg=name)
    for remat in (False, True):
        graph, params = tiny_model(remat=remat)
        program = str(jax.make_jaxpr(lambda p, g=graph: merge(g, p).hidden(tokens))(params))
        assert ("remat" in program or "checkpoint" in program) == remat


def test_bfloat16_activations_leave_float32_logits_near_the_others(tiny_model, tokens):
    graph, params = tiny_model(compute_dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda p: merge(graph, p).hidden(tokens), params).dtype == jnp.bfloat16
    got, want = logits_of(graph, params, tokens), logits_of(*tiny_model(), tokens)
    assert got.dtype == jnp.float32
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 1e-4 < error < 0.05  # some 20 roundings to 8 bits in a row, each at most 2**-8; zero would mean that nothing was rounded


def test_parameters_survive_merge_and_split(tiny_model, tokens):
    graph, params = tiny_model()
    back = parameters(merge(graph, params))
    assert set(back) == set(params)
    assert all((back[name] == params[name]).all() for name in params)
    other = params | {"norm.gain": 2 * params["norm.gain"]}
    np.testing.assert_allclose(logits_of(graph, other, tokens), 2 * logits_of(graph, params, tokens), rtol=1e-6)
