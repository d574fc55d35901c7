"""Token shards as they are read: their index, every file compared with it, and views of their documents."""

from __future__ import annotations

import hashlib
import itertools
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nanojax.data import corpus
from nanojax.errors import UserError
from nanojax.files import open_regular, parse_json, read_regular

LARGEST_INDEX = 2**24  # bytes; that of a hundred thousand shards


class TokenStore:
    """The tokens of one split: documents end to end, each begun by BOS, over shards that no document crosses.

    `offsets`, int64 [documents + 1], are where documents begin; document i is `read(offsets[i], offsets[i + 1] - offsets[i])`.
    Pickles to a path: a worker maps the files anew.
    """

    def __init__(self, folder: Path, split: corpus.Split) -> None:
        """Open one split of a folder that `prepare` wrote. Raises UserError when its index is unreadable."""
        self.folder, self.split = folder, split
        index = read_index(folder)
        try:
            entry = index["splits"][split]
            self.dtype = np.dtype(index["dtype"]).newbyteorder("<")
            self.files: list[dict[str, Any]] = [*entry["shards"], entry["offsets"]]
            self.tokens, self.documents, self.text_bytes = (int(entry[key]) for key in ("tokens", "documents", "text_bytes"))
            self.text_sha256 = str(entry["text_sha256"])
            self.n_vocab, self.tokenizer_sha256 = int(index["n_vocab"]), str(index["tokenizer_sha256"])
            self._starts = [0, *itertools.accumulate(int(shard["tokens"]) for shard in entry["shards"])]
            self._check_index()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{folder}/index.json is damaged ({type(error).__name__}: {error!s:.80}); {again(folder)}") from None
        self._maps: tuple[list[np.ndarray], np.ndarray] | None = None

    def _check_index(self) -> None:
        """Raise ValueError where what the index says does not agree with itself, before anything of the sizes that it states is made."""
        if self.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError(f"tokens of the type {self.dtype}")
        if self.tokens != self._starts[-1] or min(self._starts) < 0 or not 0 < self.documents <= self.tokens:
            raise ValueError(f"{self.tokens} tokens in {self.documents} documents, and {self._starts[-1]} in shards")
        for file in self.files:
            if file["file"] != Path(file["file"]).name:
                raise ValueError(f"a file outside its folder, {file['file']!r:.60}")
            if file["bytes"] != file.get("tokens", 0) * self.dtype.itemsize and "tokens" in file:
                raise ValueError(f"{file['tokens']} tokens in {file['bytes']} bytes")

    def verify(self) -> None:
        """Compare every file with the index, in threads, and what it holds with what tokens are. Raises UserError on the first damaged."""
        with ThreadPoolExecutor(threads()) as pool:
            for problem in pool.map(self._problem, self.files):
                if problem:
                    raise UserError(f"{problem}; {again(self.folder)}")
        try:
            shards, offsets = self._mapped()
            sound = offsets.dtype == np.int64 and offsets.shape == (self.documents + 1,)
            if not sound or offsets[0] != 0 or offsets[-1] != self.tokens or (np.diff(offsets) < 1).any():
                raise ValueError("are not where documents begin")
        except ValueError as error:
            raise UserError(f"the offsets of the {self.split} split {error}; {again(self.folder)}") from None
        for file, tokens in zip(self.files, shards, strict=False):
            if len(tokens) and (largest := int(tokens.max())) >= self.n_vocab:
                raise UserError(
                    f"shard {file['file']} has the token {largest}, and its tokenizer only {self.n_vocab}; {again(self.folder)}"
                )

    def _problem(self, file: dict[str, Any]) -> str | None:
        path = self.folder / file["file"]
        try:
            with open(open_regular(path), "rb") as content:
                if (size := os.fstat(content.fileno()).st_size) != file["bytes"]:
                    return f"shard {path.name} is corrupt: {size} bytes, expected {file['bytes']}"
                found = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            return f"shard {path.name} cannot be read: {error.strerror}"
        if found != file["sha256"]:
            return f"shard {path.name} is corrupt: SHA-256 {found[:16]}..., expected {file['sha256'][:16]}..."
        return None

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1], memory-mapped: token offset at which each document begins, and the end of the last."""
        return self._mapped()[1]

    def read(self, start: int, length: int) -> np.ndarray:
        """dtype [length]: a read-only view of tokens start .. start + length, which lie in one document. Takes microseconds."""
        shards = (self._maps or self._mapped())[0]
        which = bisect_right(self._starts, start) - 1
        if not 0 <= which < len(shards) or not 0 <= length <= self._starts[which + 1] - start:
            raise IndexError(f"tokens {start} to {start + length} do not lie in one shard of the {self.tokens} of {self.folder}")
        begin = start - self._starts[which]
        return shards[which][begin : begin + length]

    def _mapped(self) -> tuple[list[np.ndarray], np.ndarray]:
        if self._maps is None:
            *shards, offsets = (self.folder / file["file"] for file in self.files)
            # Plain views: slicing a np.memmap costs several times as much.
            arrays = [np.memmap(path, self.dtype, mode="r").view(np.ndarray) for path in shards]
            self._maps = arrays, np.load(offsets, mmap_mode="r").view(np.ndarray)
        return self._maps

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of shards. Raises UserError when it is missing or not an object."""
    try:
        index = parse_json(read_regular(folder / "index.json", LARGEST_INDEX))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/index.json cannot be read ({type(error).__name__}); {again(folder)}") from None
    if not isinstance(index, dict):
        raise UserError(f"{folder}/index.json is damaged; {again(folder)}")
    return index


def again(folder: Path) -> str:
    """The remedy for a folder of shards: a cache is never mended in silence."""
    return f"delete {folder} to tokenise again"


def threads() -> int:
    """As many as there are cores to use."""
    return max(2, min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))
