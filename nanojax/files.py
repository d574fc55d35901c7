"""Files in folders that may come from anywhere, and the space that is left for more."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from nanojax.errors import UserError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FAILING = FULL | {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # the disk's doing, and not that of who named the folder


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A file descriptor of a file that is itself there. Raises UserError on a link, a pipe, a device; never waits for who writes a pipe."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise not_regular(path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise not_regular(path)
    return handle


def read_regular(path: Path, most: int) -> bytes:
    """Content of such a file. Raises UserError where it is larger than `most` bytes, OSError where it cannot be read."""
    with open(open_regular(path), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{path} has {size:,} bytes, and at most {most:,} are read; put the right file there")
        return file.read(min(most, size + 1))  # Python takes memory for what it is asked to read


def parse_json(content: bytes) -> Any:
    """Raises ValueError also where an object has a name twice: two readers would take it for two different things."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("it has a name twice")
        return made

    return json.loads(content, object_pairs_hook=once)


def require_regular(path: Path) -> None:
    """Raise UserError where there is something else than a file by that name; nothing there is fine."""
    with contextlib.suppress(OSError):  # what cannot be looked at cannot be read, and whoever tries says so
        if not stat.S_ISREG(path.lstat().st_mode):
            raise not_regular(path)


def not_regular(path: Path) -> UserError:
    """What to say of a link, a pipe or a device."""
    return UserError(f"{path} must be a regular file in that folder, and is a link or a device; put the file itself there")


def require_plain_folder(path: Path) -> None:
    """Raise UserError where a folder is a link: what is written, renamed and removed there would be somebody else's."""
    if path.is_symlink():
        raise UserError(f"{path} must be a folder itself, and is a link; give the folder that holds the whole run")


def free_bytes(folder: Path) -> int:
    """What a user may still write below a folder, or below the nearest that is there; a quota does not show."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def mb(size: int) -> str:
    """Bytes as text, in MB."""
    return f"{size / 1e6:,.1f} MB" if size < 10e6 else f"{size / 1e6:,.0f} MB"


def printable(text: str) -> str:
    """One line of bounded length that a terminal shows as it is, of text that a file may have chosen."""
    return text.encode("unicode_escape").decode()[:300]
