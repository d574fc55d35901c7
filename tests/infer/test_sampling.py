"""Filters, held to numpy sums over a dictionary, and draws, held to their probabilities."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax.errors import UserError
from nanojax.infer.params import SamplingParams
from nanojax.infer.sampling import Controls, draw, kept

V = 12
drawing = jax.jit(draw, static_argnames="filters")
keeping = jax.jit(kept)


def survivors(logits: np.ndarray, p: SamplingParams) -> dict[int, float]:
    """Token -> probability, written out: one filter after the other, each on what is left, made to sum to one."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / p.temperature)
    left = {int(i): weights[i] for i in sorted(range(len(logits)), key=lambda i: (-logits[i], i))}
    if p.top_k:
        left = dict(list(left.items())[: p.top_k])
    total, so_far, nucleus = sum(left.values()), 0.0, {}
    for token, weight in left.items():
        if so_far >= p.top_p * total:
            break
        nucleus[token] = weight
        so_far += weight
    most = max(nucleus.values())
    left = {token: weight for token, weight in nucleus.items() if weight >= p.min_p * most}
    return {token: weight / sum(left.values()) for token, weight in left.items()}


def counts(logits: np.ndarray, p: SamplingParams, draws: int) -> np.ndarray:
    """Share of each token among so many draws, of one seed and of consecutive indices."""
    controls = Controls.of([p] * draws)
    tokens = drawing(jnp.tile(jnp.asarray(logits)[None], (draws, 1)), controls, jnp.arange(draws), filters=p.filters)
    return np.bincount(tokens, minlength=len(logits)) / draws


@settings(max_examples=60)
@given(
    st.lists(st.integers(-40, 40), min_size=V, max_size=V),  # tenths, so that equal ones come up
    st.integers(0, V + 3),
    st.sampled_from([0.03, 0.31, 0.52, 0.87, 0.999, 1.0]),
    st.sampled_from([0.0, 0.013, 0.21, 0.93]),
    st.sampled_from([0.3, 1.0, 1.7]),
)
def test_filters_keep_what_a_reference_written_out_keeps(tenths, top_k, top_p, min_p, temperature):
    p = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.array(tenths, np.float32) / 10
    order = np.argsort(-logits, kind="stable")
    mask = np.asarray(keeping(jnp.asarray(logits[order] / np.float32(temperature))[None], Controls.of([p])))[0]
    assert set(order[mask].tolist()) == set(survivors(logits, p))


@pytest.mark.parametrize(
    "changes",
    [dict(top_k=0), dict(top_k=0, temperature=0.5), dict(top_k=4), dict(top_k=0, top_p=0.7), dict(top_k=0, min_p=0.3)],
    ids=str,
)
def test_draws_have_the_probabilities_of_what_is_left(changes):
    p = SamplingParams(**(dict(temperature=1.0, seed=5) | changes))
    logits, draws = np.random.default_rng(1).standard_normal(V).astype(np.float32) * 1.5, 20_000
    expected = np.zeros(V)
    for token, share in survivors(logits, p).items():
        expected[token] = share
    # Five standard deviations of a share of 20,000 draws, at most 0.018; with a fixed seed, the same each time.
    assert (np.abs(counts(logits, p, draws) - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_a_draw_is_of_its_seed_and_index_whatever_else_is_in_the_batch():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((6, V)), jnp.float32)
    rows = [SamplingParams(temperature=1.0, top_k=0, seed=s) for s in (7, 7, 8)]
    rows += [SamplingParams(temperature=1.3, top_k=3, seed=9), SamplingParams(temperature=0), SamplingParams(top_p=0.5, top_k=0)]
    index = jnp.array([0, 1, 0, 4, 5, 6])
    together = np.asarray(drawing(logits, Controls.of(rows), index, filters=True))
    for i, row in enumerate(rows):
        alone = drawing(logits[i : i + 1], Controls.of([row]), index[i : i + 1], filters=row.filters)
        assert together[i] == alone[0], row
    flat = functools.partial(drawing, jnp.zeros((64, 500)), filters=False)
    plain = [SamplingParams(temperature=1.0, top_k=0, seed=s) for s in range(64)]
    zeros = jnp.zeros(64, jnp.int32)
    first, second = np.asarray(flat(Controls.of(plain), zeros)), np.asarray(flat(Controls.of(plain), zeros + 1))
    assert len(set(first.tolist())) > 40, "seeds must draw differently"
    assert (first != second).sum() > 55, "tokens of a row must draw differently"


def test_temperature_zero_and_a_top_k_of_one_take_the_likeliest_and_of_equals_the_first():
    logits = jnp.asarray([[0.0, 3.0, 3.0, 1.0]] * 50)
    for p in (SamplingParams(temperature=0), SamplingParams(top_k=1)):
        assert set(drawing(logits, Controls.of([p] * 50), jnp.arange(50), filters=True).tolist()) == {1}


def test_controls_stay_on_the_host_until_all_of_a_batch_is_placed():
    """The engine places them with the rest by one device_put; jnp arrays would each be made by a program of its own."""
    controls = Controls.of([SamplingParams(seed=3), SamplingParams(temperature=0)])
    assert all(type(x_B) is np.ndarray for x_B in controls)
    assert [x_B.dtype.name for x_B in controls] == ["float32", "int32", "float32", "float32", "int32"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(temperature=-0.1), "temperature=-0.1 must be 0 or from 0.01 to 100; try 0.8"),
        (dict(temperature=float("nan")), "temperature=nan must"),
        (dict(temperature=float("inf")), "temperature=inf must"),
        (dict(top_p=0.0), "top_p=0.0 must be above 0 and at most 1"),
        (dict(top_p=1.1), "top_p=1.1 must"),
        (dict(top_p=float("nan")), "top_p=nan must"),
        (dict(min_p=1.0), "min_p=1.0 must be at least 0"),
        (dict(min_p=-0.1), "min_p=-0.1 must"),
        (dict(top_k=-1), "top_k=-1 must be at least 0"),
        (dict(tokens=-1), "tokens=-1 must be at least 0"),
        (dict(seed=-1), "seed=-1 must be at least 0"),
        (dict(seed="x"), "seed='x' must be one of these: int"),
    ],
    ids=str,
)
def test_wrong_params_are_refused_in_one_line(wrong, words):
    with pytest.raises(UserError) as refused:
        SamplingParams(**wrong)
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)
