"""How far each process of a run is, in files of the run's folder, for whoever watches it; and its stacks, on SIGUSR1."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import weakref
from dataclasses import dataclass
from pathlib import Path

RECORD_BYTES = 64


@dataclass(frozen=True)
class Mark:
    """What a process said last."""

    moves: int
    """How often it has said something."""
    step: int
    """The last that it began, 0 before the first."""
    slow: bool
    """Whether what it does now may take much longer than a step: it starts, compiles, saves."""


class Progress:
    """The file of this process. Writing costs microseconds and waits for no disk."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link, in a folder that may come from anywhere, is not followed
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._moves, self._step, self._slow = 0, 0, True
        self.close = weakref.finalize(self, os.close, self._file)
        self.note()

    def note(self, step: int | None = None, *, slow: bool | None = None) -> None:
        """Say that the process goes on: with step `step`, if given, which is not slow unless `slow` says so; else all stays as it is."""
        self._moves += 1
        if step is not None:
            self._step, self._slow = step, False
        if slow is not None:
            self._slow = slow
        words = f"{self._moves} {self._step} {'slow' if self._slow else 'runs'}"
        os.pwrite(self._file, f"{words:<{RECORD_BYTES - 1}}\n".encode(), 0)


def read_mark(path: Path) -> Mark | None:
    """What the process with that file said last, None before it said anything."""
    try:
        text = path.read_bytes()[:RECORD_BYTES].decode("ascii", "replace")
    except OSError:  # it is not there yet, or the network's disk does not answer
        return None
    found = re.fullmatch(r"([0-9]+) ([0-9]+) (slow|runs) *\n", text)
    return Mark(int(found[1]), int(found[2]), found[3] == "slow") if found else None


def show_stacks_on_request() -> None:
    """On SIGUSR1, write the stack of every thread to standard error, whatever the process is doing, and go on."""
    faulthandler.register(signal.SIGUSR1, file=2)
