"""Spikes: what counts as one, and what the history makes of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.spikes import SHARE, SIGMA, WINDOW, judge, no_history

RNG = np.random.default_rng(0)
ROWS = 256
USUAL = {"loss": 3 + 0.1 * RNG.standard_normal(3 * WINDOW), "grad_norm": 1 + 0.2 * RNG.standard_normal(3 * WINDOW)}


@functools.partial(jax.jit, static_argnums=4)
def step(history, seen, loss, grad_norm, rows):
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike, history = judge(history, seen, finite, {"loss": loss, "grad_norm": grad_norm}, rows)
    return spike, history, seen + finite


def told(losses, norms, history=None, seen=0, rows=ROWS):
    """(indices of the spikes, history, finite steps) of a run of steps."""
    history, found = history or no_history(), []
    for n, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        spike, history, seen = step(history, seen, float(loss), float(norm), rows)
        found += [n] * bool(spike)
    return found, history, int(seen)


@pytest.fixture(scope="module")
def usual():
    return told(USUAL["loss"], USUAL["grad_norm"])


def test_usual_steps_have_no_spike(usual):
    found, _, seen = usual
    assert (found, seen) == ([], 3 * WINDOW)


@pytest.mark.parametrize(
    ("loss", "norm", "spike"),
    [
        (3.0, 1e4, True),
        (3.0, 2.0, False),  # 5 standard deviations
        (3.0, 2.9, True),  # 9
        (3.5, 1.0, False),
        (3.9, 1.0, True),
        (0.1, 0.001, False),  # what falls is no spike
    ],
)
def test_a_step_far_above_the_last_ones_is_one(usual, loss, norm, spike):
    _, history, seen = usual
    assert told([loss], [norm], history, seen)[0] == ([0] if spike else [])


@pytest.mark.parametrize(
    ("rows", "loss", "norm", "spike"),
    [
        (8, 3.0, 4.9, False),  # a row of 32 usual gradients and 7 usual ones: 39 / 8
        (8, 3.0, 5.2, True),
        (2, 3.0, 16.0, False),
        (2, 3.0, 18.0, True),
        (8, 4.0, 1.0, False),  # a row four times as hard as usual: 3 * 11 / 8 = 4.1
        (8, 4.3, 1.0, True),
    ],
)
def test_what_a_single_row_of_a_small_batch_can_do_is_none(usual, rows, loss, norm, spike):
    _, history, seen = usual
    assert told([loss], [norm], history, seen, rows)[0] == ([0] if spike else [])


def test_until_the_history_is_full_none_is():
    assert told([3.0] * WINDOW, [1.0] * (WINDOW - 1) + [1e6])[0] == []
    assert told([3.0] * (WINDOW + 1), [1.0] * WINDOW + [1e6])[0] == [WINDOW]


def test_a_spike_enters_the_history_as_its_limit_and_what_is_not_finite_not_at_all(usual):
    _, history, seen = usual
    window = np.asarray(history["grad_norm"])
    _, after, now = told([3.0], [1e6], history, seen)
    changed = np.flatnonzero(np.asarray(after["grad_norm"]) != window)
    assert changed.tolist() == [seen % WINDOW]
    limit = window.mean() + max(SIGMA * window.std(), SHARE["grad_norm"] * window.mean())
    np.testing.assert_allclose(after["grad_norm"][changed[0]], limit, rtol=1e-5)  # float32 sums of 128
    for loss, norm in ((np.nan, 1.0), (3.0, np.inf)):
        found, after, again = told([loss], [norm], history, now)
        assert (found, again) == ([], now)
        assert all((after[name] == history[name]).all() for name in history)


def test_a_level_that_lasts_is_let_in_before_a_run_would_go_back(usual):
    """The gradient of another phase of a run, five times as large."""
    from nanojax.meter import MAX_IN_A_ROW

    _, history, seen = usual
    found, _, _ = told([3.0] * 60, 5 * USUAL["grad_norm"][:60], history, seen)
    assert 0 < len(found) <= MAX_IN_A_ROW
    assert found[-1] < MAX_IN_A_ROW


def test_a_run_without_anything_to_learn_at_first_is_not_stuck():
    from nanojax.meter import MAX_IN_A_ROW

    found, _, _ = told([0.0] * 130 + [3.0] * 40, [0.0] * 130 + [1.0] * 40)
    assert len(found) <= MAX_IN_A_ROW
    assert 169 not in found


def test_without_a_history_nothing_is_a_spike():
    spike, history = judge({}, jnp.int32(500), jnp.bool_(True), {"loss": jnp.float32(1e9), "grad_norm": jnp.float32(1e9)}, ROWS)
    assert (bool(spike), history) == (False, {})
