"""Starts the processes of a run on this host, watches them, and starts them again: `nanojax launch --procs 8 -- train configs/d12.py`."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Literal

from nanojax.checks import check_types, require_positive
from nanojax.cli import FLAT, parse
from nanojax.errors import DriftError, Interrupted, NanoJaxError, NonFiniteError, StorageError, UserError, outlive_readers
from nanojax.files import open_regular
from nanojax.lock import Lock
from nanojax.progress import Mark, read_mark
from nanojax.ranks import Ranks, find
from nanojax.runs import RunFolder
from nanojax.train import read_command

FINAL = (0, UserError.exit_code, NonFiniteError.exit_code, Interrupted.exit_code)  # of which another start would make nothing better
POLL_S = 0.1
STACKS_S = 3.0  # that a process gets to write its stacks
LEAVE_S = 15.0  # that the others get to end by themselves once one has
STALL_STEPS = 10  # median steps without a sign of life, if they are longer than --stall-seconds
LIVES_WITHOUT_STEP = 3
LONGEST_PAUSE_S = 60.0
KILLED = 128  # and the signal's number: the exit code of what a signal ended
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class LaunchCommand:
    """How to run the processes of this host."""

    procs: int | None = None
    """Processes on this host. Derived: as many as it has GPUs."""
    devices_per_proc: int | None = None
    """GPUs of each. Derived: all for one process, one each for several."""
    platform: Literal["cpu", "cuda"] | None = None
    """What they run on. Derived: by jax."""
    stall_seconds: float = 60.0
    """Without a sign of life for so long, or 10 median steps if that is longer, a run is stuck: stacks are written, and it starts again."""
    slow_seconds: float = 1200.0
    """The same where a run starts, compiles or saves."""
    leave_seconds: float = 120.0
    """From SIGTERM on, to save and end; what then still runs writes its stacks and is killed."""
    pause_seconds: float = 5.0
    """Before the second start; twice as long before each further one that follows no new step."""
    go_on: bool = False
    """Add --resume at the first start too, where the run has a checkpoint: for engines that give the same command again."""
    nodes: Annotated[Ranks, FLAT] = field(default_factory=Ranks)


def main(argv: Sequence[str]) -> None:
    """`nanojax launch [flags] -- train [PRESET.py] [flags]`. Over several hosts, an engine runs this on each (scripts/).

    Ranks count through the hosts: --process-id and --num-processes are those of the host among hosts, as Kubernetes and SkyPilot give them.
    """
    own, run = split(argv)
    command = parse(LaunchCommand, own, prog="nanojax launch [flags] -- train [PRESET.py]", description=main.__doc__ or "")
    check_types(command)
    for name in ("procs", "devices_per_proc", "stall_seconds", "slow_seconds", "leave_seconds", "pause_seconds"):
        if getattr(command, name) is not None:
            require_positive(name, getattr(command, name))
    trained, preset = read_command(run)
    if trained.ranks != Ranks() or trained.print_config:
        raise UserError(
            "the launcher numbers the processes of a run; put --coordinator and its like before the --, and leave out --print-config"
        )
    if command.nodes.local_devices is not None:
        raise UserError(
            f"the launcher deals out the GPUs of a host, given --local-devices {command.nodes.local_devices}; set CUDA_VISIBLE_DEVICES to "
            "those it may use, and --devices-per-proc"
        )
    outlive_readers()
    job = Job(command, run, RunFolder(Path(trained.out or f"runs/{preset}")))
    if code := job.supervise():
        sys.exit(code)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's flags, those of `nanojax train`). Raises UserError where the verb is another, or none."""
    at = next((i for i, word in enumerate(argv) if word in ("--", "train")), len(argv))
    own, run = list(argv[:at]), [word for i, word in enumerate(argv[at:]) if i or word != "--"]
    if run[:1] != ["train"] and not {"-h", "--help"}.intersection(own):
        raise UserError(f"nanojax launch runs nanojax train, given {' '.join(run[:1]) or 'nothing'}; end with -- train PRESET.py")
    return own, run[1:]


@dataclass
class Process:
    """One rank, and when it last gave a sign of life."""

    rank: int
    child: subprocess.Popen[bytes]
    log: Path
    mark: Mark | None = None
    written: int = 0
    """Bytes of its log."""
    seen: float = field(default_factory=time.monotonic)

    @property
    def code(self) -> int | None:
        """Exit code as a shell gives it, None while it runs."""
        code = self.child.poll()
        return code if code is None or code >= 0 else KILLED - code

    def send(self, which: signal.Signals) -> None:
        """To the process and its children, unless it has ended: its number may be another's by now."""
        if self.code is None:
            os.killpg(self.child.pid, which)


