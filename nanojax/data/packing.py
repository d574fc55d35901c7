"""Which tokens make up which row: documents -> a packing plan, computed once and kept beside the token shards.

Shape letters: U = T + 1 tokens of a row (inputs are its first T, targets its last T), R rows.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import warnings
import zlib
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanojax.errors import UserError

if TYPE_CHECKING:
    from nanojax.data.shards import TokenStore

BUFFER_DOCUMENTS = 1000
MIN_DOCUMENT = 2  # a shorter one is at most a BOS: nothing to predict from it
VERSION = 1  # of the plan's contents; raise it when the same corpus would be packed differently
HEADER = 6  # int64 words before the arrays in a plan file
KEY_CHUNK = 1 << 16  # documents turned into Python integers at a time; all at once would take gigabytes
ARRIVAL_BITS = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Rows of exactly T + 1 tokens, each a run of document slices ("segments")."""

    packing: str
    seq_len: int
    """T."""
    n_tokens: int
    """Tokens of the corpus, whether they are in a row or not."""
    row_starts: np.ndarray
    """int64 [rows + 1]: row r is the segments row_starts[r] .. row_starts[r + 1]."""
    starts: np.ndarray
    """int64 [segments]: where a segment begins in the corpus, in tokens."""
    lengths: np.ndarray
    """int32 [segments]: its tokens, all of one document."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def dropped(self) -> float:
        """Share of the corpus that is in no row."""
        shared = self.rows - 1 if self.packing == "concat" else 0  # the token that ends a row and begins the next
        return 1 - (self.rows * (self.seq_len + 1) - shared) / self.n_tokens

    @property
    def max_segments(self) -> int:
        """Most documents in one row."""
        return int(np.diff(self.row_starts).max())


def plan(offsets: np.ndarray, seq_len: int, packing: str, seed: int | None, max_documents: int | None = None) -> Plan:
    """Pack the documents [offsets[i], offsets[i + 1]) into rows; offsets int64 [documents + 1].

    The seed shuffles the documents (training); None keeps their order (validation). Documents shorter than two tokens are left out.
    `best_fit`: every row starts a document; the tail of a cropped document is dropped (nanochat/dataloader.py, January 2026).
    `concat`: one stream cut every T tokens. Rows overlap by one token, so that each token but the first is a target exactly once.
    In both the last, partial row is dropped. Raises UserError when that leaves none.
    `max_documents` caps the documents of a row, at 2 or more. A row that would have more gets a document that fills it up (best_fit), or
    goes without its shortest ones (concat); what that costs is part of `dropped`.
    """
    offsets = np.asarray(offsets, np.int64)
    lengths = np.diff(offsets)
    order = np.flatnonzero(lengths >= MIN_DOCUMENT)
    if seed is not None:
        # RandomState, because numpy promises its stream for ever and Generator's only for a version: equal configs must give equal runs.
        order = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).permutation(order)
    usable = int(lengths[order].sum())
    if usable < seq_len + 1:
        remedy = f"try --seq-len {usable - 1} or less, or more text" if usable >= MIN_DOCUMENT else "give it more text"
        raise UserError(f"a row takes seq_len + 1 = {seq_len + 1} tokens, given {usable} in {len(order)} documents; {remedy}")
    row_starts, starts, segment_lengths = PACKERS[packing](offsets[order], lengths[order], seq_len, max_documents)
    if max_documents is not None and len(row_starts) < 2:
        raise UserError(
            f"max_documents={max_documents} leaves no full row of {seq_len + 1} tokens, the documents are too short; "
            f"try more --data.max-documents, or a shorter --seq-len"
        )
    total = int(offsets[-1] - offsets[0])
    return Plan(packing=packing, seq_len=seq_len, n_tokens=total, row_starts=row_starts, starts=starts, lengths=segment_lengths)


def _best_fit(starts: np.ndarray, lengths: np.ndarray, seq_len: int, cap: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Repeatedly the largest of 1000 waiting documents that fits the rest of the row; if none does, the shortest, cropped.

    The last document of a capped row is the shortest that fills it; as long as none of those waiting does, the shortest of them is
    dropped and the next let in. Equally long documents go in the order of their arrival.
    """
    capacity = rest = seq_len + 1
    last = (1 << ARRIVAL_BITS) - 1
    keys = _keys(lengths)
    buffer = sorted(islice(keys, BUFFER_DOCUMENTS))
    chosen, takes, row_starts = array("q"), array("i"), array("q", [0])
    while buffer:
        i = bisect_left(buffer, (rest + 1) << ARRIVAL_BITS) - 1  # the largest that fits
        last_slot = cap is not None and len(chosen) - row_starts[-1] == cap - 1
        if last_slot and (i < 0 or buffer[i] >> ARRIVAL_BITS < rest):
            i += 1  # the next longer
            fills = i < len(buffer)
            i = _first_of_its_length(buffer, i if fills else 0)
            if not fills:
                buffer.pop(i)
                if (waiting := next(keys, None)) is not None:
                    insort(buffer, waiting)
                continue
        elif i < 0:
            i = _first_of_its_length(buffer, 0)  # the shortest
        key = buffer.pop(i)
        take = min(key >> ARRIVAL_BITS, rest)
        chosen.append(last - (key & last))
        takes.append(take)
        rest -= take
        if rest == 0:
            row_starts.append(len(chosen))
            rest = capacity
        if (waiting := next(keys, None)) is not None:
            insort(buffer, waiting)
    n = row_starts[-1]
    return np.array(row_starts, np.int64), starts[np.array(chosen, np.int64)[:n]], np.array(takes, np.int32)[:n]


