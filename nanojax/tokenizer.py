"""Byte pair encoding: trained by rustbpe, applied by tiktoken, kept as one JSON file that proves its own contents."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nanojax.errors import StorageError, UserError
from nanojax.files import FULL, free_bytes, mb, parse_json, read_regular

# nanochat's: GPT-4's pattern with at most two digits a token, which it found better for vocabularies of 32,768.
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
N_BYTES = 256
FORMAT = "nanojax-tokenizer-1"
LARGEST = 2**26  # bytes of a file; 200,000 tokens have at most 2**24
MAX_ID = 2**24  # far above any vocabulary; bounds what a broken file can make us allocate
# Both libraries panic (fancy-regex, StackOverflow) on a million spaces in a row; pieces of this many characters never do.
PIECE_CHARS = 2**18
NO_TOKEN = "\ufffd".encode()


class Tokenizer:
    """Text <-> token ids. Ids are merges in rank order, then special tokens; gaps that a named encoding leaves stay unused."""

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> None:
        """Wrap checked parts: every single byte has a rank, no two tokens share an id, SPECIAL_TOKENS are in `specials`."""
        self.name = name
        self.pattern = pattern
        self._ranks = ranks
        self._specials = specials
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, name: str = "trained") -> Tokenizer:
        """Learn merges from `texts`, read once, so that n_vocab == vocab_size (less when the texts have too few pairs to merge).

        Equal texts give equal merges, whatever the number of threads. Raises UserError on a vocabulary too small for the bytes.
        """
        import rustbpe

        smallest = N_BYTES + len(SPECIAL_TOKENS)
        if not smallest <= vocab_size <= MAX_ID:
            raise UserError(f"vocab_size={vocab_size} must lie between {smallest} (bytes and special tokens) and {MAX_ID}; try 32768")
        bpe = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs
        pieces = (piece for text in texts for piece in _pieces(text))
        bpe.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
        return cls(name, SPLIT_PATTERN, ranks, {special: len(ranks) + i for i, special in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def named(cls, name: str) -> Tokenizer:
        """An encoding that tiktoken knows, with SPECIAL_TOKENS appended. Fetched on first use; raises UserError if it cannot be."""
        known = tiktoken.list_encoding_names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"have {', '.join(known)}"
            raise UserError(f"tokenizer {name!r} is neither a .json file nor an encoding of tiktoken; {hint}")
        try:
            base = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a damaged download is a ValueError
            raise UserError(
                f"tokenizer {name} could not be fetched ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds it, "
                f"or give --tokenizer a tokenizer.json"
            ) from error
        # max_token_value and not the number of tokens: cl100k_base has unused ids between its special tokens.
        specials = {**base._special_tokens, **{s: base.max_token_value + 1 + i for i, s in enumerate(SPECIAL_TOKENS)}}
        return cls(name, base._pat_str, base._mergeable_ranks, specials)

    @classmethod
    def resolve(cls, spec: str) -> Tokenizer:
        """What --tokenizer means: a path when it ends in .json, holds a slash or is a file; else the name of an encoding."""
        is_path = spec.endswith(".json") or os.sep in spec or Path(spec).is_file()
        return cls.load(spec) if is_path else cls.named(spec)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises UserError naming the file and what is wrong with it."""
        path = Path(os.path.expanduser(path))
        try:
            # Where a link leads, if it is one: what is named on a command line may lie anywhere, but it is no pipe.
            saved = parse_json(read_regular(path.resolve(), LARGEST))
        except UserError as error:
            raise UserError(f"tokenizer {error}") from None
        except FileNotFoundError:
            raise UserError(f"tokenizer {path} does not exist; make one with `nanojax tokenizer train --out {path}`") from None
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}; {REMEDY}") from error
        except (ValueError, RecursionError):
            raise UserError(f"tokenizer {path} is not JSON; {REMEDY}") from None
        try:
            return cls(*_checked(saved))
        except UserError as error:
            raise UserError(f"tokenizer {path} {error}; {REMEDY}") from None
        except ValueError as error:  # tiktoken refuses the pattern
            raise UserError(f"tokenizer {path} has a split pattern that does not compile ({error}); {REMEDY}") from None

    def save(self, path: str | Path) -> None:
        """Write one self-contained JSON file, all or nothing. Raises StorageError."""
        text = json.dumps({**self._content, "name": self.name, "sha256": self.sha256}, indent=None)
        write_atomically(Path(os.path.expanduser(path)), text)

    @cached_property
    def _content(self) -> dict[str, Any]:
        """What defines the ids, as JSON: tokens by rank with bytes as Latin-1, so that a reader sees words; "" is an unused rank."""
        tokens = [""] * (max(self._ranks.values()) + 1)
        for token, rank in self._ranks.items():
            tokens[rank] = token.decode("latin-1")
        return {"format": FORMAT, "pattern": self.pattern, "tokens": tokens, "special_tokens": self._specials}

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, not of the name: equal hashes mean equal ids for every text."""
        return _digest(self._content)

    @property
    def n_vocab(self) -> int:
        """V: one more than the largest id, special tokens and gaps included."""
        return self._encoding.max_token_value + 1

    @property
    def bos(self) -> int:
        """The id that starts every document."""
        return self._specials["<|bos|>"]

    def special(self, name: str) -> int:
        """The id of a special token, such as '<|user_start|>'. Raises KeyError."""
        return self._specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of any text, without BOS. Special tokens spelled out in it are plain text; lone surrogates become U+FFFD."""
        if len(text) <= PIECE_CHARS:
            return self._encoding.encode_ordinary(text)
        return [token for piece in _pieces(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        """`encode` of each text, in order. The work is outside the GIL."""
        if max(map(len, texts), default=0) <= PIECE_CHARS:
            return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        split = [list(_pieces(text)) for text in texts]
        ids = iter(self._encoding.encode_ordinary_batch([piece for pieces in split for piece in pieces], num_threads=threads))
        return [[token for _ in pieces for token in next(ids)] for pieces in split]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 and ids that stand for no token become U+FFFD, since a model may sample either."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids: what a stream needs, where one character may span several tokens."""
        pieces = self._pieces_by_id
        return b"".join(pieces.get(int(i), NO_TOKEN) for i in ids)

    @cached_property
    def _pieces_by_id(self) -> dict[int, bytes]:
        pieces = {rank: token for token, rank in self._ranks.items()}
        return pieces | {i: special.encode() for special, i in self._specials.items()}

    def bytes_per_token(self) -> np.ndarray:
        """int32 [V]: length of each token in bytes; 0 for special tokens and gaps, so that they count for nothing in bits per byte."""
        lengths_V = np.zeros(self.n_vocab, np.int32)
        for token, rank in self._ranks.items():
            lengths_V[rank] = len(token)
        return lengths_V

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.pattern, self._ranks, self._specials)


REMEDY = "make a new one with `nanojax tokenizer train`"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, or leave what was there: temporary file beside it, then rename. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(temporary, 0o644)  # mkstemp makes files that nobody else may read
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        space = f" ({mb(len(content))} to write, {mb(free_bytes(path.parent))} free)" if error.errno in FULL else ""
        raise StorageError(
            f"cannot write {path}: {error.strerror}{space}; free space there, or choose a folder that can be written"
        ) from error


def clean(text: str) -> str:
    """The text with lone surrogates (JSON can spell them, UTF-8 cannot) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(text: str) -> Iterator[str]:
    """Cuts of at most PIECE_CHARS that join to the text, after a newline where one is near: there no token is cut in two."""
    text = clean(text)
    start = 0
    while len(text) - start > PIECE_CHARS:
        newline = text.rfind("\n", start + PIECE_CHARS // 2, start + PIECE_CHARS)
        stop = start + PIECE_CHARS if newline < 0 else newline + 1
        yield text[start:stop]
        start = stop
    yield text[start:]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checked(saved: Any) -> tuple[str, str, dict[bytes, int], dict[str, int]]:
    """(name, pattern, ranks, specials) of a file's JSON. Raises UserError with the rest of a sentence on the file.

    Nothing is trusted: tiktoken panics, past any `except Exception`, on a vocabulary that lacks a byte.
    """
    keys = {"format", "pattern", "tokens", "special_tokens", "name", "sha256"}
    if not isinstance(saved, dict) or set(saved) != keys:
        raise UserError(f"must hold exactly the keys {', '.join(sorted(keys))}")
    if saved["format"] != FORMAT:
        raise UserError(f"has the format {saved['format']!r}, this version reads {FORMAT!r}")
    tokens, specials = saved["tokens"], saved["special_tokens"]
    for key, kind in (("pattern", str), ("name", str), ("tokens", list), ("special_tokens", dict)):
        if not isinstance(saved[key], kind):
            raise UserError(f"must hold a {kind.__name__} as {key}, holds a {type(saved[key]).__name__}")
    if not all(isinstance(token, str) for token in tokens):
        raise UserError("holds a token that is not text")
    try:
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens) if token}
    except UnicodeEncodeError:
        raise UserError("holds a token that is not bytes in Latin-1") from None
    if len(ranks) != sum(map(bool, tokens)):
        raise UserError("holds a token twice")
    if missing := [byte for byte in range(N_BYTES) if bytes([byte]) not in ranks]:
        raise UserError(f"lacks a token for byte {missing[0]}")
    _check_specials(specials, tokens)
    if (found := _digest({key: saved[key] for key in keys - {"name", "sha256"}})) != saved["sha256"]:
        raise UserError(f"was altered: its content has SHA-256 {found[:16]}..., it states {str(saved['sha256'])[:16]}...")
    return saved["name"], saved["pattern"], ranks, specials


def _check_specials(specials: dict[str, Any], tokens: list[str]) -> None:
    """Each of SPECIAL_TOKENS is there; ids are integers that nothing else has."""
    if absent := [special for special in SPECIAL_TOKENS if special not in specials]:
        raise UserError(f"lacks the special token {absent[0]}")
    taken = {rank for rank, token in enumerate(tokens) if token}
    for special, i in specials.items():
        if type(i) is not int or not 0 <= i < MAX_ID:
            raise UserError(f"gives {special} the id {i!r}, which is no integer in [0, {MAX_ID})")
        if i in taken:
            raise UserError(f"gives {special} the id {i}, which is taken")
        taken.add(i)