class Job:
    """The processes of this host, from life to life."""

    def __init__(self, command: LaunchCommand, run: list[str], folder: RunFolder):
        self.command, self.run, self.folder = command, run, folder
        self.hosts = find(command.nodes)
        self.procs = command.procs or gpus()
        if self.procs < 1:
            raise UserError("nanojax launch starts a process for each GPU, and nvidia-smi names none; give --procs, and --platform cpu")
        self.processes: list[Process] = []
        self.step = 0
        """The last that any life began."""
        self.seconds: list[float] = []
        """Between steps, of this life."""
        self.signals = 0
        self.leave_by = math.inf
        """When the processes must have ended, once a signal has come."""

    def supervise(self) -> int:
        """Run until an end that is final. Returns its exit code."""
        lives = 0
        self.folder.make()
        with self._forwarding(), Lock(self.folder.path, f".launch-{self.hosts.process_id or 0}"):
            self.folder.require_plain()
            while True:
                before = self.step
                try:
                    code = self._live()
                finally:
                    self._end_all()
                lives = 0 if self.step > before else lives + 1
                if code in FINAL or self.signals:
                    return code
                if lives == LIVES_WITHOUT_STEP:
                    words = f"{lives} starts in a row made no step after {self.step}, the last ended with {code}; look into {self.logs}"
                    raise {kind.exit_code: kind for kind in (StorageError, DriftError)}.get(code, NanoJaxError)(words)
                pause = min(LONGEST_PAUSE_S, self.command.pause_seconds * 2 ** max(0, lives - 1))
                say(f"ended with {code} after step {self.step}; starting again in {pause:g} s")
                until = time.monotonic() + pause
                while time.monotonic() < until and not self.signals:
                    time.sleep(POLL_S)
                if self.signals:
                    return Interrupted.exit_code

    @property
    def logs(self) -> Path:
        """Folder of what the processes print, a file for each rank."""
        return self.folder.path / "logs"

    def _live(self) -> int:
        """Start all, watch them until the last has ended. Returns the exit code of the first that failed, 0 where none did."""
        self._start()
        failed: Process | None = None
        with self.processes[0].log.open("rb") as shown:
            shown.seek(self.processes[0].written)
            while any(process.code is None for process in self.processes):
                time.sleep(POLL_S)
                echo(shown)
                self._look()
                failed = failed or next((process for process in self.processes if process.code), None)
                if failed:
                    self._end_others(failed)
                elif stuck := self._stuck():
                    self._kill_stuck(stuck)
            echo(shown)
        self._look()
        failed = failed or next((process for process in self.processes if process.code), None)
        if failed is None:
            return 0
        if failed.rank != self.processes[0].rank:
            say(f"rank {failed.rank} ended first, with {failed.code}: {last_line(failed.log)}")
        return failed.code or 0

    def _start(self) -> None:
        """Start every process of this host: on loopback where there is no other host."""
        self.logs.mkdir(exist_ok=True)
        self.seconds.clear()
        hosts, host = self.hosts.num_processes or 1, self.hosts.process_id or 0
        address = self.hosts.coordinator or f"127.0.0.1:{free_port()}"
        argv = self._argv()
        self.processes = []
        for local in range(self.procs):
            rank = host * self.procs + local
            self.folder.progress(rank).unlink(missing_ok=True)
            own = {"JAX_NUM_PROCESSES": str(hosts * self.procs), "JAX_PROCESS_ID": str(rank), "JAX_COORDINATOR_ADDRESS": address}
            if (devices := self._devices(local)) is not None:
                own["JAX_LOCAL_DEVICE_IDS"] = devices
            if self.command.platform:
                own["JAX_PLATFORMS"] = self.command.platform
            log = self.logs / f"rank-{rank}.log"
            with os.fdopen(open_regular(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as out:
                written = out.tell()
                child = subprocess.Popen(
                    argv,
                    env=os.environ | own,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    preexec_fn=die_along,  # noqa: PLW1509 - there are no threads
                )
            self.processes.append(Process(rank, child, log, written=written))
            if self.signals:  # it came before this one was there to hear it
                self.processes[-1].send(signal.SIGTERM)

    def _argv(self) -> list[str]:
        """Of each process. From the second start on, it goes on from what the one before has saved, if anything."""
        again = (self.processes or self.command.go_on) and "--resume" not in self.run and self.folder.has_checkpoint
        argv = [sys.executable, "-m", "nanojax.train", *self.run, *(["--resume"] if again else [])]
        return [*argv, f"--coordinator-timeout={self.command.nodes.coordinator_timeout}"]

    def _devices(self, local: int) -> str | None:
        """The GPUs of a process; None for all."""
        each = self.command.devices_per_proc or (1 if self.procs > 1 else None)
        return None if each is None else ",".join(str(local * each + i) for i in range(each))

    def _look(self) -> None:
        """Note which processes gave a sign of life. In what is slow, what they print is one: tokenising shows nowhere else."""
        now = time.monotonic()
        for process in self.processes:
            before, written = process.mark, size_of(process.log, process.written)
            mark = read_mark(self.folder.progress(process.rank))
            if mark == before and (written == process.written or (mark and not mark.slow)):
                continue
            if process is self.processes[0] and before and mark and not before.slow and mark.step == before.step + 1:
                self.seconds.append(now - process.seen)
            process.mark, process.written, process.seen = mark, written, now
            self.step = max(self.step, mark.step if mark else 0)

    def _stuck(self) -> str:
        """Why the job is stuck, in words; empty while it is not. Processes wait for the slowest: the last sign of any is what counts."""
        running = [process for process in self.processes if process.code is None]
        if running and time.monotonic() > self.leave_by:
            return f"no end {self.command.leave_seconds:g} s after a signal, at step {self.step}"
        slow = any(process.mark is None or process.mark.slow for process in running)
        steps = STALL_STEPS * statistics.median(self.seconds) if self.seconds else 0.0
        limit = self.command.slow_seconds if slow else max(self.command.stall_seconds, steps)
        silent = min((time.monotonic() - process.seen for process in running), default=0.0)
        return f"no sign of life for {silent:.0f} s, at step {self.step}" if silent > limit else ""

    def _kill_stuck(self, why: str) -> None:
        """Have all processes write their stacks, then kill them."""
        say(f"stuck: {why}; the stacks of all ranks are in {self.logs}")
        for process in self.processes:
            process.child.send_signal(signal.SIGUSR1)
            process.child.send_signal(signal.SIGCONT)  # one that was stopped could write nothing
        time.sleep(STACKS_S)
        for process in self.processes:
            process.send(signal.SIGKILL)

    def _end_all(self) -> None:
        """Where watching them failed, have the processes that still run save and end, and kill them when it is too late for that."""
        if all(process.code is not None for process in self.processes):
            return
        with contextlib.suppress(OSError):  # this may be what failed
            say(f"watching the run failed; its processes have {self.command.leave_seconds:g} s to save and end")
        if not self.signals:  # a second one would end them at once
            os.kill(os.getpid(), signal.SIGTERM)
        while time.monotonic() < self.leave_by and any(process.code is None for process in self.processes):
            time.sleep(POLL_S)
        for process in self.processes:
            process.send(signal.SIGKILL)

    def _end_others(self, failed: Process) -> None:
        """Wait for the others to end, as they do when they hear of it, and kill those that do not. A death by signal nobody tells them."""
        until = time.monotonic() + (LEAVE_S if failed.code and failed.code < KILLED else 0.0)
        while time.monotonic() < until and any(process.code is None for process in self.processes):
            time.sleep(POLL_S)
        for process in self.processes:
            if process.code is None:
                say(f"rank {failed.rank} ended with {failed.code}, and rank {process.rank} is killed")
                process.send(signal.SIGKILL)
                process.child.wait()

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Pass SIGTERM and SIGINT on to all; the second kills them."""

        def forward(number: int, _: object) -> None:
            self.signals += 1
            self.leave_by = min(self.leave_by, time.monotonic() + self.command.leave_seconds)
            for process in self.processes:
                process.send(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

        old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def gpus() -> int:
    """GPUs that processes of this host may use, by CUDA_VISIBLE_DEVICES, or else by nvidia-smi."""
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in shown.split(",") if device])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_along() -> None:
    """In a child: have Linux send SIGTERM when the launcher is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def echo(shown: IO[bytes]) -> None:
    """Show what was added to a log."""
    if added := shown.read():
        sys.stdout.buffer.write(added)
        sys.stdout.flush()


def size_of(log: Path, before: int) -> int:
    """Bytes of a log; as before, where somebody took it away."""
    try:
        return log.stat().st_size
    except OSError:
        return before


def last_line(log: Path) -> str:
    """Of a log, the last line that is not empty."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:  # somebody took it away
        lines = []
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")[:300]


def say(words: str) -> None:
    """On standard error, with who says it."""
    print(f"nanojax launch: {words}", file=sys.stderr, flush=True)
