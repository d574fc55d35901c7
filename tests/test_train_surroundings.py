"""A run does not care about locale, umask, clock, home, or the name of its folder; a current folder that is gone it cannot do without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import presets  # noqa: F401  # fixture

ROOT = Path(__file__).parents[1]
FLAGS = ("--steps", "6", "--save-every", "3", "--eval-every", "0")
pytestmark = pytest.mark.slow


def train(preset: str, out: Path, *flags: str, prelude: str = "pass", **env: str | None) -> subprocess.CompletedProcess:
    """`nanojax train` after a prelude, with other variables; None takes one away."""
    words = f"{prelude}; import sys; from nanojax.errors import run_main; from nanojax.train import main; run_main(main, sys.argv[1:])"
    whole = {
        name: value for name, value in (os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env).items() if value is not None
    }
    argv = [sys.executable, "-c", words, preset, "--out", str(out), *FLAGS, *flags]
    return subprocess.run(argv, env=whole, capture_output=True, text=True, check=False)


def test_the_last_state_is_the_same_in_any_surroundings(presets, tmp_path):
    """All at once: an old locale, no home, a strict umask, a folder with spaces and accents, and a clock an hour back after a stop."""
    plain = tmp_path / "plain"
    assert train(presets["modern"], plain).returncode == 0
    odd = tmp_path / "ein Lauf, né 中"
    strange = dict(LC_ALL="C", HOME=None, prelude="import os; os.umask(0o077)")
    first = train(presets["modern"], odd, "--stop-after", "3", TZ="Europe/Berlin", **strange)
    assert first.returncode == 75, first.stderr
    second = train(presets["modern"], odd, "--resume", TZ="Atlantic/Azores", **strange)
    assert second.returncode == 0, second.stderr
    hashes = {json.loads((run / "summary.json").read_text())["state_sha256"] for run in (plain, odd)}
    assert len(hashes) == 1
    assert (odd / ".lock").stat().st_mode & 0o077 == 0, "the umask was heeded"


def test_a_current_folder_that_is_gone_is_a_line(presets, tmp_path):
    gone = repr(str(tmp_path / "gone"))
    done = train(presets["modern"], Path("runs/x"), prelude=f"import os; os.mkdir({gone}); os.chdir({gone}); os.rmdir({gone})")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "the current folder, which is gone; change to one that is there" in done.stderr


def test_a_folder_that_the_locale_cannot_spell_is_refused_at_once(presets, tmp_path):
    """Only where Python's own UTF-8 mode is turned off; tensorstore takes no such path, and would say so at the first save."""
    done = train(presets["modern"], tmp_path / "né", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2, done.stderr
    assert "this locale cannot spell the folder" in done.stderr
    assert "set PYTHONUTF8=1" in done.stderr
