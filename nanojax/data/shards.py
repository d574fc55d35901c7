"""Tokens on disk: a corpus tokenised once into checksummed shards below the cache, read back through memory maps."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nanojax.config import DataConfig
from nanojax.data import corpus
from nanojax.data.store import TokenStore, again, read_index, threads
from nanojax.errors import StorageError, UserError
from nanojax.files import FULL, free_bytes, mb
from nanojax.tokenizer import SPLIT_PATTERN, Tokenizer

FORMAT = 1  # part of every key: raise it when the same corpus would be split, tokenised or laid out differently
SHARD_TOKENS = 2**27
TRAIN_CHARS = 2_000_000_000  # nanochat's caps on what a tokenizer learns from
TRAIN_DOCUMENT_CHARS = 10_000
BATCH_CHARS = 2**20  # one task of a thread
BATCH_DOCUMENTS = 1024
PROGRESS_AFTER_S = 2.0
LOG_EVERY_S = 60.0
Log = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A corpus, ready to be packed."""

    tokenizer: Tokenizer
    train: TokenStore
    val: TokenStore
    fingerprint: str
    """Of the corpus, see corpus.fingerprint."""
    folder: Path
    """Holds the shards; its name is the key of corpus and tokenizer, and packing plans go beside them."""
    bytes_per_token: float
    """Bytes of training text for each of its tokens, BOS not counted."""


def prepare(data: DataConfig, vocab_size: int, log: Log) -> Prepared:
    """Corpus -> checked token shards, from the cache where it has them. `vocab_size` counts only when a tokenizer is trained.

    Raises UserError on a corpus, tokenizer or shard that is wrong, StorageError when the cache cannot be written.
    """
    source = corpus.find(data)
    mark = corpus.fingerprint(data, source)
    log(f"corpus: {'embedded, ' if source.kind == 'embedded' else ''}{source.root}, {len(source.files)} files, fingerprint {mark[:16]}")
    tokenizer = tokenizer_of(data, vocab_size, log, source)
    cache = Path(os.path.expanduser(data.cache))
    folder = cache / "tokens" / _key(mark, tokenizer.sha256, data.val_fraction, FORMAT)
    if folder.exists():
        log(f"tokens: from {folder}")
    else:
        began = time.monotonic()
        with storing(cache):
            _build(data, source, tokenizer, mark, folder, log)
        log(f"tokens: made {folder} in {time.monotonic() - began:.1f} s")
    train, val = (TokenStore(folder, split) for split in get_args(corpus.Split))
    for store in (train, val):
        store.verify()
        if store.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{folder} holds the tokens of another tokenizer, {store.tokenizer_sha256:.12}; {again(folder)}")
        log(f"{store.split}: {store.documents:,} documents, {store.tokens:,} tokens, text SHA-256 {store.text_sha256[:16]}")
    if left_out := read_index(folder)["skipped"]:
        log(f"left out: {', '.join(f'{n:,} {reason}' for reason, n in left_out.items())}")
    return Prepared(tokenizer, train, val, mark, folder, train.text_bytes / max(1, train.tokens - train.documents))


def tokenizer_of(data: DataConfig, vocab_size: int, log: Log, source: corpus.Source | None = None) -> Tokenizer:
    """The tokenizer that is named, or one trained on the training split and kept in the cache."""
    if data.tokenizer is not None:
        tokenizer = Tokenizer.resolve(data.tokenizer)
        log(f"tokenizer: {data.tokenizer}, {tokenizer.n_vocab:,} tokens, SHA-256 {tokenizer.sha256[:16]}")
        return tokenizer
    mark = corpus.fingerprint(data, source)
    cache = Path(os.path.expanduser(data.cache))
    key = _key(mark, vocab_size, data.val_fraction, TRAIN_CHARS, TRAIN_DOCUMENT_CHARS, SPLIT_PATTERN, FORMAT)
    path = cache / "tokenizers" / f"{key}.json"
    if path.exists():
        try:
            tokenizer = Tokenizer.load(path)
        except UserError as error:
            raise UserError(f"{error}, or delete it to train again") from error
        how = f"from {path}"
    else:
        began = time.monotonic()
        with storing(cache):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):  # find out before minutes of training, not after
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        tokenizer = train_tokenizer(data, vocab_size)
        with storing(cache):
            tokenizer.save(path)
        how = f"trained in {time.monotonic() - began:.1f} s, kept as {path}"
    less = "" if tokenizer.n_vocab == vocab_size else f" (the corpus has no more pairs to merge, asked were {vocab_size:,})"
    log(f"tokenizer: {tokenizer.n_vocab:,} tokens{less}, {how}, SHA-256 {tokenizer.sha256[:16]}")
    return tokenizer


def train_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """Train on the training split, within the caps."""

    def texts() -> Iterator[str]:
        left = TRAIN_CHARS
        for text in corpus.documents(data, "train"):
            yield text[: min(left, TRAIN_DOCUMENT_CHARS)]
            left -= min(len(text), TRAIN_DOCUMENT_CHARS)
            if left <= 0:
                return

    return Tokenizer.train(texts(), vocab_size)


