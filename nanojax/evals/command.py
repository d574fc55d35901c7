"""`nanojax eval RUN`: the validation figure of a run, computed again from its newest checkpoint, or of an export."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanojax.checks import check_types, require_positive
from nanojax.cli import DATA_GLOB, DATA_PATH, POSITIONAL, RUN, parse
from nanojax.config import Attention
from nanojax.errors import NonFiniteError


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """What `nanojax eval` takes."""

    run: Annotated[str, POSITIONAL, RUN]
    """Folder of a training run, or of an export."""
    eval_tokens: int | None = None
    """Validation tokens. Derived: as many as the run's own."""
    path: Annotated[str | None, DATA_PATH] = None
    """Folder of text to take instead of the run's (data.path)."""
    glob: Annotated[str | None, DATA_GLOB] = None
    """Pattern of files below that folder, each a document (data.glob)."""
    cache: str | None = None
    """Folder for token shards, packing plans and compiled programs. Derived: the run's own; of an export, the default one."""
    attn_impl: Attention = "auto"
    """Attention backend."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.eval_tokens is not None:
            require_positive("eval_tokens", self.eval_tokens)


def main(argv: Sequence[str]) -> None:
    """Print bits per byte on the validation documents."""
    command = parse(EvalCommand, argv, prog="nanojax eval", description=main.__doc__ or "")

    from nanojax.data.shards import prepare
    from nanojax.infer.load import open_source

    source = open_source(Path(command.run), attn_impl=command.attn_impl, cache=command.cache)
    config = source.config
    data, train = config.data, dataclasses.replace(config.train, eval_tokens=command.eval_tokens or config.train.eval_tokens)
    if command.path is not None or command.glob is not None:
        data = dataclasses.replace(data, path=command.path or data.path, glob=command.glob)
    source = dataclasses.replace(source, config=dataclasses.replace(config, data=data, train=train))
    prepared = prepare(data, config.model.vocab_size, print)

    import jax

    from nanojax.evals.bpb import validator

    model = source.load()
    with jax.set_mesh(model.program.mesh):
        result = validator(model.program, prepared)(model.weights)
    if not math.isfinite(result.bpb) or not math.isfinite(result.loss):
        raise NonFiniteError(
            f"the loss of a model must be finite, and that of {command.run} at step {model.step} is {result.loss} nats a token, "
            "its weights damaged or diverged; move that checkpoint away to take an older one, or train again"
        )
    print(
        f"step {model.step}: {result.bpb:.6f} bits per byte, {result.loss:.6f} nats a token, "
        f"{result.targets:,} tokens, attention {model.program.attention}, precision {model.precision}"
    )
