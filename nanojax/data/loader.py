"""Rows of a packing plan in training order: grain decides which, a background thread reads them, jax places them on the mesh.

Shape letters: A accumulation, B rows, T tokens; R rows that this process reads, U = T + 1.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import grain
import jax
import numpy as np

from nanojax.data.packing import Plan, read_rows
from nanojax.errors import UserError
from nanojax.ops.xent import IGNORED

if TYPE_CHECKING:
    from nanojax.data.shards import TokenStore

PREFETCH_STEPS = 2


class Batch(NamedTuple):
    """int32 [A, B, T] each: global arrays, or numpy where no sharding was given. Row a * B + b of the step is at [a, b]."""

    inputs: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    segments: jax.Array | np.ndarray
    """Documents of a row, numbered from 1; those of the inputs."""


class Loader(Iterator[Batch]):
    """Endless optimizer steps: step n is the rows [n R, n R + R) of the shuffled rows, R = rows_per_step, shuffled anew each epoch.

    So the position is one integer, and it means the same data on any number of processes and devices. Each process reads the rows that
    its own devices hold. Give it up with `close()`; it also closes when it is collected and when Python exits.
    """

    def __init__(
        self,
        store: TokenStore,
        plan: Plan,
        *,
        rows_per_step: int,
        sharding: jax.sharding.Sharding | None,
        seed: int,
        n_vocab: int,
        accum: int = 1,
    ) -> None:
        """`sharding` is that of [A, B, T]. Raises UserError when the rows do not divide by accum and mesh."""
        if rows_per_step % accum:
            raise UserError(
                f"rows a step must be a multiple of the accumulation, given {rows_per_step} rows and accum={accum}; change one of them"
            )
        self._placement = _Placement((accum, rows_per_step // accum, plan.seq_len), sharding)
        steps = _Steps(store, plan, self._placement, seed, n_vocab)
        # No reading threads but one: the rows are memory-mapped, and grain's pool is slower than reading in turn.
        in_turn = grain.MapDataset.source(steps).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        self._open = [iter(grain.experimental.ThreadPrefetchIterDataset(in_turn, prefetch_buffer_size=PREFETCH_STEPS))]
        self._next_step = 0
        self.close = weakref.finalize(self, _close, self._open)

    def __next__(self) -> Batch:
        """The next step. Raises UserError when a token id is outside the vocabulary."""
        assert self._open, "the loader is closed"
        host = next(self._open[0])
        self._next_step += 1
        return self._placement.place(host)

    def get_state(self) -> dict[str, int]:
        """The position: steps handed out, not those read ahead."""
        return {"next_step": self._next_step}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue as if `next_step` steps had been handed out, without reading them."""
        assert self._open, "the loader is closed"
        step = state.get("next_step")
        if not isinstance(step, int) or step < 0:
            raise UserError(
                f"the data position must be {{'next_step': n}} with n >= 0, given {dict(state)}; the checkpoint is from another version"
            )
        self._open[0].set_state({"next_index": step})
        self._next_step = step


def _close(iterators: list[grain.DatasetIterator]) -> None:
    """Close and let go: an iterator alive until Python takes its modules apart prints an AttributeError from its own __del__."""
    while iterators:
        iterators.pop().close()


def validation_batches(
    store: TokenStore, plan: Plan, *, rows_per_batch: int, max_tokens: int, sharding: jax.sharding.Sharding | None, n_vocab: int
) -> Iterator[Batch]:
    """The first ceil(max_tokens / T) rows of the plan, or all if there are fewer, in order, in batches [1, rows_per_batch, T].

    The last batch is filled up with copies of its last row whose targets are all IGNORED: one shape for all, each target counted once, and
    no row without a document, whose attention would be undefined.
    """
    placement = _Placement((1, rows_per_batch, plan.seq_len), sharding)
    total = min(plan.rows, math.ceil(max_tokens / plan.seq_len))
    for at in range(0, total, rows_per_batch):
        rows = at + placement.rows
        host = _read(store, plan, np.minimum(rows, total - 1), n_vocab)
        targets_RT = np.where((rows < total)[:, None], host.targets_RT, np.int32(IGNORED))
        yield placement.place(host._replace(targets_RT=targets_RT))


class _Host(NamedTuple):
    """int32 [R, T]: the rows of a step that this process reads. Inputs and targets are views of the same tokens: do not write."""

    inputs_RT: np.ndarray
    targets_RT: np.ndarray
    segments_RT: np.ndarray


class _Steps:
    """grain's RandomAccessDataSource: step n -> the _Host rows of this process."""

    def __init__(self, store: TokenStore, plan: Plan, placement: _Placement, seed: int, n_vocab: int) -> None:
        self.store, self.plan, self.placement, self.n_vocab = store, plan, placement, n_vocab
        # grain shuffles epoch e by seed + e; hashed first, epoch 1 of seed 0 is not epoch 0 of seed 1.
        hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.order = grain.MapDataset.range(plan.rows).shuffle(seed=hashed).repeat()

    def __len__(self) -> int:
        return sys.maxsize // self.placement.rows_per_step

    def __getitem__(self, index: int) -> _Host:
        first = int(index) * self.placement.rows_per_step
        rows = [self.order[first + row] for row in self.placement.rows.tolist()]
        return _read(self.store, self.plan, np.array(rows), self.n_vocab)


def _read(store: TokenStore, plan: Plan, rows: np.ndarray, n_vocab: int) -> _Host:
    """Rows int64 [R] of the plan -> _Host. Raises UserError on a token id outside [0, n_vocab)."""
    tokens_RU, segments_RU = read_rows(store, plan, rows.tolist())
    if (top := int(tokens_RU.view(np.uint32).max(initial=0))) >= n_vocab:  # as unsigned, so that it catches negative ids too
        raise UserError(
            f"token ids must be below the vocabulary's size {n_vocab}, given {top} in {store.folder}; take the tokenizer that made it"
        )
    return _Host(tokens_RU[:, :-1], tokens_RU[:, 1:], segments_RU[:, :-1])


class _Placement:
    """Which rows of a step this process reads, each once, and how they become arrays [A, B, T]."""

    def __init__(self, shape_ABT: tuple[int, int, int], sharding: jax.sharding.Sharding | None) -> None:
        self.shape_ABT, self.sharding = shape_ABT, sharding
        self.rows_per_step = math.prod(shape_ABT[:2])
        rows_AB = np.arange(self.rows_per_step).reshape(shape_ABT[:2])
        parts = [rows_AB]
        if sharding is not None:
            try:
                parts = [rows_AB[index[:2]] for index in sharding.addressable_devices_indices_map(shape_ABT).values() if index is not None]
            except ValueError as error:
                raise UserError(f"rows of a micro-batch must divide evenly over the mesh, given {shape_ABT[1]}; {error}") from error
        self.rows = np.unique(np.concatenate([part.ravel() for part in parts]))
        """int64 [R]: positions a * B + b, ascending."""
        self._slot_AB = np.full(shape_ABT[:2], -1)
        self._slot_AB.flat[self.rows] = np.arange(len(self.rows))

    def place(self, host: _Host) -> Batch:
        return Batch(*(self._place(array_RT) for array_RT in host))

    def _place(self, array_RT: np.ndarray) -> jax.Array | np.ndarray:
        if self.sharding is None:
            return array_RT.reshape(self.shape_ABT)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "jax asks only for what this process holds"
            return array_RT[self._slot_AB[index[:2]], index[2]]

        return jax.make_array_from_callback(self.shape_ABT, self.sharding, part)
