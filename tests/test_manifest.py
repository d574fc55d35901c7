"""Manifests: every fault of every file of a checkpoint is found and named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpointing import files_of, flip, sealed, two  # noqa: F401  # the last: a fixture

from nanojax import manifest
from nanojax.manifest import complete_steps

FAULTS = {
    "truncated": lambda file, older: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": lambda file, older: file.write_bytes(bytes(file.stat().st_size)),
    "a flipped bit": lambda file, older: file.stat().st_size and flip(file, 3 * file.stat().st_size),
    "deleted": lambda file, older: file.unlink(),
    "empty": lambda file, older: file.write_bytes(b""),
    "of an older step": lambda file, older: file.write_bytes(older.read_bytes()),
    "a link": lambda file, older: (file.unlink(), file.symlink_to(older)),
    "a folder": lambda file, older: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_every_file_of_the_newest_checkpoint_is_found_and_named(two, tmp_path, fault):
    found = 0
    for n, name in enumerate(files_of(two / "4")):
        folder = tmp_path / str(n)
        shutil.copytree(two, folder)
        file = folder / "4" / name
        before = file.read_bytes()
        FAULTS[fault](file, folder / "3" / name if (folder / "3" / name).exists() else folder / "3" / manifest.NAME)
        if file.is_file() and not file.is_symlink() and file.read_bytes() == before:
            continue  # an empty file, cut in half; a file that is the same in both steps
        found += 1
        if name == manifest.NAME and fault in ("deleted", "a folder"):
            assert complete_steps(folder) == [3], "a step without its manifest is none"
            continue
        with pytest.raises(manifest.Damaged, match=re.escape(name)):
            check(folder / "4")
    assert found > 6


def test_no_flipped_bit_is_silent(two, tmp_path):
    rng = np.random.default_rng(0)
    shutil.copytree(two / "4", tmp_path / "4")
    files = files_of(tmp_path / "4")
    for _ in range(100):
        file = tmp_path / "4" / files[rng.integers(len(files))]
        if file.stat().st_size == 0:
            continue
        bit = int(rng.integers(8 * file.stat().st_size))
        flip(file, bit)
        with pytest.raises(manifest.Damaged):
            check(tmp_path / "4")
        flip(file, bit)
    check(tmp_path / "4")


def check(folder: Path) -> None:
    manifest.read(folder).check_files(folder)


@pytest.mark.parametrize(
    "record",
    ["", "[]", "{}", '{"version": 1, "step": 4}', "[" * 100_000, '{"version": 2, "step": 4, "files": {}, "meta": {}, "arrays": {}}'],
)
def test_a_manifest_that_is_none_is_damage(tmp_path, record):
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / manifest.NAME).write_text(sealed(record) if record else "")
    with pytest.raises(manifest.Damaged, match=manifest.NAME):
        manifest.read(tmp_path / "4")


def test_a_step_has_one_name(tmp_path):
    for name in ("0", "40", "040", "-1", "1e3", "7.corrupt", "12345678901"):
        (tmp_path / name).mkdir()
        (tmp_path / name / manifest.NAME).touch()
    assert complete_steps(tmp_path) == [0, 40]