def _first_of_its_length(buffer: list[int], i: int) -> int:
    """Index of the key that arrived first among those as long as buffer[i]."""
    return bisect_left(buffer, ((buffer[i] >> ARRIVAL_BITS) + 1) << ARRIVAL_BITS) - 1


def _keys(lengths: np.ndarray) -> Iterator[int]:
    """Integers that sort by length, and among equals from the last arrival to the first, so that bisect lands on the first."""
    if len(lengths) >> ARRIVAL_BITS or int(lengths.max()) >> 31:
        raise UserError(
            f"best_fit takes up to 2**32 documents of up to 2**31 tokens, given {len(lengths)} of up to {lengths.max()}; try concat"
        )
    for at in range(0, len(lengths), KEY_CHUNK):
        part = lengths[at : at + KEY_CHUNK]
        arrival = np.arange(at, at + len(part), dtype=np.int64)
        yield from ((part << ARRIVAL_BITS) | ((1 << ARRIVAL_BITS) - 1 - arrival)).tolist()


def _concat(starts: np.ndarray, lengths: np.ndarray, seq_len: int, cap: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stream of documents, cut: row r is its tokens [r T, r T + T]. With a cap, of those documents that `_keep` keeps."""
    if cap is not None:
        kept = _keep(lengths, seq_len, cap)
        starts, lengths = starts[kept], lengths[kept]
        if not len(lengths):
            return np.zeros(1, np.int64), starts, lengths.astype(np.int32)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    row_begins = np.arange((int(ends[-1]) - 1) // seq_len, dtype=np.int64) * seq_len
    row_ends = row_begins + seq_len + 1
    first = np.searchsorted(ends, row_begins, side="right")
    counts = np.searchsorted(begins, row_ends, side="left") - first
    row_starts = np.concatenate([[0], np.cumsum(counts)])
    doc = np.arange(row_starts[-1]) - np.repeat(row_starts[:-1] - first, counts)
    lo = np.maximum(begins[doc], np.repeat(row_begins, counts))
    hi = np.minimum(ends[doc], np.repeat(row_ends, counts))
    return row_starts, starts[doc] + lo - begins[doc], (hi - lo).astype(np.int32)


def _keep(lengths: np.ndarray, seq_len: int, cap: int) -> np.ndarray:
    """bool [documents]: which a capped stream has. A row that would have one document too many goes without its shortest one.

    Of equally short ones the last; never the one that the row before ends in.
    """
    kept = np.ones(len(lengths), bool)
    end, row_ends, count = 0, seq_len + 1, 0
    shortest: list[tuple[int, int]] = []
    for i, length in enumerate(lengths.tolist()):
        if count:
            heappush(shortest, (length, -i))
        end += length
        count += 1
        if count > cap:
            surplus, at = heappop(shortest)
            kept[-at] = False
            end -= surplus
            count -= 1
        if end >= row_ends:  # the last token of a row is the first of the next, and this document's
            row_ends += (end - row_ends) // seq_len * seq_len + seq_len
            shortest, count = [], 1
    return kept


PACKERS = {"best_fit": _best_fit, "concat": _concat}


def read_row(store: TokenStore, plan: Plan, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments), both int32 [U], of one row; see `read_rows`."""
    tokens_RU, segments_RU = read_rows(store, plan, [row])
    return tokens_RU[0], segments_RU[0]


def read_rows(store: TokenStore, plan: Plan, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments), both int32 [R, U]: segments number the documents of a row 1, 2, ... in their order.

    The target that begins the next document stays a target: nanochat trains the model to predict BOS, and so to end a text.
    """
    tokens_RU = np.empty((len(rows), plan.seq_len + 1), np.int32)
    segments_RU = np.empty_like(tokens_RU)
    for r, row in enumerate(rows):
        lo, hi = plan.row_starts[row : row + 2].tolist()
        at = 0
        for number, (start, length) in enumerate(zip(plan.starts[lo:hi].tolist(), plan.lengths[lo:hi].tolist(), strict=True), 1):
            tokens_RU[r, at : at + length] = store.read(start, length)
            segments_RU[r, at : at + length] = number
            at += length
    return tokens_RU, segments_RU


def load_or_make(store: TokenStore, *, seq_len: int, packing: str, seed: int | None, max_documents: int | None = None) -> Plan:
    """The plan of a store, memory-mapped from the file beside its shards; made and written first if there is none.

    The file's name carries a hash of the documents' offsets and of all arguments, so a plan never meets another corpus. Processes that
    make it at once write the same bytes, and the last rename wins.
    """
    offsets = np.ascontiguousarray(store.offsets, np.int64)
    arguments = (VERSION, seq_len, packing, seed) if max_documents is None else (VERSION, seq_len, packing, seed, max_documents)
    key = hashlib.blake2b(repr(arguments).encode(), digest_size=8)
    key.update(offsets.data)
    path = Path(store.folder) / f"plan-{store.split}-{packing}-T{seq_len}-{key.hexdigest()}.npy"
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        warnings.warn(f"the packing plan {path} cannot be read ({error}); making it again", stacklevel=2)
    try:
        made = plan(offsets, seq_len, packing, seed, max_documents)
    except UserError as error:
        raise UserError(f"the {store.split} split in {store.folder}: {error}") from error
    try:
        _save(made, path)
    except OSError as error:  # a read-only folder of shared data serves as well, a little slower each time
        warnings.warn(f"the packing plan {path} cannot be kept ({error}); every start makes it again", stacklevel=2)
        return made
    return _load(path)


def _save(plan: Plan, path: Path) -> None:
    """One int64 array, because only a single file can be replaced atomically: header, row_starts, starts, lengths (two a word)."""
    lengths = np.zeros(round_up_even(len(plan.lengths)), np.int32)
    lengths[: len(plan.lengths)] = plan.lengths
    body = np.concatenate([plan.row_starts, plan.starts, lengths.view(np.int64)])
    kind = list(PACKERS).index(plan.packing)
    header = [zlib.crc32(body.data), kind, plan.seq_len, plan.n_tokens, plan.rows, len(plan.starts)]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # a pid would repeat: every container has a process 1
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.concatenate([np.array(header, np.int64), body]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> Plan:
    """Inverse of `_save`. Raises FileNotFoundError, or ValueError and its like for a file that is damaged."""
    words = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # plain arrays slice much faster than np.memmap
    if words.dtype != np.int64 or words.ndim != 1 or len(words) < HEADER:
        raise ValueError("it is no packing plan")
    crc, kind, seq_len, n_tokens, rows, segments = words[:HEADER].tolist()
    body = words[HEADER:]
    if len(body) != rows + 1 + segments + round_up_even(segments) // 2 or zlib.crc32(body.data) != crc:
        raise ValueError("its checksum is wrong")
    row_starts, starts, lengths = np.split(body, [rows + 1, rows + 1 + segments])
    found = Plan(
        packing=list(PACKERS)[kind],
        seq_len=seq_len,
        n_tokens=n_tokens,
        row_starts=row_starts,
        starts=starts,
        lengths=lengths.view(np.int32)[:segments],
    )
    if rows < 1 or row_starts[0] != 0 or row_starts[-1] != segments or not (np.diff(row_starts) > 0).all():
        raise ValueError("its rows are not made of its segments")
    if not ((found.starts >= 0) & (found.lengths > 0) & (found.starts + found.lengths <= n_tokens)).all():
        raise ValueError("its segments lie outside the corpus")
    if not (np.add.reduceat(found.lengths, row_starts[:-1], dtype=np.int64) == seq_len + 1).all():
        raise ValueError(f"its rows are not of {seq_len} + 1 tokens")
    return found


def round_up_even(n: int) -> int:
    """The smallest even number that is at least n."""
    return n + n % 2
