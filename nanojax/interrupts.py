"""Ctrl-C and SIGTERM, in whatever a run is doing: its state is saved, or there is none yet, and it ends with exit code 75."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from nanojax.errors import Interrupted
from nanojax.peers import ALONE, Peers

T = TypeVar("T")


class Stop(BaseException):
    """A signal came where leaving at once harms nothing. Like KeyboardInterrupt, no `except Exception` takes it."""

    exit_code = Interrupted.exit_code


class Interrupts:
    """Notes a signal for the loop to read, or raises Stop where it waits; a second one ends the process at once.

    Before the first step, one process of several that hears a signal leaves, and the others end as it does. Afterwards they all leave at
    the same point, wherever one of them heard it.
    """

    def __init__(self) -> None:
        self.peers: Peers = ALONE
        self.name: str | None = None
        self.abandoned = False
        """Whether a thread was left at work that cannot be ended."""
        self._waiting = False
        self._point: int | None = None
        """How many points all processes passed; None before they have to leave together."""

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
        for each, handler in self._old.items():  # the second ends at once, whichever it is
            signal.signal(each, handler)
        if self._waiting:
            raise Stop

    def leave_together(self) -> None:
        """From here on, a process that left alone would leave the others waiting for it."""
        if self.peers.several:
            self._point = 0

    def point(self) -> None:
        """Where all processes come by equally often, before a step or a batch of an evaluation: raises Stop at the one they agree on."""
        if self._point is None:
            return
        self._point += 1
        agreed = self.peers.stop(self._point, self.name or "")
        if agreed and agreed[0] <= self._point:
            self.name = agreed[1]
            raise Stop

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what takes long and changes nothing: data, evaluation. A signal, now or noted before, raises Stop here.

        Not where processes leave together: there only `point` does.
        """
        if self._point is not None:
            yield
            return
        self._waiting = True
        try:
            if self.name is not None:
                raise Stop
            yield
        finally:
            self._waiting = False

    def beside(self, work: Callable[[], T], seconds: float = math.inf) -> T:
        """What `work` returns, from a thread: for a compiler, which does not return to Python until it is done.

        Raises Stop meanwhile, and TimeoutError after so many seconds.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # whatever it is, the caller gets it
                future.set_exception(error)

        with self.waiting():
            threading.Thread(target=run, daemon=True, name="compiler").start()
            self.abandoned, until = True, time.monotonic() + seconds
            while not wait([future], timeout=0.1).done:
                if time.monotonic() > until:
                    raise TimeoutError
            self.abandoned = False
        return future.result()
