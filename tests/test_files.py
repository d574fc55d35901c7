"""Files of folders that may come from anywhere: only what lies there itself is read, and no more of it than is sensible."""

from __future__ import annotations

import os
import tracemalloc

import pytest

from nanojax.errors import UserError
from nanojax.files import free_bytes, mb, printable, read_regular, require_plain_folder, require_regular

CASES = {
    "a link": lambda path, canary: path.symlink_to(canary),
    "a link to nothing": lambda path, canary: path.symlink_to("nothing"),
    "a pipe": lambda path, canary: os.mkfifo(path),
    "a folder": lambda path, canary: path.mkdir(),
    "a device": lambda path, canary: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", CASES)
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path, what):
    canary, path = tmp_path / "canary", tmp_path / "file"
    canary.write_text("mine")
    CASES[what](path, canary)
    for read in (lambda: read_regular(path, 100), lambda: require_regular(path)):
        with pytest.raises(UserError, match=rf"^{path} must be a regular file in that folder, and is a link or a device; put"):
            read()


def test_a_file_larger_than_such_files_get_is_not_read(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(2**43)  # takes no space
    with pytest.raises(UserError, match=r"has 8,796,093,022,208 bytes, and at most 4 are read"):
        read_regular(path, 4)
    path.write_bytes(b"four")
    assert read_regular(path, 4) == b"four"
    require_regular(path)
    require_regular(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 4)


def test_a_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    require_plain_folder(tmp_path)
    require_plain_folder(tmp_path / "none")
    with pytest.raises(UserError, match="link must be a folder itself, and is a link"):
        require_plain_folder(tmp_path / "link")


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path):
    stat = os.statvfs(tmp_path)
    found = free_bytes(tmp_path / "not/yet")
    assert abs(found - stat.f_bavail * stat.f_frsize) < 2**30  # others write meanwhile


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MB"), (2_100_000, "2.1 MB"), (3_456_000_000, "3,456 MB")])
def test_sizes_are_said_in_mb(size, text):
    assert mb(size) == text


def test_text_of_strangers_is_shown_as_one_line():
    assert printable("a\nb\x1b[2J" + "x" * 999) == "a\\nb\\x1b[2J" + "x" * 289


def test_a_small_file_takes_little_memory_however_large_it_may_be(tmp_path):
    (tmp_path / "file").write_bytes(b"small")
    tracemalloc.start()
    try:
        assert read_regular(tmp_path / "file", 2**33) == b"small"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
