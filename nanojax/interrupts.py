"""Ctrl-C and SIGTERM, in whatever a run is doing: its state is saved, or there is none yet, and it ends with exit code 75."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Stop(BaseException):
    """A signal came where leaving at once harms nothing. Like KeyboardInterrupt, no `except Exception` takes it."""


class Interrupts:
    """Notes a signal for the loop to read, or raises Stop where it waits; a second one ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.abandoned = False
        """Whether a thread was left at work that cannot be ended."""
        self._waiting = False

    def __enter__(self) -> Interrupts:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        which = signal.Signals(number)
        self.name = which.name
        signal.signal(which, self._old[which])
        if self._waiting:
            raise Stop

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what takes long and changes nothing: data, evaluation. A signal, now or noted before, raises Stop here."""
        self._waiting = True
        try:
            if self.name is not None:
                raise Stop
            yield
        finally:
            self._waiting = False

    def beside(self, work: Callable[[], T]) -> T:
        """What `work` returns, from a thread: for a compiler, which does not return to Python until it is done. Raises Stop meanwhile."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # whatever it is, the caller gets it
                future.set_exception(error)

        with self.waiting():
            threading.Thread(target=run, daemon=True, name="compiler").start()
            self.abandoned = True
            while not wait([future], timeout=0.1).done:
                pass
            self.abandoned = False
        return future.result()
