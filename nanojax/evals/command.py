"""`nanojax eval RUN`: the validation figure of a finished or interrupted run, computed again from its newest checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanojax.checks import check_types, require_positive
from nanojax.cli import POSITIONAL, parse
from nanojax.config import Attention


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """What `nanojax eval` takes."""

    run: Annotated[str, POSITIONAL]
    """Folder of a training run."""
    eval_tokens: int | None = None
    """Validation tokens. Derived: as many as the run's own."""
    path: str | None = None
    """Folder of text to take instead of the run's (data.path)."""
    glob: str | None = None
    """Pattern of files below that folder, each a document (data.glob)."""
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
    from nanojax.runs import RunFolder

    folder = RunFolder(Path(command.run))
    config, _ = folder.read()
    folder.require_checkpoint()
    folder.tokenizer()
    data = dataclasses.replace(config.data, tokenizer=str(folder.path / "tokenizer.json"))
    if command.path is not None or command.glob is not None:
        data = dataclasses.replace(data, path=command.path or data.path, glob=command.glob)
    train = dataclasses.replace(
        config.train, mesh="", micro_batch=None, attn_impl=command.attn_impl, eval_tokens=command.eval_tokens or config.train.eval_tokens
    )
    config = dataclasses.replace(config, data=data, train=train)
    prepared = prepare(config.data, config.model.vocab_size, print)

    import jax

    from nanojax.checkpoint import Checkpoints
    from nanojax.evals.bpb import validator
    from nanojax.program import keep_compiled_programs, make_program

    keep_compiled_programs(config.data.cache)
    program = make_program(config)
    checkpoints = Checkpoints(folder.checkpoints)
    phase = program.phase(checkpoints.latest or 0)
    with jax.set_mesh(program.mesh):
        params = checkpoints.restore_params(program.shapes.params, program.shardings.params)
        result = validator(program, prepared)(phase.prepare(params))
    print(
        f"step {checkpoints.latest}: {result.bpb:.6f} bits per byte, {result.loss:.6f} nats a token, "
        f"{result.targets:,} tokens, attention {program.attention}, precision {phase.precision}"
    )
    checkpoints.close()
