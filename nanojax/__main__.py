"""`nanojax VERB ...`, the same as `python -m nanojax VERB ...`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from nanojax import __version__
from nanojax.errors import UserError, run_main

VERBS = {
    "train": ("nanojax.train", "main", "train a model: nanojax train configs/tiny.py"),
    "launch": ("nanojax.launch", "main", "train with a process for each GPU, and watch: nanojax launch -- train configs/d12.py"),
    "eval": ("nanojax.evals.command", "main", "bits per byte of a run or an export: nanojax eval runs/tiny"),
    "sample": ("nanojax.infer.sample", "main", "continue a text: nanojax sample runs/tiny --prompt 'def '"),
    "export": ("nanojax.export.command", "main", "write a run as safetensors: nanojax export runs/tiny out"),
    "inspect": (
        "nanojax.analysis.inspect_command",
        "main",
        "where a step's time goes: nanojax inspect runs/d12; what configs/d12.py compiles to",
    ),
    "plan": ("nanojax.analysis.plan_command", "main", "what fits: nanojax plan configs/d20.py --target h200 --devices 8"),
    "doctor": ("nanojax.doctor", "main", "check this machine: devices, versions, every attention backend against the reference"),
    "tokenizer": ("nanojax.data.commands", "tokenizer_main", "train or evaluate a tokenizer"),
    "data": ("nanojax.data.commands", "data_main", "download public text, or prepare your own"),
}


def dispatch(argv: Sequence[str]) -> None:
    """Run the verb that argv names. Raises UserError on one that there is not."""
    if argv and argv[0] == "--version":
        print(f"nanojax {__version__}")
        return
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {verb:<11}{text}" for verb, (_, _, text) in VERBS.items()]
        print("usage: nanojax VERB [--help] ...\n\n" + "\n".join(lines))
        return
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise UserError(f"unknown verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"))
    module, function, _ = VERBS[verb]
    getattr(importlib.import_module(module), function)(rest)


def main() -> None:
    """Entry point of the `nanojax` command."""
    run_main(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
