"""Which steps stand out so far that their update is better left out. W steps that are looked back on."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# OLMo's rule (arXiv:2501.00656; SkipStepOptimizer of OLMo-core): 6 standard deviations above the mean of 128 steps.
WINDOW = 128
SIGMA = 6.0
# What stands out is also above the mean by this share of it, and by more than one row of text may weigh in usual ones: of 1,000 clean
# steps of 8 rows one had a gradient 54 standard deviations up, 4 times the mean; of 32 rows, 1.4 times (scripts/bench/LOG.md).
SHARE = {"loss": 0.05, "grad_norm": 1.0}
ROW = {"loss": 3.0, "grad_norm": 32.0}


def no_history() -> dict[str, Float[Array, " W"]]:
    """What a run that has taken no step yet looks back on."""
    return {name: jnp.zeros(WINDOW, jnp.float32) for name in SHARE}


def judge(
    history: dict[str, Float[Array, " W"]], seen: Int[Array, ""], finite: Bool[Array, ""], values: dict[str, Float[Array, ""]], rows: int
) -> tuple[Bool[Array, ""], dict[str, Float[Array, " W"]]]:
    """(whether a value of the step, which had so many rows, is a spike, the history with the step in it); without a history, no step is.

    `seen` is how many finite steps there were before; until there are W, none is a spike. A step that is not `finite` leaves no trace.
    A spike enters the history as the limit that it passed: a single one hardly moves it, and a level that lasts is let in after some
    steps, because the limit grows with each.
    """
    spike, after = jnp.zeros((), bool), {}
    for name, window_W in history.items():
        value, mean = values[name], jnp.mean(window_W)
        limit = mean + jnp.maximum(SIGMA * jnp.std(window_W), max(SHARE[name], ROW[name] / rows) * mean)
        # A mean of 0, as where all targets were masked so far, says nothing about what comes.
        limit = jnp.where((seen >= WINDOW) & (mean > 0), limit, jnp.inf)
        spike |= finite & (value > limit)
        after[name] = jnp.where(finite, window_W.at[seen % WINDOW].set(jnp.minimum(value, limit)), window_W)
    return spike, after
