"""Kills a run again and again and looks whether anything is lost.   python scripts/bench/chaos.py PRESET.py --kills 40 --out chaos

A reference run is left alone. Then the same run is started, killed with SIGKILL at a moment that is aimed at, and gone on with, until it
ends; its last state must have the hash of the reference's. Short runs that save often are killed in more places.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanojax.checks import require_positive, require_share
from nanojax.cli import parse
from nanojax.errors import NanoJaxError, UserError, run_main
from nanojax.launch import die_along
from nanojax.manifest import NAME, complete_steps
from nanojax.runs import RunFolder

PHASES = ("start", "steps", "save", "commit")
PATIENCE = 600  # seconds that a process may take to reach a moment


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """How often, and where."""

    out: str = "chaos"
    """Folder for the runs. It must not exist."""
    kills: int = 40
    """In all: as many at the start (imports, compiling, restoring), between steps, in a save, just after one."""
    flips: float = 0.2
    """Share of the kills after which a bit of the newest checkpoint is flipped, if there is an older one."""
    seed: int = 0
    """Of the moments."""
    prelude: str | None = None
    """Python that each process runs first: for trying out what this would miss."""
    flags: tuple[str, ...] = ()
    """For `nanojax train`, after all others."""

    def __post_init__(self) -> None:
        require_positive("kills", self.kills)
        require_share("flips", self.flips)


def main(argv: Sequence[str]) -> None:
    """Print each kill and its phase, then whether all hashes agree. Fails with exit code 1 where one does not."""
    preset = argv[:1] if argv and argv[0].endswith(".py") else []
    chaos = parse(Chaos, argv[len(preset) :], prog="chaos.py [PRESET.py]", description=main.__doc__ or "", default=Chaos())
    rng, out = random.Random(chaos.seed), Path(chaos.out)
    if out.exists():
        raise UserError(f"--out must be a folder that is not there yet, given {out}; give another, or remove it")
    print(f"nanojax train {' '.join([*preset, *chaos.flags]) or 'without a preset: the default model'}", flush=True)
    command = [*child(chaos.prelude), *preset, *chaos.flags]
    began = time.monotonic()
    reference = finish(command, out / "reference", [])
    print(f"reference: {reference[:16]}, {time.monotonic() - began:.0f} s", flush=True)
    aims = [phase for phase in PHASES for _ in range(-(-chaos.kills // len(PHASES)))][: chaos.kills]
    rng.shuffle(aims)
    hashes, hit = [], Counter()
    while aims:
        folder = out / str(len(hashes))
        while aims:
            phase, step = struck(command, folder, aims[-1], rng)
            if phase is None:
                break  # it ended before the moment came
            aims.pop()
            hit[phase] += 1
            harm = flipped(folder / "checkpoints", rng) if rng.random() < chaos.flips else ""
            print(f"kill {sum(hit.values())}: run {len(hashes)}, {phase}, newest checkpoint {step}{harm}", flush=True)
        hashes.append(finish(command, folder, resuming(folder)))
        print(f"run {len(hashes) - 1} ended: {hashes[-1][:16]}, {'equal' if hashes[-1] == reference else 'NOT EQUAL'}", flush=True)
    wrong = sum(each != reference for each in hashes)
    print(
        ", ".join(f"{hit[phase]} in phase {phase}" for phase in PHASES)
        + f"; {len(hashes) - wrong} of {len(hashes)} runs equal the reference"
    )
    if wrong:
        raise NanoJaxError(f"{wrong} of {len(hashes)} runs that were killed ended in another state than the reference; look into {out}")


def child(prelude: str | None) -> list[str]:
    """`nanojax train`, after a prelude."""
    if prelude is None:
        return [sys.executable, "-m", "nanojax.train"]
    words = f"import runpy; runpy.run_path({prelude!r}); from nanojax.errors import run_main; from nanojax.train import main; import sys; "
    return [sys.executable, "-c", words + "run_main(main, sys.argv[1:])"]


def resuming(folder: Path) -> list[str]:
    """A run that has no checkpoint yet begins again."""
    return ["--resume"] if RunFolder(folder).has_checkpoint else []


def finish(command: list[str], folder: Path, flags: list[str]) -> str:
    """Hash of the last state of a run that nobody disturbs."""
    done = subprocess.run([*command, "--out", str(folder), *flags], capture_output=True, text=True, check=False, preexec_fn=die_along)
    if done.returncode:
        raise NanoJaxError(f"an undisturbed run ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}; look into {folder}")
    return json.loads((folder / "summary.json").read_text())["state_sha256"]


def struck(command: list[str], folder: Path, phase: str, rng: random.Random) -> tuple[str | None, int | None]:
    """Start the run and kill it, with all its children, at a moment of the phase: (phase, newest checkpoint then), or None if it ended."""
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    before, written = complete_steps(checkpoints), metrics.stat().st_size if metrics.exists() else 0
    moments: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "steps": lambda: metrics.exists() and metrics.stat().st_size != written,
        "save": lambda: unfinished(checkpoints),
        "commit": lambda: bool(set(complete_steps(checkpoints)) - set(before)),
    }
    delay = {"start": rng.uniform(0, 8), "steps": rng.uniform(0, 0.5), "save": rng.uniform(0, 0.02), "commit": 0.0}[phase]
    log = (folder.parent / f"{folder.name}.log").open("a")
    process = subprocess.Popen(
        [*command, "--out", str(folder), *resuming(folder)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_along,  # noqa: PLW1509 - there are no threads
    )
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not moments[phase]():
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise NanoJaxError(f"no moment of phase {phase} came in {PATIENCE} s; look into {log.name}")
        time.sleep(0.001)
    time.sleep(delay)
    if process.poll() is not None:
        return None, None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return phase, max(complete_steps(checkpoints), default=None)


def flipped(checkpoints: Path, rng: random.Random) -> str:
    """Flip a bit of the newest checkpoint, if it is not the only one; in words."""
    steps = complete_steps(checkpoints)
    files = sorted(file for file in (checkpoints / str(max(steps, default=0))).rglob("*") if file.is_file() and file.stat().st_size)
    if len(steps) < 2 or not files:
        return ""
    file = rng.choices(files, [file.stat().st_size for file in files])[0]  # any bit is as likely as any other
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"; flipped a bit of {file.relative_to(checkpoints)}"


def unfinished(checkpoints: Path) -> bool:
    """Whether a save has begun and is no checkpoint yet."""
    if not checkpoints.is_dir():
        return False
    return any(not (child / NAME).exists() for child in checkpoints.iterdir() if not child.name.endswith(".corrupt"))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
