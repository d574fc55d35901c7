"""What a profiled run leaves beside its trace, so that the trace can be read without it: the step's program and its sizes."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

from nanojax.checks import check_types, require_positive
from nanojax.errors import UserError

PROGRAM, ABOUT = "step.hlo.gz", "about.json"
LONGEST_PROGRAM = 2**29  # characters; a step of 32 layers has some 2^24


@dataclasses.dataclass(frozen=True)
class About:
    """Of the step that was traced."""

    device: str
    """Kind of one device."""
    devices: int
    steps: int
    """That were traced."""
    tokens: int
    """Of a step."""
    flops: float
    """Of a step, by formula (sizes.flops_per_token), on all devices."""
    xla_flops: float | None
    """Of one device, by XLA's cost analysis, which counts the body of a loop once."""
    xla_bytes: float | None
    peak_flops: float | None
    """FLOP/s of all devices together, in dense bf16."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                require_positive(name, value)


def about_step(compiled: Any, **known: Any) -> About:
    """`known` are the fields that the compiler does not know."""
    costs = compiled.cost_analysis() or {}
    return About(xla_flops=costs.get("flops") or None, xla_bytes=costs.get("bytes accessed") or None, **known)


def write_record(folder: Path, about: About, program: str) -> None:
    """Into the folder of the trace."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_bytes(gzip.compress(program.encode(), compresslevel=3))
    (folder / ABOUT).write_text(json.dumps(dataclasses.asdict(about), indent=1) + "\n")


def read_record(folder: Path) -> tuple[About, str] | None:
    """(sizes, program) of the trace in a folder; None where no run wrote them. Raises UserError where they cannot be read."""
    if not (folder / ABOUT).exists():
        return None
    try:
        fields = json.loads((folder / ABOUT).read_text())
        with gzip.open(folder / PROGRAM, "rt") as file:
            program = file.read(LONGEST_PROGRAM + 1)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{folder} has a record of its program that cannot be read ({error}); profile again") from error
    names = {field.name for field in dataclasses.fields(About)}
    if not isinstance(fields, dict) or set(fields) != names:
        raise UserError(f"{folder / ABOUT} must have the fields {', '.join(sorted(names))}; profile again")
    if len(program) > LONGEST_PROGRAM:
        raise UserError(f"{folder / PROGRAM} holds more than {LONGEST_PROGRAM:,} characters, which no step has; profile again")
    try:
        return About(**fields), program
    except UserError as error:
        raise UserError(f"{folder / ABOUT} must hold what a run writes, and {str(error).split(';')[0]}; profile again") from error
