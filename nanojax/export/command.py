"""`nanojax export RUN OUT`: the newest checkpoint of a run as safetensors, in bf16 or packed in 4 bits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nanojax.checks import check_types
from nanojax.cli import OUT, POSITIONAL, RUN, parse
from nanojax.config import Config
from nanojax.errors import UserError
from nanojax.export import layout
from nanojax.export.folder import is_export, require_new
from nanojax.formats import FORMATS
from nanojax.runs import RunFolder, unplaced
from nanojax.sizes import count_parameters

ExportFormat = Literal["auto", "bf16", "int4", "nvfp4", "nvfp4_2d", "mxfp4"]


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """What `nanojax export` takes."""

    run: Annotated[str, POSITIONAL, RUN]
    """Folder of a training run."""
    out: Annotated[str, POSITIONAL, OUT]
    """Folder to write, which must be new or empty."""
    format: ExportFormat = "auto"
    """Of the matrices of the blocks; the rest is bf16. auto: what the run was trained in, whose very codes are written."""
    int4_group: Literal[64, 128, 256] | None = None
    """Weights that share a scale in int4. Derived: as in the run's own config."""
    cache: str | None = None
    """Folder for compiled programs. Derived: the run's own."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.int4_group is not None and self.format != "int4":
            raise UserError(f"int4_group={self.int4_group} needs --format int4, given {self.format}; the other formats' blocks are fixed")


@dataclass(frozen=True)
class Target:
    """The format of an export, and how it comes from what the run was trained in."""

    format: str
    int4_group: int | None
    rule: str
    """mxfp4's scale rule: training's own where its codes are written, else the one with the smaller error."""
    words: str


def choose(config: Config, command: ExportCommand, trained: str) -> Target:
    """The target for a run that was trained in the format `trained`. The run's own format gives the run's own codes."""
    format = command.format
    if format == "auto":
        format = trained if trained in FORMATS else "bf16"
    group = (command.int4_group or config.train.int4_group) if format == "int4" else None
    if format == "bf16":
        return Target(format, None, "", "bf16" if trained == "bf16" else f"bf16, rounded from the master weights of a run in {trained}")
    if format == trained and group in (None, config.train.int4_group):
        return Target(format, group, "ceil", f"{format}, the codes that the run was trained with")
    was = f"{trained} in groups of {config.train.int4_group}" if trained == "int4" else trained
    return Target(format, group, "even", f"{format}, post-training quantisation, trained in {was}")


def require_fit(config: Config, command: ExportCommand) -> None:
    """Raise UserError unless the blocks of the format that is asked for divide the matrices of the run, naming those that do."""

    def misfit(format: str) -> UserError | None:
        try:
            layout.quantized_config(config, format, (command.int4_group or config.train.int4_group) if format == "int4" else None)
        except UserError as error:
            return error
        return None

    if command.format in FORMATS and (error := misfit(command.format)):
        rule = str(error).split("; the nearest")[0]
        others = ["bf16", *(format for format in FORMATS if misfit(format) is None)]
        groups = re.findall("--int4-group [0-9]+", str(error))
        remedies = " or ".join([*groups, f"--format {'|'.join(others)}"])
        raise UserError(f"{rule}; for this run's sizes try {remedies}") from error


def main(argv: Sequence[str]) -> None:
    """Write the newest checkpoint of a run as safetensors that `nanojax eval` and `nanojax sample` take in place of the run."""
    command = parse(ExportCommand, argv, prog="nanojax export", description=main.__doc__ or "")
    folder, out = RunFolder(Path(command.run)), Path(command.out)
    if is_export(folder.path):
        raise UserError(f"RUN must be the folder of a training run, and {folder.path} is an export; give the run that it was made from")
    config, hashes = folder.read()
    folder.require_checkpoint()
    tokenizer = folder.tokenizer()
    require_fit(config, command)
    if folder.path.resolve() in out.resolve().parents:
        raise UserError(f"an export gets a folder of its own, and {out} lies in that of the run; give another OUT")
    require_new(out)

    import jax

    from nanojax.checkpoint import PARAMS, Checkpoints
    from nanojax.export.write import tensors_of, write_export
    from nanojax.precision import Rounding
    from nanojax.program import keep_compiled_programs, make_program

    keep_compiled_programs(command.cache or config.data.cache)
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.verify(4 * count_parameters(config.model).total, PARAMS)
    program = make_program(unplaced(config), jax.devices()[:1])
    params = checkpoints.finite_params(program.shapes.params, program.shardings.params)
    step = checkpoints.latest or 0  # now that damaged ones are known
    checkpoints.close()
    target = choose(config, command, program.phase(step).precision)
    rounding = None
    if target.format in FORMATS:
        whole = layout.quantized_config(config, target.format, target.int4_group)
        rounding = dataclasses.replace(Rounding.of(whole, target.format), rule=target.rule)
    packed = rounding.names(params) if rounding else []
    tensors = tensors_of(params, config.model, rounding)
    own = {"config": config.to_dict(), "format": target.format, "int4_group": target.int4_group, "step": step, **hashes}
    record: dict[str, Any] = {"model_type": "nanojax", "dtype": "bfloat16"}
    if rounding:
        record["quantization_config"] = layout.quantization_config(config.model, packed, target.format, rounding.block)
    write_export(out, tensors, tokenizer, record | {"nanojax": own})
    summarise(out, f"step {step} of {folder.path} as {target.words}", tensors, packed, config)


def summarise(out: Path, what: str, tensors: dict[str, Any], packed: Sequence[str], config: Config) -> None:
    """Say what was written, and how large it is."""
    known = layout.parameters(config.model)
    print(what)
    if packed:
        weights = sum(known[name].shape[0] * known[name].shape[1] for name in packed)
        modules = tuple(f"{known[name].module}." for name in packed)
        size = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(modules))
        print(f"{len(packed)} matrices packed, {weights:,} weights at {size / weights:.4f} bytes each, scales included; the rest is bf16")
    total = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {len(tensors)} tensors, {total:,} bytes; see it with: nanojax sample {out}")
