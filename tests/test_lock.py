"""Locks: one run a folder, told apart by name; what a dead one left is taken over, what may live unseen is not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanojax import lock
from nanojax.errors import StorageError, UserError
from nanojax.lock import Holder, Lock

HOLD = """
import sys, time; from pathlib import Path; from nanojax.lock import Lock
with Lock(Path(sys.argv[1])): print("held", flush=True); time.sleep(60)
"""
# Waits for a moment that all share, tries once, and tells how it went.
RACE = """
import sys, time; from pathlib import Path; from nanojax.errors import UserError; from nanojax.lock import Lock
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with Lock(Path(sys.argv[1])): print("held", flush=True); time.sleep(1.5)
except UserError as error: print(error)
"""


def holding(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def left_by(folder: Path, **changes: object) -> Holder:
    """What a process writes that then dies."""
    holder = dataclasses.replace(Holder.here(), **changes)
    (folder / lock.NAME).write_text(holder.text())
    return holder


def test_a_second_run_is_refused_by_pid_host_and_time_and_may_come_when_the_first_was_killed(tmp_path, capsys):
    first = holding(tmp_path)
    here = Holder.here()
    try:
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"in use by pid {first.pid} on host {here.host} since 2\d\d\d-.*; stop that one first"):
            Lock(tmp_path)
        assert time.monotonic() - began < 2
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with Lock(tmp_path):
        said = capsys.readouterr().err
        assert f"was locked by pid {first.pid} on host {here.host}" in said
        assert "that process is gone, its lock is taken over" in said
        assert Holder.parse((tmp_path / lock.NAME).read_text()).pid == os.getpid()
    with Lock(tmp_path):
        assert capsys.readouterr().err == "", "a run that ends leaves nothing to take over"


def test_of_many_that_start_at_once_one_gets_it_and_all_others_name_that_one(tmp_path):
    left_by(tmp_path, pid=2**22 + 1)  # and all see what a dead one left
    at = str(time.time() + 2.0)  # longer than all take to start
    argv = [sys.executable, "-c", RACE, str(tmp_path), at]
    runs = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    said = {run.pid: run.communicate()[0] for run in runs}
    (winner,) = [pid for pid, words in said.items() if words == "held\n"]
    assert all(f"in use by pid {winner} on" in words for pid, words in said.items() if pid != winner), said


def test_a_lock_from_before_this_host_started_is_taken_over(tmp_path, capsys):
    left_by(tmp_path, boot="of another start", pid=os.getpid())
    with Lock(tmp_path):
        assert "that host has started anew since, its lock is taken over" in capsys.readouterr().err


def test_a_lock_of_another_host_is_refused_with_what_to_delete(tmp_path):
    left_by(tmp_path, boot="of theirs", host="node7")
    with pytest.raises(
        UserError, match=rf"locked by pid \d+ on host node7 since .*once you know that it does not, delete {tmp_path}/\.lock"
    ):
        Lock(tmp_path)
    (tmp_path / lock.NAME).unlink()
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["garbage", "[" * 5000, "{}", json.dumps({"pid": 1, "host": "\x1b[2J", "boot": "", "since": ""})])
def test_a_lock_that_is_none_of_ours_is_refused(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content)
    with pytest.raises(UserError, match="locked by a file that is none of ours"):
        Lock(tmp_path)


def test_a_link_or_pipe_for_a_lock_is_refused_and_nothing_behind_it_is_touched(tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("mine")
    (tmp_path / lock.NAME).symlink_to(canary)
    with pytest.raises(UserError, match="must be a regular file in that folder"):
        Lock(tmp_path)
    assert canary.read_text() == "mine"
    (tmp_path / lock.NAME).unlink()
    os.mkfifo(tmp_path / lock.NAME)
    with pytest.raises(UserError, match="must be a regular file in that folder"):
        Lock(tmp_path)


def test_a_file_system_without_locks_is_refused_and_one_that_fails_is_a_storage_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"must be on a file system with locks, .*\(Function not implemented\); mount it"):
        Lock(tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free space there"):
        Lock(tmp_path)


def test_a_second_start_of_the_real_command_is_refused_before_jax_is_imported(tmp_path):
    (tmp_path / "poisoned/jax").mkdir(parents=True)
    (tmp_path / "poisoned/jax/__init__.py").write_text("raise SystemExit('jax was imported')\n")
    (tmp_path / "run").mkdir()
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'poisoned'}:{Path(__file__).parents[1]}"}
    argv = [sys.executable, "-m", "nanojax", "train", "--attn-impl", "xla", "--out", str(tmp_path / "run")]
    with Lock(tmp_path / "run"):
        began = time.monotonic()
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        took = time.monotonic() - began
    assert done.returncode == 2
    assert f"in use by pid {os.getpid()} on host" in done.stderr
    assert took < 2 * max(1.0, os.getloadavg()[0])  # the promise of reliability.md, K17, on an idle machine
