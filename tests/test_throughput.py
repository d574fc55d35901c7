"""The bench beside PyTorch: which calls it refuses before it starts anything, and how its processes share a GPU's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nanojax.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "scripts/bench"))

import throughput


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "this compares with a PyTorch program; name it by --reference"),
        ("--reference none.py", "'none.py' is no file"),
        (f"--reference {__file__} --precisions bf16 bf16", "--precisions are one or more of .*, each once, given bf16 bf16"),
        (f"--reference {__file__} --precisions torch", "given torch"),
        (f"--reference {__file__} --precisions", "given none"),
        (f"--reference {__file__} --rounds 1", "2 rounds or more"),
        (f"--reference {__file__} --compute-dtype fp32 --precisions bf16 fp8", "precision=fp8 needs bf16 activations"),
        ("--side fp8", "precision=fp8 is trained on NVIDIA GPUs"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_started(monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: name)  # as if PyTorch were installed
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError, match=words):
        throughput.main(["configs/tiny.py", "--data.cache", str(tmp_path), *flags.split()])


@pytest.mark.parametrize(
    ("environment", "fraction"),
    [({}, "0.49"), ({"XLA_CLIENT_MEM_FRACTION": ".3"}, ".3"), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"}, None)],
)
def test_sides_share_the_memory_unless_the_environment_says_how(monkeypatch, environment, fraction):
    """XLA refuses the older name of the variable beside the newer."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = subprocess.Popen
    monkeypatch.setattr(throughput.subprocess, "Popen", lambda command, **how: started(["env"], **how))
    with throughput.child([], "bf16", 2) as side:
        said = dict(line.rstrip("\n").split("=", 1) for line in side.stdout if "=" in line)
    assert said.get("XLA_CLIENT_MEM_FRACTION") == fraction
