"""The verbs `nanojax tokenizer` and `nanojax data`: results on stdout, the log on stderr."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nanojax.cli import parse
from nanojax.config import DataConfig
from nanojax.data import corpus, shards
from nanojax.data.download import DATASETS, download
from nanojax.errors import UserError
from nanojax.tokenizer import Tokenizer

SAMPLE_CHARS = 1_000_000  # of each split, in `tokenizer eval`
OTHERS = ("gpt2", "cl100k_base")
SAMPLES = {
    "news": (
        "The harbour authority said on Tuesday that the new ferry terminal would open in late October, seven months behind schedule "
        'and roughly $14 million over budget. "We would rather be late than wrong," its director, Ingrid Halvorsen, told reporters. '
        "Residents of the northern islands, who have relied on a single ageing vessel since 2019, gave the announcement a mixed welcome; "
        "several asked why the ticket price, now 38.50 for a return trip, had to rise by a fifth before a single new boat had sailed.\n"
    ),
    "code": (
        "from collections import defaultdict\n\n\ndef group_by_length(words, *, minimum=3):\n"
        '    """Map each length to the sorted words that have it."""\n    groups = defaultdict(list)\n    for word in words:\n'
        "        if len(word) >= minimum and word.isalpha():\n            groups[len(word)].append(word.lower())\n"
        "    return {size: sorted(set(found)) for size, found in groups.items()}\n\n\n"
        'if __name__ == "__main__":\n    print(group_by_length(open("words.txt").read().split()))\n'
    ),
    "math": (
        "Let $f(x) = \\sum_{k=0}^{\\infty} a_k x^k$ converge for $|x| < R$. Then $f'(x) = \\sum_{k=1}^{\\infty} k a_k x^{k-1}$ on the "
        "same interval, since $\\limsup_{k \\to \\infty} \\sqrt[k]{k |a_k|} = 1/R$. For $a_k = 1/k!$ we get $f' = f$, and with "
        "$f(0) = 1$ it follows that $f(1) = e \\approx 2.718281828$; the error after ten terms is below $3 \\times 10^{-7}$.\n"
    ),
    "German": (
        "Am Morgen lag dichter Nebel über dem Fluss, und die Fähre fuhr mit zwanzig Minuten Verspätung ab. Die Schülerinnen störte das "
        "wenig: Sie saßen auf ihren Rucksäcken, tauschten Pausenbrote und überlegten, ob die Prüfung wohl ausfallen würde. »Nur wenn der "
        "Lehrer auch auf diesem Schiff ist«, sagte eine, und tatsächlich trat er in diesem Augenblick aus der Kajüte.\n"
    ),
    "Korean": (
        "아침 안개가 강을 덮어 배가 이십 분 늦게 떠났다. 학생들은 가방 위에 앉아 도시락을 나누어 먹으며 오늘 시험이 취소될지 이야기했다. "
        "그때 선생님이 선실에서 나오셨고, 모두가 웃음을 터뜨렸다.\n"
    ),
}

USAGE = {
    "tokenizer": (
        "usage: nanojax tokenizer train [--vocab-size N] [--out FILE] [--data.path DIR ...]   learn a vocabulary from a corpus\n"
        "       nanojax tokenizer eval [--tokenizer FILE|NAME] [--data.path DIR ...]           bytes per token, beside gpt2 and cl100k_base"
    ),
    "data": (
        "usage: nanojax data download NAME [-n N] [--out DIR]                           fetch shards; NAME: " + ", ".join(DATASETS) + "\n"
        "       nanojax data prepare [--vocab-size N] [--tokenizer ...] [--data.path DIR ...]  tokenise into the cache"
    ),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerTrain:
    """What `nanojax tokenizer train` takes."""

    vocab_size: int = 32768
    """Tokens, the nine special ones included."""
    out: str = "tokenizer.json"
    """File to write."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """What `nanojax data prepare` takes."""

    vocab_size: int = 32768
    """Tokens of the vocabulary that is trained when --tokenizer names none."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class Download:
    """What `nanojax data download` takes."""

    n: int = 8
    """Training shards, of about 250 million characters each; the validation shard comes on top."""
    out: str | None = None
    """Folder to fill. Derived: the data set's name."""
    workers: int = 4
    """Files fetched at a time."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers={self.workers} must be above 0; try --workers 4")


def tokenizer_main(argv: Sequence[str]) -> None:
    """`nanojax tokenizer train|eval ...`."""
    _dispatch("tokenizer", argv, {"train": _tokenizer_train, "eval": _tokenizer_eval})


def data_main(argv: Sequence[str]) -> None:
    """`nanojax data download|prepare ...`."""
    _dispatch("data", argv, {"download": _data_download, "prepare": _data_prepare})


def _dispatch(verb: str, argv: Sequence[str], verbs: dict[str, Callable[[Sequence[str]], None]]) -> None:
    """Run the sub-verb that argv names first. Raises UserError when it names none of them."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE[verb])
        return
    if not argv or argv[0].startswith("-"):
        raise UserError(f"nanojax {verb} needs one of {', '.join(verbs)}; see nanojax {verb} --help")
    if argv[0] not in verbs:
        raise UserError(f"unknown command nanojax {verb} {argv[0]}; {_suggestion(argv[0], verbs)}")
    verbs[argv[0]](argv[1:])


