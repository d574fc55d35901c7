"""The gradient of the loss by the logits, made where it is rounded to 8 bits: it is never written. B batch, T tokens, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from nanojax.ops.kernels.cross_entropy import gradient, nats_and_sums
from nanojax.ops.kernels.spread import ROWS
from nanojax.ops.kernels.work import EVERY, GIVEN, WORD, Cut, Part, Tiles, Work

Made = tuple[Work, tuple[Array, ...]]
"""A work, and what it is done on."""


@dataclasses.dataclass(frozen=True)
class LossGradient(Work):
    """(logits [B, T, V], the logarithms of their sums and targets, [B, T] each) -> [B, T, V]."""

    softcap: float | None
    interpret: bool
    warps: int = 8
    bound: float | None = 1.0  # probabilities less one or nothing, times slopes of a cap

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        return (ROWS,) * 3

    def few(self, xs: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(x[:, ::EVERY] for x in xs)

    def made(self, xs: Sequence[Array]) -> tuple[tuple[Array, ...], Array | None]:
        logits, sums, targets = xs
        at = jnp.arange(logits.shape[-1])[None, None]
        d = gradient(logits.astype(jnp.float32), at, targets[..., None], sums[..., None], self.softcap, interpret=True)
        return (d.astype(logits.dtype),), None

    def cut(self, xs: Sequence[Array], lanes: int = WORD) -> Cut:
        return GIVEN.cut(xs[:1], lanes)

    def views(self, cut: Cut, xs: Sequence[Array]) -> list[Array]:
        return [cut.views(xs[0], cut.shape[2]), *(cut.views(x) for x in xs[1:])]

    def sums(self, xs: Sequence[Array]) -> list[tuple[int, ...]]:
        return GIVEN.sums(xs)

    def cases(self, cut: Cut, refs: Sequence[Any], i: Any, j: Any) -> list[tuple[Any, Tiles]]:
        logits, sums, targets = refs
        across = cut.shape[2] // cut.grid[1]
        columns = pl.ds(j * across, across)

        def tiles(lane: int) -> tuple[tuple[Part, ...], tuple[Array, ...]]:
            rows, at = cut.rows(i), j * across + jnp.arange(across)
            x, target, log2_sum = logits[rows, lane, columns].astype(jnp.float32), targets[rows, lane], sums[rows, lane]
            d = gradient(x, at[None], target[:, None], log2_sum[:, None], self.softcap, self.interpret)
            return (Part(d, 0, columns),), ()

        return [(None, tiles)]


def nats_and_gradient(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], softcap: float | None, *, interpret: bool = False
) -> tuple[Float[Array, "B T"], Made]:
    """(nats of every token in float32, how the gradient of their sum by the logits is made)."""
    v = logits_BTV.shape[-1]
    nats, sums = nats_and_sums(logits_BTV.reshape(-1, v), targets_BT.reshape(-1), softcap, interpret=interpret)
    xs = logits_BTV, sums.reshape(targets_BT.shape), targets_BT
    return nats.reshape(targets_BT.shape), (LossGradient(softcap, interpret), xs)
