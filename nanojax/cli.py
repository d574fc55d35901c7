"""Command lines over dataclasses: presets, overrides, and one-line answers to a wrong call."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from nanojax.config import Config
from nanojax.errors import UserError

T = TypeVar("T")
FLAT: Any = tyro.conf.arg(name="")
"""Annotates a nested dataclass whose flags carry no prefix: `Annotated[Config, FLAT]`."""
POSITIONAL: Any = tyro.conf.Positional
"""Annotates a field that is given without a flag."""
RUN: Any = tyro.conf.arg(metavar="RUN")
OUT: Any = tyro.conf.arg(metavar="OUT")
"""Annotate a field with the word that stands for its value in the help."""
DATA_PATH: Any = tyro.conf.arg(name="data.path")
DATA_GLOB: Any = tyro.conf.arg(name="data.glob")
"""Annotate fields that are flags of the data wherever they appear."""
FLAGS_OF_ALL = ("--help", "--debug")


def parse(spec: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """argv -> an instance of the dataclass `spec`, whose docstrings make the help text.

    Prints help and exits 0 on --help. Raises UserError in one line on anything that does not parse.
    """
    usage = prog.split(" [", maxsplit=1)[0] + " --help"
    known = [*flags(spec), *FLAGS_OF_ALL, "-h"]
    for arg in argv:
        name = arg.split("=")[0].replace("_", "-")
        if re.match(r"--[a-zA-Z]", name) and name not in known:
            ends = {"--" + flag.rpartition(".")[2].lstrip("-"): flag for flag in known} | {flag: flag for flag in known}
            near = difflib.get_close_matches(name, ends, n=1)
            raise UserError(f"unknown option {name}; {f'did you mean {ends[near[0]]}?' if near else f'see {usage}'}")
    out = io.StringIO()
    try:
        with contextlib.redirect_stderr(out):
            words = f"{description} With --debug, an error shows its traceback."
            args = [arg for arg in argv if arg != "--debug"]
            return tyro.cli(spec, prog=prog, description=words, default=default or tyro.MISSING_NONPROP, args=args)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(one_line(out.getvalue()) + f"; see {usage}") from None


def flags(spec: Any, prefix: str = "") -> list[str]:
    """Every flag that `parse` takes for a dataclass, in the spelling of the help."""
    found: list[str] = []
    for name, hint in get_type_hints(spec, include_extras=True).items():
        inner = getattr(hint, "__origin__", hint)
        confs = [m for m in getattr(hint, "__metadata__", ()) if getattr(m, "name", None) is not None]
        label = confs[0].name if confs else name
        if dataclasses.is_dataclass(inner):
            found += flags(inner, prefix + (label + "." if label else ""))
        elif "Positional" not in str(hint):
            whole = f"{prefix}{label}" if not confs or confs[0].prefix_name is not False else label
            whole = whole.replace("_", "-")
            found.append(f"--{whole}")
            if inner is bool:
                head, _, tail = whole.rpartition(".")
                found.append(f"--{head + '.' if head else ''}no-{tail}")
    return found


def value_of(flag: str, argv: Sequence[str]) -> str | None:
    """What follows a flag, as `--flag value` or `--flag=value`; None where it is not given."""
    for arg, after in zip(argv, [*argv[1:], None], strict=False):
        if arg == flag:
            return after
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def one_line(box: str) -> str:
    """The words of tyro's boxed message, without the box and without its pointer to the help."""
    words = [re.sub(r"[│╭╮╰╯─]+|-{3,}", " ", line).strip() for line in box.splitlines()[1:]]
    text = re.sub(r"^Error parsing [\w.]+: ", "", " ".join(filter(None, words)))
    if found := re.match(r"Error parsing (--\S+): no type matching (\S+) could be instantiated from \[(.*?)\]", text):
        return f"{found[1]} takes {found[2].replace('{None}|', '')} or None, given {found[3]}"
    return re.sub(r"\s+", " ", re.split("Argument helptext:|For full helptext", text)[0]).strip(" .") or "the command line does not parse"


def split_preset(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """(config of the preset that argv names first, the other arguments). Without one: the default config.

    A preset is Python that assigns `config`; it is run, as any program that you name on the command line.
    """
    if not argv or argv[0].startswith("-"):
        if late := [arg for arg in argv if arg.endswith(".py") and Path(arg).is_file()]:
            raise UserError(f"the preset comes before all flags, given {late[0]} after {argv[0]}; move it to the front")
        return Config(), list(argv)
    return load_preset(argv[0]), list(argv[1:])


def load_preset(path: str | Path) -> Config:
    """Run a preset file and return its `config`. Raises UserError naming the file and what is wrong with it."""
    if Path(path).suffix != ".py" or not Path(path).is_file():
        have = sorted(str(p) for p in Path("configs").glob("*.py"))
        near = difflib.get_close_matches(str(path), have, n=1, cutoff=0.3)
        raise UserError(
            f"a preset is a Python file that assigns `config`, {str(path)!r} is none; try {near[0] if near else 'configs/tiny.py'}"
        )
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"preset {path}: {error}") from error
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        fields = [field.name for part in get_type_hints(Config).values() for field in dataclasses.fields(part)]
        near = difflib.get_close_matches(unknown[1], fields, n=1) if unknown else []
        remedy = f"did you mean {near[0]}?" if near else "run it with python to see where"
        raise UserError(f"preset {path} raised TypeError: {error}; {remedy}") from error
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is theirs to mend
        raise UserError(f"preset {path} raised {type(error).__name__}: {error}; run it with python to see where") from error
    if not isinstance(config, Config):
        raise UserError(f"a preset must assign `config = Config(...)`, and {path} has config={config!r}; write one there")
    return config
