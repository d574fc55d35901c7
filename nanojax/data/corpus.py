"""Where text comes from: documents of the embedded corpus, of your files or of downloaded shards, streamed in a fixed order."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanojax.config import DataConfig
from nanojax.errors import UserError
from nanojax.tokenizer import clean

Split = Literal["train", "val"]

MANIFEST = "nanojax-download.json"
"""What `nanojax data download` leaves beside its shards: {"files": [...], "validation": one of them}."""
ROW_SUFFIXES = (".jsonl", ".parquet")
COLUMN = "text"
PARQUET_ROWS = 1024  # read at a time, so that memory stays bounded
# Character tables and tests drown the prose of the library; idle's and lib2to3's tests sit deeper, under the same names.
LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)
MIN_EMBEDDED_FILES = 100  # a full library has about 700; minimal Debian images keep a handful


@dataclass(frozen=True)
class Source:
    """The files behind a DataConfig, sorted by their path below `root`."""

    root: Path
    files: tuple[Path, ...]
    kind: Literal["embedded", "rows", "texts"]
    """rows: every line or row is a document; otherwise every file is one."""
    validation: Path | None = None
    """The file that is the validation split, where the corpus names one."""


def find(data: DataConfig) -> Source:
    """The files of the corpus. Raises UserError when there are none, naming the rule, the path and a remedy."""
    if data.path is None:
        return _embedded()
    root = Path(os.path.expanduser(data.path))
    if not root.exists():
        raise UserError(
            f"--data.path {data.path} does not exist; give a folder of .jsonl or .parquet files, or drop it for the embedded corpus"
        )
    if data.glob is not None:
        return _globbed(root, data.glob)
    files = (root,) if root.is_file() and root.suffix in ROW_SUFFIXES else _walk(root, ROW_SUFFIXES, left_out=frozenset())
    if not files:
        raise UserError(
            f"--data.path {data.path} holds no .jsonl or .parquet file; for other text add a pattern, such as --data.glob '**/*.txt'"
        )
    return Source(root, files, "rows", _validation(root, files))


def documents(data: DataConfig, split: Split) -> Iterator[str]:
    """The documents of one split, one at a time, always in the same order. Raises UserError on text that cannot be read.

    Without a validation file the split goes by position: document 0 trains, document 1 validates, and from there on every
    1 / val_fraction-th does.
    """
    source = find(data)
    if source.validation is None:
        return (text for where, text in labelled(data, source) if where == split)
    files = [file for file in source.files if (file == source.validation) == (split == "val")]
    return (text for file in files for text in _read(file, source, Counter()))


def labelled(data: DataConfig, source: Source, skipped: Counter[str] | None = None) -> Iterator[tuple[Split, str]]:
    """Every document with its split, in one pass. Counts into `skipped` what it leaves out, by reason."""
    skipped = Counter() if skipped is None else skipped
    seen: Counter[Split] = Counter()
    for file in source.files:
        for text in _read(file, source, skipped):
            if source.validation is not None:
                split: Split = "val" if file == source.validation else "train"
            else:
                split = split_of(seen.total(), data.val_fraction)
            seen[split] += 1
            yield split, text
    where = f"{source.root} has {seen['train']} documents to train on and {seen['val']} to validate on"
    if not seen["train"] or not seen["val"]:
        why = f" (left out: {', '.join(f'{n} {reason}' for reason, n in skipped.items())})" if skipped else ""
        raise UserError(f"a corpus needs at least one document in each split, and {where}{why}; add documents to --data.path")


def split_of(position: int, val_fraction: float) -> Split:
    """Of the first n >= 2 documents, ceil((n - 1) * val_fraction) validate: never none, never all, and evenly spread."""
    return "val" if math.ceil(position * val_fraction) > math.ceil((position - 1) * val_fraction) else "train"


def fingerprint(data: DataConfig, source: Source | None = None) -> str:
    """SHA-256, in hex, of the names and sizes of the files, and when they changed: cheap, yet another one when the corpus is.

    For the embedded corpus the version of Python stands in for the times, so that equal installations agree. Contents are
    hashed when they are tokenised (shards.py keeps that hash).
    """
    source = find(data) if source is None else source
    embedded = source.kind == "embedded"
    digest = hashlib.sha256(f"{source.kind} {sys.version.split()[0] if embedded else ''}\n".encode())
    for file in source.files:
        facts = _stat(file)
        name = file.relative_to(source.root).as_posix()
        role = " val" if file == source.validation else ""
        digest.update(f"{name!r} {facts.st_size} {0 if embedded else facts.st_mtime_ns}{role}\n".encode())
    return digest.hexdigest()


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; mend or remove it") from error


def _embedded() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, (".py",), LEFT_OUT)
    if len(files) < MIN_EMBEDDED_FILES:
        raise UserError(
            f"the embedded corpus is this Python's own library, and {root} holds only {len(files)} of its files; "
            f"give text of your own with --data.path DIR, or run a full Python"
        )
    return Source(root, files, "embedded")


def _walk(root: Path, suffixes: tuple[str, ...], left_out: frozenset[str]) -> tuple[Path, ...]:
    """Files below root, hidden folders aside (the hub's client keeps its notes in one), sorted by relative path."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        named = (Path(folder, name) for name in names if name.endswith(suffixes) and not name.startswith("."))
        found += [file for file in named if file.is_file() or not file.exists()]  # not a pipe, which would wait for ever
    return tuple(sorted(found, key=lambda file: file.relative_to(root).parts))


def _globbed(root: Path, pattern: str) -> Source:
    if not root.is_dir():
        raise UserError(f"--data.glob searches a folder, and --data.path {root} is a file; give its folder")
    home = os.path.realpath(root)
    inside: dict[Path, bool] = {}  # by folder: resolving every file of a large tree would take minutes

    def stays(file: Path) -> bool:
        if file.is_symlink():
            return _is_below(os.path.realpath(file), home)
        if file.parent not in inside:
            inside[file.parent] = _is_below(os.path.realpath(file.parent), home)
        return inside[file.parent]

    try:
        files = [file for file in root.glob(pattern) if file.is_file() and stays(file)]
    except (ValueError, NotImplementedError, IndexError) as error:
        raise UserError(f"--data.glob {pattern!r} is no pattern below a folder ({error}); try '**/*.txt'") from None
    if not files:
        raise UserError(f"--data.glob {pattern!r} matches no file below {root}; try '**/*.txt'")
    return Source(root, tuple(sorted(files, key=lambda file: file.relative_to(root).parts)), "texts")


def _is_below(path: str, home: str) -> bool:
    return path == home or path.startswith(home.rstrip(os.sep) + os.sep)


def _validation(root: Path, files: tuple[Path, ...]) -> Path | None:
    """The validation shard that a manifest names. Raises UserError when the download it describes is not complete."""
    manifest = root / MANIFEST
    if not manifest.is_file():
        return None
    try:
        saved = json.loads(manifest.read_bytes())
        validation, names = root / saved["validation"], saved["files"]
        missing = [name for name in names if root / name not in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is damaged ({type(error).__name__}: {error}); run `nanojax data download` into {root} again") from None
    if missing or validation not in files:
        lacking = (missing or [validation.name])[0]
        raise UserError(f"the download in {root} is not complete, {lacking} is missing; run `nanojax data download` again, it resumes")
    return validation


def _read(file: Path, source: Source, skipped: Counter[str]) -> Iterator[str]:
    """Documents of one file; those without any text are left out."""
    readers: dict[str, Callable[[Path, Counter[str]], Iterator[str]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    read = readers[file.suffix] if source.kind == "rows" else _read_text
    try:
        for text in read(file, skipped):
            if text and not text.isspace():
                yield text
            else:
                skipped["empty documents"] += 1
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}; mend or remove it") from error


def _read_text(file: Path, skipped: Counter[str]) -> Iterator[str]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return
    if b"\0" in content:
        skipped["binary"] += 1
        return
    yield text


def _read_jsonl(file: Path, skipped: Counter[str]) -> Iterator[str]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{file}:{number} is not JSON; every line must be an object with a string {COLUMN!r}") from None
            text = row.get(COLUMN) if isinstance(row, dict) else None
            if not isinstance(text, str):
                given = f"keys {', '.join(map(repr, row)) or 'none'}" if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{file}:{number} has no string {COLUMN!r}, given {given[:200]}; rename the field")
            yield clean(text)


def _read_parquet(file: Path, skipped: Counter[str]) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{file} is Parquet, which needs pyarrow; pip install 'nanojax[data]'") from error
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if COLUMN not in names:
                raise UserError(f"{file} has no column {COLUMN!r}, given {', '.join(names)[:200]}; rename the column")
            kind = table.schema_arrow.field(COLUMN).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{file} has {kind} in its column {COLUMN!r}, which must hold strings; convert the column")
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[COLUMN]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{file} is no readable Parquet file ({reason}); mend or remove it") from error
