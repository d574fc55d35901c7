"""The harness that kills runs: a sound one passes, and what loses the data's position or looks at no manifest does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training import presets  # noqa: F401  # fixture

ROOT = Path(__file__).parent.parent
BROKEN = {
    "sound": "",
    "without the position in the data": "from nanojax.data.loader import Loader; Loader.set_state = lambda self, state: None",
    "without a manifest": "from nanojax.manifest import Manifest; Manifest.check_files = Manifest.check_arrays = lambda *_, **__: None",
}


@pytest.mark.slow
@pytest.mark.parametrize("prelude", BROKEN)
def test_only_a_sound_run_passes(presets, tmp_path, prelude):
    """Two kills between steps are certain to come after a checkpoint; a bit is flipped after each."""
    (tmp_path / "prelude.py").write_text(BROKEN[prelude])
    argv = [sys.executable, "scripts/bench/chaos.py", presets["modern"], "--kills", "8", "--flips", "1", "--out", str(tmp_path / "chaos")]
    argv += ["--prelude", str(tmp_path / "prelude.py"), "--flags=--save-every=4", "--seed", "1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if prelude == "sound" else 1), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
