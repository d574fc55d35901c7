"""`nanojax sample RUN --prompt ...`: continue a text."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from nanojax.checks import LARGEST, check_types
from nanojax.cli import POSITIONAL, RUN, parse
from nanojax.errors import UserError
from nanojax.infer.load import open_source
from nanojax.infer.params import SamplingParams
from nanojax.tokenizer import clean

if TYPE_CHECKING:
    from nanojax.infer.engine import Engine

SEPARATOR = "-" * 16
ROWS = 64  # samples at once, at most: each has a cache of its own


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """What `nanojax sample` takes."""

    run: Annotated[str, POSITIONAL, RUN]
    """Folder of a training run, or of an export."""
    prompt: str = ""
    """Text to continue. Empty: start a new document."""
    tokens: int = 200
    """Most tokens to add; the end of the document ends it earlier."""
    temperature: float = 0.8
    """0 takes the likeliest token each time; 1 samples the model's own distribution."""
    top_k: int = 50
    """Sample among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that have this probability together; 1: among all."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest; 0: among all."""
    seed: int = 0
    """Seed of the sampling; of several samples each has the next."""
    n: int = 1
    """Samples of the prompt. One is printed as it is made, several in groups, each when all of it is."""
    cache: str | None = None
    """Folder for compiled programs. Derived: the run's own; of an export, the default one."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.n < 1:
            raise UserError(f"n={self.n} must be at least 1; try 1")
        self.params(0)
        if self.seed + self.n > LARGEST:
            raise UserError(
                f"seeds must be below {LARGEST}, and with seed={self.seed} and n={self.n} the last is {self.seed + self.n - 1}; "
                f"try --seed {max(0, LARGEST - self.n)}"
            )

    def params(self, i: int) -> SamplingParams:
        """Of sample number i."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed + i,
            tokens=self.tokens,
        )


def main(argv: Sequence[str]) -> None:
    """Print the prompt and its continuation, as it is made."""
    command = parse(SampleCommand, argv, prog="nanojax sample", description=main.__doc__ or "")
    source = open_source(Path(command.run), cache=command.cache)

    import jax

    from nanojax.infer.engine import Engine
    from nanojax.program import out_of_memory_told

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    with out_of_memory_told("try fewer samples with --n, a shorter --prompt, or an export in 4 bits"):
        engine = Engine(source.load(jax.devices()[:1], packed=True), source.tokenizer)
        if engine.program.platform == "gpu":
            print(f"nanojax: {engine.path.words}", file=sys.stderr)
        for text in samples(engine, command):
            sys.stdout.write(text)
            sys.stdout.flush()


def samples(engine: Engine, command: SampleCommand) -> Iterator[str]:
    """All that is printed, as it is made. That a text filled the context goes to stderr."""
    prompt, tokenizer = clean(command.prompt), engine.tokenizer
    if command.n == 1:
        stream = engine.stream(prompt, command.params(0))  # refused here, before the prompt is printed
        yield prompt
        finishes = [(yield from stream)]
    else:
        finishes = []
        for first in range(0, command.n, ROWS):
            rows = [command.params(i) for i in range(first, min(first + ROWS, command.n))]
            pieces = engine.generate([engine.encode(prompt)] * len(rows), rows)
            yield f"\n{SEPARATOR}\n" if first else ""
            yield f"\n{SEPARATOR}\n".join(prompt + tokenizer.decode(piece.tokens) for piece in pieces)
            finishes += [piece.finish for piece in pieces]
    yield "\n"
    if "context" in finishes:
        note = (
            f"the text ends where the context does, at seq_len={engine.context} tokens with the prompt; more needs a model of longer rows"
        )
        print(f"nanojax: {note}", file=sys.stderr)
