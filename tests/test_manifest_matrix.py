"""Every file of a run's newest checkpoint x every fault: found, named, walked back from, and the run ends as if nothing had been."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
import pytest
from checkpointing import files_of
from test_manifest import FAULTS
from training import presets, start  # noqa: F401  # fixtures

from nanojax import manifest
from nanojax.checkpoint import Checkpoints, state_sha256
from nanojax.errors import Interrupted, UserError
from nanojax.program import make_program
from nanojax.runs import RunFolder

OLDER, NEWER, LAST = 10, 20, 22
SIZES = ("--steps", str(LAST), "--eval-every", "0", "--keep", "2")
MATRIX = FAULTS | {"an extra file": None, "no manifest": None}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def stopped(presets, start, tmp_path_factory):
    """(a run with two checkpoints, the hash that it ends with when nobody disturbs it)."""
    run = start(presets["modern"], *SIZES, "--stop-after", str(NEWER), expect=Interrupted)
    copy = tmp_path_factory.mktemp("straight") / "run"
    shutil.copytree(run.folder.path, copy)
    return run.folder.path, start(presets["modern"], *SIZES, "--resume", out=copy).summary["state_sha256"]


@pytest.fixture(scope="module")
def program(stopped):
    return make_program(RunFolder(stopped[0]).read()[0], jax.devices()[:1])


def harm(run: Path, name: str, fault: str) -> bool:
    """Do it to a file of the newest checkpoint; whether that changed anything."""
    file, older = (run / f"checkpoints/{step}" / name for step in (NEWER, OLDER))
    before = file.read_bytes() if file.is_file() else None
    if fault == "an extra file":
        file.write_bytes(b"extra")
    elif fault == "no manifest":
        file.unlink()
    else:
        FAULTS[fault](file, older if older.exists() else run / "config.json")
    return file.is_symlink() or not file.is_file() or file.read_bytes() != before


def found(said: str, name: str) -> bool:
    return bool(re.search(rf"checkpoints/{NEWER} is damaged: {re.escape(name)} .*; moved to {NEWER}.corrupt; step {OLDER} is read", said))


@pytest.mark.parametrize("fault", MATRIX)
def test_a_fault_is_found_named_and_walked_back_from_and_the_run_ends_as_it_would_have(
    presets, start, stopped, program, tmp_path, capsys, fault
):
    """The older state comes back to the bit whatever file is hit; one of the runs goes on to its end from there."""
    source, straight = stopped
    names = {"an extra file": ["params/d/extra"], "no manifest": [manifest.NAME]}.get(fault) or files_of(source / f"checkpoints/{NEWER}")
    state = {}
    for n, name in enumerate(names):
        run = tmp_path / str(n)
        shutil.copytree(source, run)
        if not harm(run, name, fault):
            continue  # an empty file, cut in half; a file that is the same in both steps
        capsys.readouterr()
        checkpoints = Checkpoints(run / "checkpoints", keep=2)
        restored, meta = checkpoints.restore(program.shapes, program.shardings)
        checkpoints.close()
        state[name] = state_sha256(restored, meta["data"])
        # Without its manifest a step is none: it is not found, but cleared away.
        assert found(capsys.readouterr().err, name) != (name == manifest.NAME and fault in ("deleted", "a folder", "no manifest")), name
        assert not (run / f"checkpoints/{NEWER}").exists()
    assert len(set(state.values())) == 1, state
    assert len(state) >= min(len(names), 6)
    run = tmp_path / "whole"
    shutil.copytree(source, run)
    harm(run, name := list(state)[len(fault) % len(state)], fault)
    ended = start(presets["modern"], *SIZES, "--resume", out=run)
    assert len(ended.batches) == LAST - OLDER
    assert ended.summary["state_sha256"] == straight
    with capsys.disabled():
        print(f"\n| {fault} | {len(names)} | {len(state)} | {len(state)} | {name}: equal |")


def test_with_all_checkpoints_damaged_a_run_ends_with_2_and_begins_nothing(presets, start, stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    for step in (OLDER, NEWER):
        (run / f"checkpoints/{step}/_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError, match=r"_CHECKPOINT_METADATA is missing, and there is no older one; bring back a copy, or start anew"):
        start(presets["modern"], *SIZES, "--resume", out=run)
    with pytest.raises(UserError, match=r"--resume needs a checkpoint"):
        start(presets["modern"], *SIZES, "--resume", out=run)
    assert sorted(child.name for child in (run / "checkpoints").iterdir()) == [f"{OLDER}.corrupt", f"{NEWER}.corrupt"]
