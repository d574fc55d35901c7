"""Tokens/s of the data loader and documents/s of the packing, from memory-mapped random tokens.   python scripts/bench/loader.py"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nanojax.cli import parse
from nanojax.config import Packing
from nanojax.errors import run_main

N_VOCAB = 32768
PACKINGS: tuple[Packing, ...] = get_args(Packing)


@dataclass(frozen=True, kw_only=True)
class Bench:
    seq_len: int | None = None
    """T. None: 256, then 2048."""
    packing: Packing | None = None
    """None: each in turn."""
    documents: int = 200_000
    """Documents of the random corpus."""
    mean_tokens: int = 600
    """Mean length of a document; lengths are log-normal, as those of web text roughly are."""
    batch_tokens: int = 2**19
    """Tokens a step."""
    seconds: float = 3.0
    """Time each measurement takes, after two steps of warm-up."""
    device: bool = False
    """Also place the batches on jax's first device."""


class RandomStore:
    """nanojax.data.shards.TokenStore's interface over one memory-mapped file of random uint16 tokens."""

    split = "train"

    def __init__(self, folder: Path, documents: int, mean_tokens: int) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.lognormal(np.log(mean_tokens) - 0.5, 1.0, documents).astype(np.int64) + 2
        self.folder = folder
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        rng.integers(0, N_VOCAB, int(self.offsets[-1]), np.uint16).tofile(folder / "tokens.bin")
        self.tokens = np.asarray(np.memmap(folder / "tokens.bin", np.uint16, mode="r"))

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def measure(store: Any, packing: Packing, seq_len: int, bench: Bench) -> str:
    """One line: time of the plan, share dropped, tokens/s."""
    import jax

    from nanojax.data.loader import Loader
    from nanojax.data.packing import plan

    start = time.perf_counter()
    rows = plan(store.offsets, seq_len, packing, 0)
    plan_s = time.perf_counter() - start
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if bench.device else None
    loader = Loader(store, rows, rows_per_step=bench.batch_tokens // seq_len, sharding=sharding, seed=0, n_vocab=N_VOCAB)
    for _ in range(2):
        next(loader)
    steps, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < bench.seconds:
        jax.block_until_ready(next(loader))
        steps += 1
    loader.close()
    return (
        f"{packing:9}T={seq_len:<6}plan {plan_s:6.2f} s = {bench.documents / plan_s / 1e6:5.2f} M documents/s, {rows.dropped:6.1%} dropped;"
        f"  {steps * bench.batch_tokens / took / 1e6:7.1f} M tokens/s over {steps} steps"
    )


def main(argv: Sequence[str]) -> None:
    bench = parse(Bench, argv, prog="python scripts/bench/loader.py", description=__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        store = RandomStore(Path(folder), bench.documents, bench.mean_tokens)
        print(f"{os.cpu_count()} CPU cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}, numpy {np.__version__}; {bench}")
        print(f"{bench.documents} documents, {store.offsets[-1] / 1e6:.0f} M tokens")
        for packing in (bench.packing,) if bench.packing else PACKINGS:
            for seq_len in [bench.seq_len] if bench.seq_len else [256, 2048]:
                print(measure(store, packing, seq_len, bench), flush=True)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
