"""Signals: noted where a run must not be left, Stop where it waits, at once the second time."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from nanojax.interrupts import Interrupts, Stop


def send(which: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), which)


def later(seconds: float = 0.1) -> None:
    threading.Timer(seconds, send).start()


def test_a_signal_is_noted_where_it_may_not_disturb_and_raised_where_the_run_waits_next():
    with Interrupts() as interrupts:
        send(signal.SIGINT)
        assert interrupts.name == "SIGINT"
        entered = False
        with pytest.raises(Stop), interrupts.waiting():
            entered = True
        assert not entered


def test_a_signal_ends_what_waits():
    with Interrupts() as interrupts:
        later()
        began = time.monotonic()
        with pytest.raises(Stop), interrupts.waiting():
            time.sleep(10)
        assert time.monotonic() - began < 5
        assert interrupts.name == "SIGTERM"
        assert not interrupts._waiting


@pytest.fixture
def ctrl_c():
    """SIGINT is Python's, which a script that starts pytest with & has ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_signal_is_pythons_own_and_so_is_every_one_afterwards():
    with Interrupts():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_signal_may_be_the_other_one():
    with Interrupts() as interrupts:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert interrupts.name == "SIGTERM"


def test_work_beside_gives_back_what_it_makes_and_raises():
    with Interrupts() as interrupts:
        assert interrupts.beside(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            interrupts.beside(lambda: 1 // 0)
        assert not interrupts.abandoned


def test_work_beside_is_left_alone_when_a_signal_comes():
    done = threading.Event()
    with Interrupts() as interrupts:
        later()
        with pytest.raises(Stop):
            interrupts.beside(lambda: done.wait(10))
        assert interrupts.abandoned
    done.set()


def test_work_beside_is_given_up_after_its_time():
    done = threading.Event()
    with Interrupts() as interrupts:
        with pytest.raises(TimeoutError):
            interrupts.beside(lambda: done.wait(10), seconds=0.2)
        assert interrupts.abandoned
    done.set()
