"""Gradients of queries, keys and values before norms and rotation, made where they are rounded to 8 bits: they are never written.

B batch, T tokens, N query heads, K key and value heads, H head size, L lanes of a square (work.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nanojax.ops.kernels.norm_rope import norm_rope_reference, turn_back
from nanojax.ops.kernels.spread import ROWS, TABLE
from nanojax.ops.kernels.work import EVERY, WARPS, WORD, Cut, Part, Tiles, Work

AT_ONCE = 8  # tokens of a lane (scripts/bench/LOG.md)


@dataclasses.dataclass(frozen=True)
class TurnBack(Work):
    """(queries, keys before they are turned, gradients of both turned and of values, gains of both, rotation) -> [B, T, (N + 2 K) H].

    A head is a square across, of two parts. Sums are those of the gradients of gains, [squares down, N + K, 2, H / 2].
    """

    warps: int = WARPS
    bound: float | None = None

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        return (*(ROWS,) * 5, (), (), TABLE, TABLE)

    def few(self, xs: Sequence[Array]) -> tuple[Array, ...]:
        return *(x[:, ::EVERY] for x in xs[:5]), *xs[5:7], *(table[::EVERY] for table in xs[7:])

    def made(self, xs: Sequence[Array]) -> tuple[tuple[Array, ...], Array | None]:
        q, k, dq, dk, dv, gain_q, gain_k, *rope = xs

        def back(x_BTH: Array, d_BTH: Array, gain_H: Array) -> tuple[Array, Array]:
            def turn(x_BTH: Array, gain_H: Array) -> Array:
                return norm_rope_reference(x_BTH[:, :, None], gain_H, (rope[0], rope[1]))[:, :, 0]

            return jax.vjp(turn, x_BTH, gain_H)[1](d_BTH)

        over_heads = jax.vmap(back, in_axes=(2, 2, None), out_axes=(2, 0))
        (dq, sums_q), (dk, sums_k) = over_heads(q, dq, gain_q), over_heads(k, dk, gain_k)
        sums_NH = jnp.concatenate([sums_q, sums_k])
        return tuple(x.reshape(*x.shape[:2], -1) for x in (dq, dk, dv)), sums_NH.reshape(1, len(sums_NH), 2, -1)

    def cut(self, xs: Sequence[Array], lanes: int = WORD) -> Cut:
        b, t, heads, size = xs[0].shape
        down = min(AT_ONCE * lanes, t & -t)  # none reaches into the next row, whose places start anew
        heads += 2 * xs[1].shape[2]
        return Cut((b * t // down, heads), down, min(lanes, down), (b * t, 2 * heads, size // 2))

    def views(self, cut: Cut, xs: Sequence[Array]) -> list[Array]:
        half = cut.shape[2]
        rows = [cut.views(x, 2 * x.shape[2], half) for x in xs[:5]]
        return [*rows, *(gain.reshape(2, half) for gain in xs[5:7]), *(cut.views(table, 2, half) for table in xs[7:])]

    def sums(self, xs: Sequence[Array]) -> list[tuple[int, ...]]:
        cut = self.cut(xs)
        return [(cut.grid[0], xs[0].shape[2] + xs[1].shape[2], 2, cut.shape[2])]

    def cases(self, cut: Cut, refs: Sequence[Any], i: Any, j: Any) -> list[tuple[Any, Tiles]]:
        q, k, dq, dk, dv, gain_q, gain_k, *rope = refs
        n, kv = q.shape[2] // 2, k.shape[2] // 2

        def halves(ref: Any, rows: Any, lane: int, head: Any) -> tuple[Array, Array]:
            first, second = (ref[rows, lane, 2 * head + part, :].astype(jnp.float32) for part in range(2))
            return first, second

        def tiles(first: int, d: Any, x: Any, gain: Any, lane: int) -> tuple[tuple[Part, ...], tuple[Array, ...]]:
            made, sums = halves(d, cut.rows(i), lane, j - first), ()
            if x is not None:
                places = cut.rows(i % (rope[0].shape[0] * cut.lanes // cut.down))
                table = tuple(ref[places, lane, 0, :] for ref in rope)
                made, sums = turn_back(halves(x, cut.rows(i), lane, j - first), (gain[0], gain[1]), table, made, x.dtype)
            return tuple(Part(value, 2 * j + part, slice(None)) for part, value in enumerate(made)), tuple(sums)

        return [
            (j < n, functools.partial(tiles, 0, dq, q, gain_q)),
            ((n <= j) & (j < n + kv), functools.partial(tiles, n, dk, k, gain_k)),
            (n + kv <= j, functools.partial(tiles, n + kv, dv, None, None)),
        ]


TURN_BACK = TurnBack()