def _suggestion(given: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt word: the one that was meant, or all there are."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else f"have {', '.join(known)}"


def _tokenizer_train(argv: Sequence[str]) -> None:
    args = parse(TokenizerTrain, argv, prog="nanojax tokenizer train", description="Learn a byte pair vocabulary from a corpus.")
    if args.data.tokenizer is not None:
        raise UserError(
            f"`tokenizer train` makes a new one, given --tokenizer {args.data.tokenizer}; drop it, or `nanojax tokenizer eval` it"
        )
    tokenizer = shards.train_tokenizer(args.data, args.vocab_size)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.n_vocab:,} tokens, SHA-256 {tokenizer.sha256}")


def _tokenizer_eval(argv: Sequence[str]) -> None:
    args = parse(
        Prepare, argv, prog="nanojax tokenizer eval", description="Bytes per token of a tokenizer, beside gpt2's and cl100k_base's."
    )
    ours = shards.tokenizer_of(args.data, args.vocab_size, _log)
    compared = {args.data.tokenizer or "trained": ours}
    for name in OTHERS:
        if name not in compared:
            try:
                compared[name] = Tokenizer.named(name)
            except UserError as error:
                _log(f"without {name}: {error}")
    texts = dict(SAMPLES) | {split: "".join(_first(corpus.documents(args.data, split), SAMPLE_CHARS)) for split in ("train", "val")}
    rows = [["bytes per token", *compared]]
    for label, text in texts.items():
        size = len(text.encode())
        rows.append([f"{label} ({size:,} bytes)", *(f"{size / len(tokenizer.encode(text)):.2f}" for tokenizer in compared.values())])
    rows.append(["vocabulary", *(f"{tokenizer.n_vocab:,}" for tokenizer in compared.values())])
    _print_table(rows)


def _first(texts: Iterable[str], chars: int) -> Iterable[str]:
    """The first `chars` characters of a stream of documents."""
    for text in texts:
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            return


def _print_table(rows: list[list[str]]) -> None:
    """Plain columns, the first flush left: a terminal shows them and a script can cut them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]))


def _data_download(argv: Sequence[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        parse(Download, argv, prog="nanojax data download NAME", description=f"Fetch shards of NAME: {', '.join(DATASETS)}.")
    if not argv or argv[0].startswith("-"):
        raise UserError(f"nanojax data download needs a name, one of {', '.join(DATASETS)}; try `nanojax data download fineweb-edu -n 8`")
    name = argv[0]
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; {_suggestion(name, DATASETS)}")
    flags = ["--n" + arg[2:] if arg == "-n" or arg.startswith("-n=") else arg for arg in argv[1:]]
    args = parse(Download, flags, prog="nanojax data download NAME", description=f"Fetch shards of NAME: {', '.join(DATASETS)}.")
    folder = download(name, args.n, args.out or name, args.workers, _log)
    print(f"{folder}: {args.n} training shards and the validation shard; use them with --data.path {folder}")


def _data_prepare(argv: Sequence[str]) -> None:
    args = parse(Prepare, argv, prog="nanojax data prepare", description="Tokenise a corpus into the cache, where training finds it.")
    prepared = shards.prepare(args.data, args.vocab_size, _log)
    rows = [["split", "documents", "tokens", "text bytes", "text SHA-256"]]
    for store in (prepared.train, prepared.val):
        rows.append([store.split, f"{store.documents:,}", f"{store.tokens:,}", f"{store.text_bytes:,}", store.text_sha256[:16]])
    _print_table(rows)
    print(f"bytes per token: {prepared.bytes_per_token:.3f}")
    print(f"tokenizer: {prepared.tokenizer.n_vocab:,} tokens, SHA-256 {prepared.tokenizer.sha256}")
    print(f"corpus: fingerprint {prepared.fingerprint}")
    print(f"folder: {prepared.folder}")


def _log(line: str) -> None:
    print(line, file=sys.stderr)
