"""The lock of a run's folder: a second run there is refused by the name of the first, and what a dead one left is taken over, in words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nanojax.errors import StorageError, UserError
from nanojax.files import open_regular

NAME = ".lock"
LARGEST = 4096  # bytes that are read of it
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux alone has it
SECONDS_TO_SIGN = 1.0  # who has the lock writes its name at once


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or held it."""

    pid: int
    host: str
    boot: str
    """Of the host, another after each start: a pid means something only until the next."""
    since: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
        return cls(os.getpid(), socket.gethostname(), boot, time.strftime("%Y-%m-%d %H:%M:%S %z"))

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Inverse of `text`; None where it is none."""
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        words = (holder.host, holder.boot, holder.since)
        sound = type(holder.pid) is int and 0 < holder.pid < 2**31 and all(isinstance(word, str) and word.isprintable() for word in words)
        return holder if sound else None

    def gone(self) -> bool:
        """Whether this host has no such process; of others, and from inside a container, nobody can tell."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return self.host == socket.gethostname()
        except PermissionError:
            pass  # somebody else's, and alive
        return False

    def text(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.since}"


class Lock:
    """Held until the context ends, or the process does. Raises UserError where another run holds it, or may hold it unseen.

    The kernel keeps it (flock), so that no death leaves it behind; the name in the file is for those who are refused, and for folders
    on a network, where a lock may not reach other hosts. Hosts must not share both a folder and a name.
    """

    def __init__(self, folder: Path, name: str = NAME):
        self._path = folder / name
        try:
            self._file = os.fdopen(open_regular(self._path, os.O_RDWR | os.O_CREAT), "r+")
            try:
                self._take(Holder.here())
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.close()
                raise
        except UserError:
            raise
        except OSError as error:
            raise StorageError(f"cannot lock {folder}: {error.strerror}; free space there, or give another --out") from error

    def _take(self, here: Holder) -> None:
        folder = self._path.parent
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"a run's folder must be on a file system with locks, and that of {folder} has none ({error.strerror}); "
                    f"mount it with them, or give another --out"
                ) from error
            raise UserError(
                f"one run at a time trains in a folder, and {folder} is in use by {self._signed() or 'another process'}; "
                f"stop that one first, or give another --out"
            ) from error
        if left := self._read():
            before = Holder.parse(left)
            if before is None or (here.boot != before.boot and here.host != before.host):
                raise UserError(
                    f"{folder} is locked by {before or 'a file that is none of ours'}, and from host {here.host} nobody can see whether "
                    f"that still runs; once you know that it does not, delete {self._path}"
                )
            why = "that process is gone" if here.boot == before.boot else "that host has started anew since"
            print(f"nanojax: {folder} was locked by {before}: {why}, its lock is taken over", file=sys.stderr)
        self._write(here.text())

    def _signed(self) -> Holder | None:
        """Who holds it. Whoever has just taken it gets a moment to write its name, perhaps over that of a dead process."""
        deadline = time.monotonic() + SECONDS_TO_SIGN
        while ((holder := Holder.parse(self._read())) is None or holder.gone()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return holder

    def _read(self) -> str:
        return os.pread(self._file.fileno(), LARGEST, 0).decode(errors="replace")

    def _write(self, text: str) -> None:
        os.ftruncate(self._file.fileno(), 0)
        os.pwrite(self._file.fileno(), text.encode(), 0)
        os.fsync(self._file.fileno())

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file, contextlib.suppress(OSError):  # a name that stays is taken for that of a dead process, which it is
            os.ftruncate(self._file.fileno(), 0)
