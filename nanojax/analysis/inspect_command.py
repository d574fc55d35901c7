"""`nanojax inspect`: where the time of a traced step went, what changed between two, or what a config compiles to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from nanojax.analysis.trace import trace_file
from nanojax.checks import check_types
from nanojax.cli import FLAT, POSITIONAL, parse, split_preset
from nanojax.config import Config
from nanojax.errors import UserError

if TYPE_CHECKING:
    from nanojax.analysis.profile import Profile
    from nanojax.analysis.record import About

PICTURE, PICTURES = "step.png", (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class InspectTraces:
    """What `nanojax inspect` takes of runs and traces."""

    what: Annotated[str, POSITIONAL]
    """Folder of a run that was trained with --profile, or of any trace of XLA's; or PRESET.py, then with the flags of nanojax train."""
    other: Annotated[str | None, POSITIONAL] = None
    """A second one: what takes longer there."""
    top: int = 20
    """Kernels to list."""
    steps: int | None = None
    """Steps in the trace. Derived: what the run wrote beside it, else how often the rarest kernel ran."""
    picture: str | None = None
    """File of the picture (.png, .svg). Derived: step.png beside the trace."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.top < 1 or (self.steps is not None and self.steps < 1):
            raise UserError(f"--top and --steps are at least 1, given {self.top} and {self.steps}; leave them out for the defaults")
        if self.picture is not None and Path(self.picture).suffix not in PICTURES:
            raise UserError(f"--picture is a file that ends in {', '.join(PICTURES)}, given {self.picture!r}; try step.png")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What `nanojax inspect PRESET.py` takes."""

    config: Annotated[Config, FLAT] = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """Say where the time of a step went, from a trace, or what a config compiles to."""
    if argv and argv[0].endswith(".py"):
        inspect_config(argv)
        return
    command = parse(InspectTraces, argv, prog="nanojax inspect", description=main.__doc__ or "")

    folder = trace_folder(command.what)  # said before seconds of imports, where there is none
    beside = None if command.other is None else trace_folder(command.other)

    from nanojax.analysis.picture import draw
    from nanojax.analysis.report import comparison, report

    profile, about = profiled(folder, command.steps)
    if beside is not None:
        other, _ = profiled(beside, command.steps)
        print(comparison(profile, other, (command.what, str(command.other)), command.top))
        return
    steps = "1 step" if profile.steps == 1 else f"{profile.steps} steps"
    title = f"{command.what}: {1e3 * profile.wall:.1f} ms a step by the device's clock, over {steps}"
    print(f"{title}\n\n{report(profile, about, command.top)}\n")
    print(draw(profile, Path(command.picture) if command.picture else folder / PICTURE, title))


def trace_folder(text: str) -> Path:
    """That of a run, or the one that is named."""
    folder = Path(text)
    if not folder.is_dir():
        raise UserError(f"inspect takes the folder of a run or a trace, or a preset, and {text!r} is none; try nanojax inspect runs/d12")
    folder = folder / "profile" if (folder / "config.json").exists() else folder
    trace_file(folder)
    return folder


def profiled(folder: Path, steps: int | None) -> tuple[Profile, About | None]:
    """The profile of a trace, and what its run wrote beside it."""
    from nanojax.analysis.hlo import read_program
    from nanojax.analysis.profile import make_profile
    from nanojax.analysis.record import read_record
    from nanojax.analysis.trace import read_trace

    kernels, record = read_trace(folder), read_record(folder)
    if record is None:
        return make_profile(kernels, [], steps), None
    about, text = record
    try:
        ops = read_program(text)
    except ValueError as error:
        raise UserError(f"{folder} has a record of a program that cannot be read ({error}); profile again") from error
    return make_profile(kernels, ops, steps or about.steps), about


def inspect_config(argv: Sequence[str]) -> None:
    """Compile the step of a config for the devices there are, and say what it is."""
    preset, rest = split_preset(argv)
    words = dict(prog="nanojax inspect [PRESET.py]", description=inspect_config.__doc__ or "")
    config = parse(InspectConfig, rest, default=InspectConfig(config=preset), **words).config

    from nanojax.analysis.compiled import facts
    from nanojax.analysis.report import table
    from nanojax.program import keep_compiled_programs, make_program
    from nanojax.sizes import resolve

    keep_compiled_programs(config.data.cache)
    program = make_program(resolve(config, config.model.vocab_size))
    print(table(facts(program, program.compile_step()).items()))
