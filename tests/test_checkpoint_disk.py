"""Full, closed and failing disks: exit 4 with what was needed and what there is, the step before intact, no half one left."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpointing import META, bits, layout, small_state
from training import presets  # noqa: F401  # fixture

from nanojax import checkpoint, manifest
from nanojax.checkpoint import Checkpoints, os_error
from nanojax.errors import StorageError
from nanojax.manifest import complete_steps
from nanojax.step import TrainState

MB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def large_state(step: int) -> TrainState:
    """2 MB of noise, which no compression makes smaller by more than a tenth."""
    w = jnp.asarray(np.random.default_rng(step).standard_normal((512, 1024)), jnp.float32)
    return dataclasses.replace(small_state(step), params={"a.w": w, "b.gain": jnp.ones(4)})


def mounted(folder: Path, size: int) -> Path:
    """A small file system of its own; skips where this process may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small tmpfs needs the right to mount: {done.stderr.strip()}")
    return folder


@pytest.fixture
def disk(tmp_path):
    """disk(bytes) -> a folder with so much space in all."""
    made: list[Path] = []

    def make(size: int) -> Path:
        made.append(mounted(tmp_path / f"disk{len(made)}", size))
        return made[-1]

    yield make
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(large_state(step), META)
    checkpoints.wait()


def fails_at_the_fourth(checkpoints: Checkpoints, words: str, spoil=lambda: None) -> None:
    """Step 3 is saved; step 4 fails, in words, and leaves step 3 as it was, and nothing else."""
    save(checkpoints, 3)
    spoil()
    with pytest.raises(StorageError, match=words) as caught:
        save(checkpoints, 4)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert [child.name for child in checkpoints.folder.iterdir()] == ["3"], "half a checkpoint is left"
    assert checkpoints.latest == 3
    assert bits(checkpoints.restore(*layout(large_state(3)))[0]) == bits(large_state(3))


def test_a_save_for_which_there_is_no_space_is_not_begun(disk):
    words = r"no space left in .*found before saving.*needs about 2\.1 MB, .* MB are free, quotas aside; free some there"
    fails_at_the_fourth(Checkpoints(disk(3 * MB) / "checkpoints", keep=2), words)


def test_a_disk_that_fills_up_during_a_save_says_what_is_needed_and_what_there_is(disk, monkeypatch):
    folder = disk(3 * MB)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 10**9)  # as it was when it was looked at
    fails_at_the_fourth(Checkpoints(folder / "checkpoints", keep=2), r"\(No space left on device\): a checkpoint needs about 2\.1 MB")


def test_a_limit_on_the_size_of_files_is_a_storage_error(tmp_path):
    """As quotas and network file systems have them: the system refuses a write in the middle."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        spoil = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 2, limits[1]))  # noqa: E731
        fails_at_the_fourth(Checkpoints(tmp_path / "checkpoints", keep=2), "File too large; look at that disk", spoil)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EDQUOT])
@pytest.mark.parametrize("where", ["manifest", "orbax"])
def test_a_disk_that_fails_is_no_bug_and_a_save_that_failed_surfaces_at_the_next_step(tmp_path, monkeypatch, number, where):
    def fail(*_, **__):
        if where == "manifest":
            raise OSError(number, os.strerror(number))
        raise ValueError(f"UNKNOWN: Failed to write 169 bytes to file 32: [os_error_code='{number}']")  # tensorstore's words

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(large_state(3), META)
    checkpoints.wait()
    if where == "manifest":
        monkeypatch.setattr(manifest.os, "fsync", fail)
    else:
        monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", lambda *_: type("Saving", (), {"result": fail})())
    checkpoints.save(large_state(4), META)  # returns: it fails in the background
    assert checkpoints._pending is not None
    checkpoints._pending.exception()  # until it has
    assert checkpoints.latest == 3, "never offered"
    with pytest.raises(StorageError, match=os.strerror(number)):
        checkpoints.check()  # which the loop calls before each step
    checkpoints.check()
    assert complete_steps(checkpoints.folder) == [3]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EIO, "x"), errno.EIO),
        (ValueError("UNKNOWN: Error writing [os_error_code='116']"), errno.ESTALE),
        (ValueError("RESOURCE_EXHAUSTED: quota"), errno.ENOSPC),
        (ValueError("Requested shape: (4, 6) is not compatible"), None),
    ],
)
def test_the_systems_error_is_found_behind_that_of_tensorstore(error, number):
    assert os_error(error) == number


# Whole runs ---------------------------------------------------------------------------------------------------------------------------


def train(preset: str, out: Path, *flags: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "nanojax", "train", preset, "--out", str(out), "--steps", "9", "--save-every", "3", *flags]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def told(done: subprocess.CompletedProcess, code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_run_ends_with_4_on_a_full_disk_and_goes_on_when_there_is_space(presets, disk, tmp_path):
    straight = tmp_path / "straight"
    told(train(presets["modern"], straight), 0)
    size = sum(file.stat().st_size for file in (straight / "checkpoints/9").rglob("*") if file.is_file())
    folder = disk(int(size * 2.5))
    (folder / "ballast").write_bytes(bytes(size))
    said = told(train(presets["modern"], folder / "run", "--keep", "2"), 4)
    assert "no space left in" in said
    assert complete_steps(folder / "run/checkpoints") == [3]
    (folder / "ballast").unlink()
    told(train(presets["modern"], folder / "run", "--keep", "1", "--resume"), 0)  # 6 fits beside 3, and so does 9 beside 6
    hashes = {json.loads((run / "summary.json").read_text())["state_sha256"] for run in (straight, folder / "run")}
    assert len(hashes) == 1


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_or_read_only_is_refused_before_anything_is_compiled(presets, disk):
    folder = disk(MB)
    with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert "No space left on device" in told(train(presets["modern"], folder / "run"), 4)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    done = train(presets["modern"], folder / "other")
    assert "--out must be a folder that can be written, given" in told(done, 2)
    assert "attention: compiled" not in done.stdout


@pytest.mark.slow
def test_a_cache_on_a_full_disk_is_named(presets, disk, tmp_path):
    folder = disk(MB // 20)
    done = train(presets["modern"], tmp_path / "run", "--data.cache", str(folder / "cache"))
    said = told(done, 4)
    assert f"cannot write to the cache {folder}/cache" in said
    assert "MB free); free space there, or choose a folder with --data.cache" in said
