"""Eight virtual devices. Their number is fixed when jax starts, so they live in a process of their own: a test file run as a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from quick import QUICK


def measured(file: str, cache: Path, *words: str) -> dict:
    """What `answer` printed in `file` run as a script, and what came to its stderr. `words` are what its `measure` takes."""
    argv = [sys.executable, file, str(cache), *words]
    done = subprocess.run(argv, env=os.environ | QUICK, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def answer(measure: Callable[..., dict]) -> None:
    """In that process: print what is measured, on eight devices, as JSON."""
    import jax

    from nanojax.program import keep_compiled_programs

    jax.config.update("jax_num_cpu_devices", 8)
    keep_compiled_programs(sys.argv[1])  # `lower` compiles what a step compiled: this makes it free
    print(json.dumps(measure(*sys.argv[2:])))
