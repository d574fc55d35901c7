"""What the processes of one job say to each other, through the store of jax's coordinator: nothing here runs on a device.

They do the same steps in the same order, so that whatever decides on a step or a file is decided once and heard by all. A process that
cannot go on says so, and all end with its exit code, whatever they are waiting for.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from nanojax.errors import NanoJaxError, UserError, of_storage

T = TypeVar("T")
POLL_S = 0.5  # between looks at whether another process has ended
GRACE_S = 4.0  # that the main thread of a process gets to end by itself once another has
END_S = 20.0  # that a process which ends waits for the others to hear of it; one that was killed never does
LONGEST_S = 24 * 3600  # of a wait for process 0, which may be tokenising
SKEW = 2
"""Points that processes can be apart: at point n + 2 a process has read what step n made, for which each had to pass point n."""


class Peers:
    """The processes of a job, seen from one of them. Use it as a context: when the run in it fails, all processes end alike."""

    def __init__(self, process: int = 0, processes: int = 1, client: Any = None):
        self.process, self.processes, self._client = process, processes, client
        self._shared: Counter[str] = Counter()
        self._leaving = threading.Event()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.process == 0

    @property
    def several(self) -> bool:
        return self.processes > 1

    def __enter__(self) -> Peers:
        if self.several:
            threading.Thread(target=self._watch, daemon=True, name="peers").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._leaving.set()
        if error is None or not self.several:
            return
        if isinstance(error, OSError) and not isinstance(error, NanoJaxError) and error.errno is not None:
            told = of_storage(error)
            self.__exit__(type(told), told, trace)
            raise told from error
        lost = type(error).__name__ == "JaxRuntimeError"  # of a collective, mostly; by name, so that jax need not be imported here
        if lost:
            why = str(error).splitlines()[0][:160]
            words = f"work with the other processes failed ({why}); look at their logs, and go on with --resume"
        else:
            words = str(error) or type(error).__name__
        self._end({"code": getattr(error, "exit_code", 1), "words": words})
        if lost:
            raise NanoJaxError(words, abrupt=True) from error
        if isinstance(error, NanoJaxError):
            error.abrupt = True  # jax would wait for the others as Python exits, and they may be gone

    def say(self, *words: Any, **how: Any) -> None:
        """`print`, of the first process only."""
        if self.first:
            print(*words, **how)

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns on process 0, JSON, on all processes. All call this equally often; only process 0 runs `make`."""
        if not self.several:
            return make()
        self._shared["share"] += 1
        name = f"nanojax/share/{self._shared['share']}"
        if self.first:
            value = make()
            self._client.key_value_set(name, json.dumps(value))
            return value
        return json.loads(self._wait_for(name))

    def first_goes(self, work: Callable[[], T]) -> T:
        """`work` on process 0, then on all others: what process 0 leaves on disk, they find."""
        if self.first:
            result = work()
            self.share(lambda: None)
            return result
        self.share(lambda: None)
        return work()

    def require_same(self, facts: dict[str, str]) -> None:
        """Raise UserError where this process is about to do something else than process 0."""
        for name, value in self.share(lambda: facts).items():
            if facts[name] != value:
                raise UserError(
                    f"all processes of a job need the same {name}, given {facts[name]:.16} to process {self.process} and {value:.16} to "
                    "process 0; start them with the same command, on the same data"
                )

    def barrier(self, name: str, seconds: float = LONGEST_S) -> None:
        """Until all processes have come here. One name belongs to one thread."""
        if self.several:
            self._shared[name] += 1
            self._client.wait_at_barrier(f"nanojax/{name}/{self._shared[name]}", int(seconds * 1000))

    def stop(self, point: int, why: str) -> tuple[int, str] | None:
        """(point, why) at which all processes stop, if any has asked for it; `why`, if not empty, asks for it, SKEW points from here.

        To be asked at every point: whoever is first is heard by all before they come to where he wants to stop.
        """
        name = "nanojax/stop"
        if why:
            self._put(name, json.dumps([point + SKEW, f"{why} to process {self.process}"]))
        found = self._get(name)
        return None if found is None else tuple(json.loads(found))

    def _end(self, how: dict[str, Any]) -> None:
        """Tell all processes that this one ends, if none did before, and wait until they have heard it."""
        from jax.errors import JaxRuntimeError

        try:
            self._put("nanojax/end", json.dumps(how | {"process": self.process}))
            self._client.wait_at_barrier("nanojax/ended", int(END_S * 1000))
        except JaxRuntimeError:
            return  # they are gone, and have nothing to hear
        if self.first:
            time.sleep(1)  # the coordinator dies with this process, and would take others along before they end by themselves

    def _watch(self) -> None:
        """End this process as another has ended, unless it does so itself: it may wait, in jax, for one that is gone."""
        from jax.errors import JaxRuntimeError

        try:
            while not self._leaving.wait(POLL_S):
                if (found := self._get("nanojax/end")) and not self._leaving.wait(GRACE_S):
                    how = json.loads(found)
                    print(f"nanojax: process {how['process']} ended with {how['code']}: {how['words']}", file=sys.stderr, flush=True)
                    self._end(how)
                    sys.stdout.flush()
                    os._exit(how["code"])
        except JaxRuntimeError:
            return  # the coordinator is gone, and jax ends this process

    def _wait_for(self, name: str) -> str:
        """A value that process 0 will set. Signals are heard meanwhile."""
        from jax.errors import JaxRuntimeError

        until = time.monotonic() + LONGEST_S
        while True:
            try:
                return self._client.blocking_key_value_get(name, 1000)
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > until:
                    raise

    def _put(self, name: str, value: str) -> None:
        """Set a value that nobody has set before; who is later is not heard."""
        from jax.errors import JaxRuntimeError

        try:
            self._client.key_value_set(name, value)
        except JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def _get(self, name: str) -> str | None:
        from jax.errors import JaxRuntimeError

        try:
            return self._client.key_value_try_get(name)
        except JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None


ALONE = Peers()
"""The peers of a process that has none."""
