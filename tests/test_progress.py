"""How far a process is, for whoever watches it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from nanojax.progress import Mark, Progress, read_mark


def test_a_watcher_reads_what_was_said_last(tmp_path):
    path = tmp_path / "progress" / "1"
    assert read_mark(path) is None
    progress = Progress(path)
    assert read_mark(path) == Mark(moves=1, step=0, slow=True)
    progress.note()
    assert read_mark(path) == Mark(2, 0, True), "what was slow stays slow: the first batch of an evaluation compiles"
    progress.note(7)
    assert read_mark(path) == Mark(3, 7, False)
    progress.note(slow=True)
    assert read_mark(path) == Mark(4, 7, True)
    progress.note()
    assert read_mark(path) == Mark(5, 7, True)
    progress.note(slow=False)
    assert read_mark(path) == Mark(6, 7, False)
    assert path.stat().st_size == 64
    progress.close()


def test_a_new_life_starts_its_file_anew_and_garbage_is_nothing(tmp_path):
    for n in range(2):
        progress = Progress(tmp_path / "0")
        assert read_mark(tmp_path / "0") == Mark(1, 0, True), n
        progress.note(1000)
        progress.close()
    (tmp_path / "0").write_bytes(b"\0" * 64)
    assert read_mark(tmp_path / "0") is None


def test_stacks_are_written_on_request_and_the_process_goes_on():
    program = (
        "import sys; from nanojax.progress import show_stacks_on_request; show_stacks_on_request()\n"
        "def deep():\n    print('on', flush=True); sys.stdin.read()\ndeep(); print('end')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "on\n"
    os.kill(child.pid, signal.SIGUSR1)
    out, err = child.communicate(timeout=30)
    assert out == "end\n"
    assert "in deep" in err
