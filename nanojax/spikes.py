"""Which steps stand out so far that their update is better left out. W steps that are looked back on."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The rule of OLMo (arXiv:2501.00656, section 3.1; SkipStepOptimizer in OLMo-core): 6 standard deviations above the mean of 128 steps.
WINDOW = 128
SIGMA = 6.0
WATCHED = ("loss", "grad_norm")


def no_history() -> dict[str, Float[Array, " W"]]:
    """What a run that has taken no step yet looks back on."""
    return {name: jnp.zeros(WINDOW, jnp.float32) for name in WATCHED}


def judge(
    history: dict[str, Float[Array, " W"]], seen: Int[Array, ""], finite: Bool[Array, ""], values: dict[str, Float[Array, ""]]
) -> tuple[Bool[Array, ""], dict[str, Float[Array, " W"]]]:
    """(whether a value of the step is a spike, the history with the step in it); without a history, no step is.

    `seen` is how many finite steps there were before; until there are W, none is a spike. A step that is not `finite` leaves no trace.
    A spike enters the history as the limit that it passed: a single one hardly moves it, and a level that lasts is let in, within a few
    steps where it lies some tens of standard deviations up, because the limit grows with each.
    """
    spike, after = jnp.zeros((), bool), {}
    for name, window_W in history.items():
        value, deviation = values[name], jnp.std(window_W)
        # A standard deviation of exactly 0 says nothing about what comes, as where all targets were masked so far.
        limit = jnp.where((seen >= WINDOW) & (deviation > 0), jnp.mean(window_W) + SIGMA * deviation, jnp.inf)
        spike |= finite & (value > limit)
        after[name] = jnp.where(finite, window_W.at[seen % WINDOW].set(jnp.minimum(value, limit)), window_W)
    return spike, after