def _build(data: DataConfig, source: corpus.Source, tokenizer: Tokenizer, mark: str, folder: Path, log: Log) -> None:
    """Tokenise into a temporary folder beside `folder`, then rename it; whoever comes second uses what is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
        skipped: Counter[str] = Counter()
        writers = {split: _Writer(temporary, split, dtype) for split in get_args(corpus.Split)}
        with contextlib.ExitStack() as stack:
            for writer in writers.values():
                stack.callback(writer.close)
            pairs = _progress(corpus.labelled(data, source, skipped), log)
            for split, text, tokens in _encoded(pairs, tokenizer, dtype):
                writers[split].add(text, tokens)
            index = {
                "format": FORMAT,
                "dtype": dtype.name,
                "n_vocab": tokenizer.n_vocab,
                "tokenizer_sha256": tokenizer.sha256,
                "fingerprint": mark,
                "source": str(source.root),
                "skipped": dict(skipped),
                "splits": {split: writer.finish() for split, writer in writers.items()},
            }
        (temporary / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes folders that nobody else may enter
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encoded(
    pairs: Iterable[tuple[corpus.Split, str]], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[tuple[corpus.Split, bytes, np.ndarray]]:
    """(split, text as UTF-8, tokens with BOS) of each document, in order; threads tokenise a bounded number of batches ahead."""

    def encode(batch: list[tuple[corpus.Split, str]]) -> list[tuple[corpus.Split, bytes, np.ndarray]]:
        return [(split, text.encode(), np.array([tokenizer.bos, *tokenizer.encode(text)], dtype)) for split, text in batch]

    waiting: deque[Future[list[tuple[corpus.Split, bytes, np.ndarray]]]] = deque()
    with ThreadPoolExecutor(threads()) as pool:
        for batch in _batches(pairs):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * threads():
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _batches(pairs: Iterable[tuple[corpus.Split, str]]) -> Iterator[list[tuple[corpus.Split, str]]]:
    """Documents in groups that are worth a thread's while, bounded in characters and in number."""
    batch: list[tuple[corpus.Split, str]] = []
    chars = 0
    for pair in pairs:
        batch.append(pair)
        chars += len(pair[1])
        if chars >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _Writer:
    """Shards, offsets and hashes of one split while they are written."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.offsets = array("q", [0])  # 8 bytes a document
        self.shards: list[dict[str, Any]] = []
        self.text_bytes = 0
        self.text_digest = hashlib.sha256()
        self.file: Any = None
        self.in_shard = 0

    def add(self, text: bytes, tokens: np.ndarray) -> None:
        """Append one document; a new shard begins where it would overflow the present one."""
        if self.file is None or self.in_shard + len(tokens) > SHARD_TOKENS:
            self.close()
            self.name = f"{self.split}-{len(self.shards):05d}.bin"
            self.file = open(self.folder / self.name, "wb", buffering=2**20)  # noqa: SIM115 - stays open over many calls; close() ends it
            self.digest, self.in_shard = hashlib.sha256(), 0
        content = tokens.data.cast("B")
        self.file.write(content)
        self.digest.update(content)
        self.in_shard += len(tokens)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.text_bytes += len(text)
        self.text_digest.update(len(text).to_bytes(8, "little") + text)

    def close(self) -> None:
        """Finish the present shard, if any."""
        if self.file is None:
            return
        self.file.close()
        self.file = None
        size = self.in_shard * self.dtype.itemsize
        self.shards.append({"file": self.name, "tokens": self.in_shard, "bytes": size, "sha256": self.digest.hexdigest()})

    def finish(self) -> dict[str, Any]:
        """Close, write the offsets, and return this split's entry of the index."""
        self.close()
        path = self.folder / f"{self.split}-offsets.npy"
        np.save(path, np.frombuffer(self.offsets, np.int64))
        with open(path, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return {
            "documents": len(self.offsets) - 1,
            "tokens": self.offsets[-1],
            "text_bytes": self.text_bytes,
            "text_sha256": self.text_digest.hexdigest(),
            "shards": self.shards,
            "offsets": {"file": path.name, "bytes": path.stat().st_size, "sha256": digest},
        }


def _progress(pairs: Iterator[tuple[corpus.Split, str]], log: Log) -> Iterator[tuple[corpus.Split, str]]:
    """Pass documents through; once it takes a while, say how many and how fast: in place on a terminal, else in the log."""
    began = said = time.monotonic()
    count = 0
    watched = sys.stderr.isatty()
    for pair in pairs:
        yield pair
        count += 1
        now = time.monotonic()
        if watched and now - began > PROGRESS_AFTER_S:
            break
        if now - said > LOG_EVERY_S:
            log(f"tokenising: {count:,} documents, {count / (now - began):,.0f} documents/s")
            said = now
    else:
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("tokenising: {task.completed:,.0f} documents")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, completed=count)
        for pair in pairs:
            yield pair
            bar.advance(task)


@contextlib.contextmanager
def storing(cache: Path) -> Iterator[None]:
    """Trouble with the cache's disk, as one line that names the flag to change."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error  # a StorageError from below names another remedy
        space = f" ({mb(free_bytes(cache))} free)" if error.errno in FULL else ""
        raise StorageError(
            f"cannot write to the cache {cache}: {reason}{space}; free space there, or choose a folder with --data.cache "
            "(of eval, sample and export: --cache)"
        ) from error


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
