"""What a checkpoint costs: how long a save keeps the run waiting, and what hashing adds.   python scripts/bench/save.py --megabytes 64 512

States of noise, saved as a run saves them, in the background; the first of each size is dropped.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from nanojax import manifest
from nanojax.checkpoint import Checkpoints, bytes_of
from nanojax.checks import require_positive
from nanojax.cli import parse
from nanojax.digests import digests_of
from nanojax.errors import run_main
from nanojax.step import TrainState, first_state

ARRAYS = 16  # of equal size, in parameters and moments together


@dataclass(frozen=True, kw_only=True)
class Save:
    """Sizes, and how often."""

    megabytes: tuple[int, ...] = (64, 512)
    """Of the state."""
    rounds: int = 5
    """Saves of each size that are counted."""
    folder: str | None = None
    """On the disk that is to be measured. Derived: a temporary one."""

    def __post_init__(self) -> None:
        for size in (*self.megabytes, self.rounds):
            require_positive("megabytes and rounds", size)


def main(argv: Sequence[str]) -> None:
    """Print a row a size: medians, in seconds."""
    command = parse(Save, argv, prog="save.py", description=main.__doc__ or "")
    print("| state, MB | save() returns after | digests | a checkpoint after | of that, hashing | syncing and the rest of the manifest |")
    print("|---|---|---|---|---|---|")
    for size in command.megabytes:
        with tempfile.TemporaryDirectory(dir=command.folder) as folder:
            times = [measured(Path(folder), noise(size, step)) for step in range(1, command.rounds + 2)][1:]
        blocked, digest, whole, hashing, written = (statistics.median(column) for column in zip(*times, strict=True))
        share = f"{hashing:.3f} ({hashing / whole:.1%})"
        print(f"| {size} | {blocked:.3f} | {digest:.3f} | {whole:.3f} | {share} | {written - hashing:.3f} |", flush=True)


def noise(megabytes: int, step: int) -> TrainState:
    """A state of that size."""
    keys = jax.random.split(jax.random.key(step), ARRAYS)
    arrays = [jax.random.normal(key, (megabytes * 2**20 // (4 * ARRAYS),)) for key in keys]
    half = ARRAYS // 2
    params = {f"p{n}": array for n, array in enumerate(arrays[:half])}
    return dataclasses.replace(first_state(params, tuple(arrays[half:]), jnp.zeros(2, jnp.uint32)), step=jnp.int32(step))


def measured(folder: Path, state: TrainState) -> tuple[float, ...]:
    """Seconds: until save() returns, until digests are there, until it is a checkpoint, for hashes of its files, for its whole manifest."""
    jax.block_until_ready(state)
    began = time.perf_counter()
    jax.block_until_ready(digests_of({str(n): x for n, x in enumerate(jax.tree.leaves(state))}))
    digest = time.perf_counter() - began
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    began = time.perf_counter()
    checkpoints.save(state, {})
    blocked = time.perf_counter() - began
    checkpoints.close()
    whole = time.perf_counter() - began
    place = folder / "checkpoints" / str(int(state.step))
    files = dict(manifest.regular_files(place))
    assert sum(files.values()) > bytes_of(state) // 2
    began = time.perf_counter()
    manifest.hashes(place, files)
    hashing = time.perf_counter() - began
    began = time.perf_counter()
    manifest.write(place, int(state.step), {}, {})
    return blocked, digest, whole, hashing, time.perf_counter() - began


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
