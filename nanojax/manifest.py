"""What a checkpoint's folder must hold, file by file and array by array. It is written last: a folder without it is no checkpoint.

orbax loads a flipped bit without a word, follows links out of the folder, and lists steps whose save failed. Hashes of files find
what happened to them on disk; digests of arrays find what happened on the way there and back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "manifest.json"
LARGEST = 2**22  # bytes of a manifest; that of a thousand arrays in ten thousand files has 2**21
VERSION = 1
STEP = re.compile("0|[1-9][0-9]{0,9}")  # the name of a checkpoint's folder


class Damaged(Exception):
    """A checkpoint is not what was saved: the message names the file or array, and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """Of one checkpoint."""

    step: int
    meta: dict[str, Any]
    """JSON of the run's own: data position, config, hash of the tokenizer."""
    arrays: dict[str, str]
    """Name -> digest, of every array of the state."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Path in the folder -> (bytes, SHA-256), of every file but the manifest."""

    def check_files(self, folder: Path, below: str = "") -> None:
        """Raise Damaged unless the folder holds these files and no others, byte for byte those whose path begins with `below`."""
        there = dict(regular_files(folder))
        for path in self.files.keys() | there.keys():
            if path not in there:
                raise Damaged(f"{path} is missing")
            if path not in self.files:
                raise Damaged(f"{path} does not belong to it")
            if there[path] != self.files[path][0]:
                raise Damaged(f"{path} has {there[path]} bytes instead of {self.files[path][0]}")
        looked_at = [path for path in self.files if path.startswith(below)]
        for path, digest in zip(looked_at, hashes(folder, looked_at), strict=True):
            if digest != self.files[path][1]:
                raise Damaged(f"{path} has other bytes than were saved")

    def check_arrays(self, digests: dict[str, str]) -> None:
        """Raise Damaged unless arrays with these digests are those that were saved."""
        for name, digest in digests.items():
            if self.arrays.get(name) != digest:
                raise Damaged(f"{name} came back with other bits than were saved")


def write(folder: Path, step: int, meta: dict[str, Any], arrays: dict[str, str]) -> None:
    """Make a finished save a checkpoint: every file is on disk before the manifest is, and that is there whole or not at all."""
    sizes = dict(regular_files(folder))
    files = {path: (sizes[path], digest) for path, digest in zip(sizes, hashes(folder, sizes, sync=True), strict=True)}
    record = {"version": VERSION, "step": step, "meta": meta, "arrays": arrays, "files": files}
    unfinished = folder / f".{NAME}"
    body = json.dumps(record, indent=1)
    with unfinished.open("w") as file:
        file.write(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / NAME)
    for each in (*{(folder / path).parent for path in files}, folder, folder.parent):
        sync_folder(each)


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises Damaged where it is none."""
    try:
        if folder.is_symlink():
            raise Damaged("it is a link, and no folder of its own")
        info = (folder / NAME).lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > LARGEST:
            raise Damaged(f"{NAME} is no file of a size that a manifest has")
        body, _, digest = (folder / NAME).read_text().rstrip("\n").rpartition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            raise Damaged(f"{NAME} has other bytes than were written")
        record = json.loads(body)
        if record["version"] != VERSION or record["step"] != int(folder.name):
            raise Damaged(
                f"{NAME} is of version {record['version']!r:.20} and step {record['step']!r:.20}, not {VERSION} and {folder.name}"
            )
        files = {path: (int(size), str(digest)) for path, (size, digest) in record["files"].items()}
        return Manifest(record["step"], dict(record["meta"]), dict(record["arrays"]), files)
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{NAME} cannot be read ({type(error).__name__})") from error


def complete_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint below a folder, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(child.name) for child in folder.iterdir() if STEP.fullmatch(child.name) and (child / NAME).is_file())


def regular_files(folder: Path) -> Iterator[tuple[str, int]]:
    """(path in the folder, bytes) of every file, in order, but a manifest. Raises Damaged on links and devices."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in (*folders, *sorted(names)):
            path = Path(place, name)
            info, at = path.lstat(), path.relative_to(folder).as_posix()
            if name in folders and stat.S_ISDIR(info.st_mode):
                continue
            if not stat.S_ISREG(info.st_mode):
                raise Damaged(f"{at} is no regular file")
            if at not in (NAME, f".{NAME}"):
                yield at, info.st_size


def hashes(folder: Path, paths: Any, *, sync: bool = False) -> list[str]:
    """SHA-256 of each, in several threads; with `sync`, each is on disk afterwards."""

    def one(path: str) -> str:
        with (folder / path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
        return digest

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, paths))


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
