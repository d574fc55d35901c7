"""What processes say to each other: one decides and all hear it; they stop at one point and end alike."""

from __future__ import annotations

import random
import threading

import pytest

from nanojax.errors import NanoJaxError, StorageError, UserError
from nanojax.interrupts import Interrupts, Stop
from nanojax.peers import ALONE, SKEW, Peers


class Store:
    """jax's store, for threads of one process that play processes."""

    def __init__(self, processes: int = 2):
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()
        self.barriers: dict[str, threading.Barrier] = {}
        self.processes = processes

    def key_value_set(self, name: str, value: str) -> None:
        with self.changed:
            if name in self.values:
                raise missing("ALREADY_EXISTS")
            self.values[name] = value
            self.changed.notify_all()

    def key_value_try_get(self, name: str) -> str:
        with self.changed:
            if name not in self.values:
                raise missing("NOT_FOUND")
            return self.values[name]

    def blocking_key_value_get(self, name: str, milliseconds: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: name in self.values, milliseconds / 1000):
                raise missing("DEADLINE_EXCEEDED")
            return self.values[name]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        with self.changed:
            barrier = self.barriers.setdefault(name, threading.Barrier(self.processes))
        barrier.wait(milliseconds / 1000)


def missing(words: str) -> Exception:
    from jax.errors import JaxRuntimeError

    return JaxRuntimeError(words)


def both(work) -> list:
    """What work(peers) gives on process 0 and on process 1, at the same time."""
    store, results = Store(), [None, None]

    def one(process: int) -> None:
        try:
            results[process] = work(Peers(process, 2, store))
        except Exception as error:
            results[process] = error

    threads = [threading.Thread(target=one, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_what_process_0_makes_is_what_all_get_and_nobody_else_makes_it():
    made = []

    def work(peers: Peers):
        return [peers.share(lambda: made.append(peers.process) or {"step": len(made)}) for _ in range(3)]

    assert both(work) == [[{"step": 1}, {"step": 2}, {"step": 3}]] * 2
    assert made == [0, 0, 0]


def test_process_0_goes_first_where_it_leaves_something_for_the_others():
    order = []
    both(lambda peers: peers.first_goes(lambda: order.append(peers.process)))
    assert order == [0, 1]


def test_processes_that_would_do_different_things_are_refused():
    results = both(lambda peers: peers.require_same({"config": f"depth = {peers.process}", "text": "the same"}))
    assert results[0] is None
    assert isinstance(results[1], UserError)
    assert "need the same config, given depth = 1 to process 1" in str(results[1])


def test_alone_nothing_is_asked_and_all_is_made_here():
    assert ALONE.share(lambda: 3) == 3
    assert ALONE.first_goes(lambda: 4) == 4
    ALONE.barrier("any")
    ALONE.require_same({"config": "any"})


@pytest.mark.parametrize("seed", range(20))
def test_all_stop_at_the_same_point_whoever_hears_the_signal_and_whenever(seed):
    """Processes are driven in a random order, as far apart as results that all must have contributed to let them be."""
    rng = random.Random(seed)
    store = Store(3)
    runs = [Interrupts() for _ in range(3)]
    for process, interrupts in enumerate(runs):
        interrupts.peers = Peers(process, 3, store)
        interrupts.leave_together()
    passed, stopped = [0, 0, 0], {}
    signals = {rng.randrange(3): rng.randrange(12) for _ in range(rng.randint(1, 3))}
    while len(stopped) < 3:
        free = [p for p in range(3) if p not in stopped and passed[p] < min(passed) + 2]
        process = rng.choice(free)
        if signals.get(process) == passed[process]:
            runs[process].name = "SIGTERM"
        try:
            runs[process].point()
            passed[process] += 1
        except Stop:
            stopped[process] = passed[process]
    assert len(set(stopped.values())) == 1
    assert len({run.name for run in runs}) == 1


def test_a_signal_where_processes_leave_together_raises_at_a_point_and_nowhere_else():
    interrupts = Interrupts()
    interrupts.peers = Peers(0, 2, Store())
    interrupts.leave_together()
    interrupts.name = "SIGTERM"
    with interrupts.waiting():
        pass
    for _ in range(SKEW):
        interrupts.point()
    with pytest.raises(Stop):
        interrupts.point()
    assert interrupts.name == "SIGTERM to process 0"


@pytest.mark.parametrize(
    ("error", "told", "kind"),
    [
        (UserError("a shard is corrupt"), '{"code": 2, "words": "a shard is corrupt", "process": 0}', UserError),
        (OSError(5, "Input/output error", "x.bin"),
         '{"code": 4, "words": "Input/output error: x.bin; give another path, or mend this one", "process": 0}', StorageError),
        (FileNotFoundError(2, "No such file or directory", "x.bin"),
         '{"code": 2, "words": "No such file or directory: x.bin; give another path, or mend this one", "process": 0}', UserError),
    ],
)  # fmt: skip
def test_one_that_fails_is_heard_by_all_and_leaves_abruptly(error, told, kind):
    def work(peers: Peers):
        if peers.process == 1:
            return peers._client.blocking_key_value_get("nanojax/end", 5000), peers._client.wait_at_barrier("nanojax/ended", 5000)
        with peers:
            raise error

    failed, heard = both(work)
    assert type(failed) is kind
    assert failed.abrupt
    assert heard[0] == told


def test_a_collective_that_fails_is_one_line_and_no_bug_of_ours():
    def work(peers: Peers):
        with peers:
            if peers.process == 0:
                raise missing("UNKNOWN: Connection closed by peer [127.0.0.1]\nmore")
            peers._client.wait_at_barrier("nanojax/ended", 5000)

    failed = both(work)[0]
    assert isinstance(failed, NanoJaxError)
    assert str(failed).startswith("work with the other processes failed (UNKNOWN: Connection closed by peer [127.0.0.1]); look at")
