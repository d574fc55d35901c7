"""`nanojax sample RUN --prompt ...`: continue a text, one whole forward pass a token."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanojax.checks import check_types
from nanojax.cli import POSITIONAL, RUN, parse
from nanojax.errors import UserError
from nanojax.infer.load import Source, open_source
from nanojax.infer.text import utf8_stream
from nanojax.tokenizer import clean


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
    seed: int = 0
    """Seed of the sampling."""
    cache: str | None = None
    """Folder for compiled programs. Derived: the run's own; of an export, the default one."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:  # what float32 logits bear
            raise UserError(f"temperature={self.temperature} must be 0 or from 0.01 to 100; try 0.8")
        for name in ("tokens", "top_k", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")


def main(argv: Sequence[str]) -> None:
    """Print the prompt and its continuation, as it is made."""
    command = parse(SampleCommand, argv, prog="nanojax sample", description=main.__doc__ or "")

    source = open_source(Path(command.run), cache=command.cache)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    sys.stdout.write(clean(command.prompt))
    for text in utf8_stream(source.tokenizer.decode_bytes([token]) for token in generate(source, command)):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()


def generate(source: Source, command: SampleCommand) -> Iterator[int]:
    """Tokens that follow the prompt, until <|bos|> starts another document."""
    import jax
    import jax.numpy as jnp

    from nanojax.model import merge

    tokenizer = source.tokenizer
    model = source.load(jax.devices()[:1])  # a row of one prompt gives others nothing to do
    window, n_vocab = source.config.model.seq_len, tokenizer.n_vocab

    @jax.jit
    def next_token(weights, row_T, last, key):
        gpt = merge(model.program.graph, weights)
        x_BD = gpt.hidden(row_T[None])[:, last]
        logits_V = gpt.logits(x_BD)[0, :n_vocab]  # not the padding of the vocabulary
        if command.top_k:
            floor = jax.lax.top_k(logits_V, min(command.top_k, n_vocab))[0][-1]
            logits_V = jnp.where(logits_V < floor, -jnp.inf, logits_V)
        if command.temperature == 0:
            return jnp.argmax(logits_V)
        return jax.random.categorical(key, logits_V / command.temperature)

    with jax.set_mesh(model.program.mesh):
        ids = [tokenizer.bos, *tokenizer.encode(command.prompt)]
        key = jax.random.key(command.seed)
        for n in range(command.tokens):
            row = ids[-window:]
            padded = jnp.array(row + [tokenizer.bos] * (window - len(row)), jnp.int32)
            token = int(next_token(model.weights, padded, len(row) - 1, jax.random.fold_in(key, n)))
            if token == tokenizer.bos:
                return
            ids.append(token)
            yield token
