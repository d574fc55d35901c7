"""What is rounded to 8 bits, and of what it is made on the way (both_ways.py).

B batch, T tokens, N of both, P parts of the columns, C columns of a part. An instance takes a square of tokens and columns in L lanes, each
of every L-th token: as many lanes as a word has bytes, which are turned as one, or, to see a few tokens, one lane of many.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from nanojax.ops.kernels.spread import ROWS

# What other sides and warps take is in scripts/bench/LOG.md.
AT_ONCE, ACROSS = 16, 128  # tokens of a lane and columns of a square
WARPS = 4  # of an instance
WORD = 4  # bytes that are turned as one
EVERY = 64  # of so many tokens one says how large numbers are


class Cut(NamedTuple):
    """How what is rounded, [N, P, C], is cut into squares, one an instance."""

    grid: tuple[int, int]
    """Squares down and across. Those of one row follow each other: they read what lies side by side."""
    down: int
    """Tokens of a square."""
    lanes: int
    """L."""
    shape: tuple[int, int, int]
    """N, P, C."""

    def views(self, x: Array, *parts: int) -> Array:
        """A tensor as an instance reads or writes it: [N / L, L, ...]."""
        return x.reshape(-1, self.lanes, *parts)

    def rows(self, i: Any) -> Any:
        """Tokens of the squares that lie in row i, each with the L - 1 after it."""
        size = self.down // self.lanes
        return pl.ds(i * size, size)


class Part(NamedTuple):
    """What becomes of a part in an instance."""

    value: Array
    """In float32."""
    at: Any
    """Which of P it is."""
    columns: Any
    """Its place in C."""


Tiles = Callable[[int], tuple[tuple[Part, ...], tuple[Array, ...]]]
"""A lane of L -> (the parts of a square in it, arrays [tokens, ...] whose sums over tokens are wanted)."""


class Work(abc.ABC):
    """What is rounded, and of what it is made."""

    warps: int
    """Of an instance."""
    bound: float | None
    """What no number exceeds, where that is known."""

    @property
    @abc.abstractmethod
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Of each tensor that it is made of (spread.py)."""

    @abc.abstractmethod
    def few(self, xs: Sequence[Array]) -> tuple[Array, ...]:
        """Every `EVERY`th token of them."""

    @abc.abstractmethod
    def made(self, xs: Sequence[Array]) -> tuple[tuple[Array, ...], Array | None]:
        """(what is rounded, in parts side by side, in the type of the first tensor; sums beside it, or None)."""

    @abc.abstractmethod
    def cut(self, xs: Sequence[Array], lanes: int = WORD) -> Cut:
        """Into squares whose sides are powers of two, of so many lanes if there are as many tokens."""

    @abc.abstractmethod
    def views(self, cut: Cut, xs: Sequence[Array]) -> list[Array]:
        """Tensors as `cases` takes them."""

    @abc.abstractmethod
    def sums(self, xs: Sequence[Array]) -> list[tuple[int, ...]]:
        """Shape of the sums over tokens that are made on the way, [squares down, squares across, ...], if there are any."""

    @abc.abstractmethod
    def cases(self, cut: Cut, refs: Sequence[Any], i: Any, j: Any) -> list[tuple[Any, Tiles]]:
        """(when, how the square is made that lies in row i and column j), of which one applies; None is always."""


TOKEN, COLUMN = 0, -1  # what a tensor has a number for, [B, T] or [C]


@dataclasses.dataclass(frozen=True)
class Each(Work):
    """Made number by number."""

    make: Callable[..., tuple[Array, ...]]
    """(the parts of each tensor that is read, one after the other; floats in float32) -> parts of what is rounded."""
    reads: tuple[int, ...] = (1,)
    """Parts of each tensor, side by side along its columns and of one size; or TOKEN or COLUMN."""
    makes: int = 1
    """Parts, side by side too."""
    warps: int = WARPS
    bound: float | None = None

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        return tuple(() if count == COLUMN else ROWS for count in self.reads)

    def few(self, xs: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(x if count == COLUMN else x[:, ::EVERY] for x, count in zip(xs, self.reads, strict=True))

    def made(self, xs: Sequence[Array]) -> tuple[tuple[Array, ...], Array | None]:
        parts: list[Array] = []
        for x, count in zip(xs, self.reads, strict=True):
            parts += [x[..., None]] if count == TOKEN else [x[None, None]] if count == COLUMN else jnp.split(x, count, axis=-1)
        return tuple(part.astype(xs[0].dtype) for part in self.make(*map(_wide, parts))), None

    def cut(self, xs: Sequence[Array], lanes: int = WORD) -> Cut:
        n, columns = xs[0].size // xs[0].shape[-1], xs[0].shape[-1] // self.reads[0]
        down, across = min(AT_ONCE * lanes, n & -n), min(ACROSS, columns & -columns)
        return Cut((n // down, columns // across), down, min(lanes, down), (n, self.makes, columns))

    def views(self, cut: Cut, xs: Sequence[Array]) -> list[Array]:
        flat = []
        for x, count in zip(xs, self.reads, strict=True):
            flat.append(x if count == COLUMN else cut.views(x) if count == TOKEN else cut.views(x, count, cut.shape[2]))
        return flat

    def sums(self, xs: Sequence[Array]) -> list[tuple[int, ...]]:
        del xs
        return []

    def cases(self, cut: Cut, refs: Sequence[Any], i: Any, j: Any) -> list[tuple[Any, Tiles]]:
        across = cut.shape[2] // cut.grid[1]
        columns = pl.ds(j * across, across)

        def tiles(lane: int) -> tuple[tuple[Part, ...], tuple[Array, ...]]:
            rows, parts = cut.rows(i), []
            for ref, count in zip(refs, self.reads, strict=True):
                parts += [ref[rows, lane][:, None]] if count == TOKEN else [ref[columns][None]] if count == COLUMN else []
                parts += [ref[rows, lane, part, columns] for part in range(count)]
            return tuple(Part(value, at, columns) for at, value in enumerate(self.make(*map(_wide, parts)))), ()

        return [(None, tiles)]


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


GIVEN = Each(lambda x: (x,))
NORMED = Each(lambda x, over, gain: (x * over * gain,), (1, TOKEN, COLUMN))
"""(x [B, T, D], over [B, T], gain [D]) of a norm (ops/norm.py)."""
