"""A run that goes on from mesh to mesh: it takes up the state and the data that it left, and loses what a run on one device does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quick import QUICK
from training import presets  # noqa: F401  # a fixture

STEPS = 40
# (devices, mesh, step after which the leg ends); the first and the last are on one device.
LEGS = [
    (1, "data=1", 5),
    (8, "data=8", 8),
    (8, "data=2,fsdp=4", 11),
    (8, "fsdp=2,context=2,tensor=2", 14),
    (8, "data=2,context=4", 17),
    (1, "data=1", STEPS),
]
# A leg, in a process that has so many devices. It prints the digest of the state where it begins and ends, and of each step's tokens.
LEG = """
import hashlib, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from nanojax.checkpoint import state_sha256
from nanojax.data.loader import Loader
from nanojax.errors import run_main
from nanojax.loop import Loop
from nanojax.train import main

run, save, take = Loop.run, Loop.save, Loader.__next__

def told_run(self, state, saved, started):
    print("BEGAN", int(state.step), state_sha256(state, self.loader.get_state()), flush=True)
    return run(self, state, saved, started)

def told_save(self, state, position=None):
    print("SAVED", int(state.step), state_sha256(state, self.loader.get_state()), flush=True)
    save(self, state, position)

def told_take(self):
    batch = take(self)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in (batch.inputs, batch.targets, batch.segments)))
    shapes = {x.sharding.shard_shape(x.shape) for x in batch}
    print("TOOK", self.get_state()["next_step"], digest.hexdigest(), *shapes, flush=True)
    return batch

Loop.run, Loop.save, Loader.__next__ = told_run, told_save, told_take
run_main(main, sys.argv[2:])
"""


@dataclasses.dataclass
class Leg:
    """What a leg printed."""

    began: tuple[str, str]
    """(step, digest)."""
    saved: tuple[str, str]
    """Of the last save."""
    tokens: dict[int, str]
    """Step -> digest of its [A, B, T] as rows."""


def leg(preset: str, out: Path, devices: int, mesh: str, end: int, *flags: str) -> Leg:
    # One row a device and microbatch, as many as data and fsdp divide.
    argv = [str(devices), preset, "--out", str(out), "--mesh", mesh, "--micro-batch", "1", *flags]
    argv += [] if end == STEPS else ["--stop-after", str(end)]
    done = subprocess.run(
        [sys.executable, "-c", LEG, *argv], env=os.environ | QUICK, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == (0 if end == STEPS else 75), done.stderr[-3000:]
    words = [line.split(" ", 3) for line in done.stdout.splitlines()]
    (began,) = ((w[1], w[2]) for w in words if w[0] == "BEGAN")
    saved = [(w[1], w[2]) for w in words if w[0] == "SAVED"]
    return Leg(began, saved[-1], {int(w[1]): w[2] for w in words if w[0] == "TOOK"})


def losses(out: Path) -> dict[int, float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seven processes
def test_a_run_goes_on_on_any_mesh_as_if_it_had_never_moved(presets, tmp_path):
    preset, moved, still = presets["modern"], tmp_path / "moved", tmp_path / "still"
    straight = leg(preset, still, 1, "data=1", STEPS)
    before: Leg | None = None
    for devices, mesh, end in LEGS:
        this = leg(preset, moved, devices, mesh, end, *(["--resume"] if before else []))
        if before:
            assert this.began == before.saved, f"{mesh} began with other bytes than were saved"
        assert max(this.tokens) == end
        assert this.tokens == {step: straight.tokens[step] for step in this.tokens}, f"{mesh} took other data, or in another order"
        before = this
    got, want = losses(moved), losses(still)
    assert sorted(got) == sorted(want) == list(range(1, STEPS + 1))
    off = {step: abs(got[step] / want[step] - 1) for step in want}
    print(f"largest relative difference of the loss: {max(off.values()):.1e}, at step {LEGS[0][2] + 30}: {off[LEGS[0][2] + 30]:.1e}")
    assert want[STEPS] < 0.8 * want[1], "nothing was learnt, so nothing was compared"
    np.testing.assert_allclose([got[s] for s in want], list(want.values()), rtol=1e-5)  # fp32 sums in another order, through 40 updates
