"""Token shards of strangers: what lies, consistently or not, is refused in a line; damage of files is in test_shards.py."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_shards import data, silent  # noqa: F401  # the first: a fixture

from nanojax.data.shards import prepare
from nanojax.errors import UserError


def with_index(folder: Path, change) -> None:
    """An index that says something else, with hashes that fit: not damage, but somebody's work, or another program's."""
    index = json.loads((folder / "index.json").read_text())
    change(index, index["splits"]["train"])
    for split in index["splits"].values():
        for file in (*split["shards"], split["offsets"]):
            if (path := folder / file["file"]).is_file() and path.parent == folder:
                file["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


LIES = {
    "another type": (lambda i, s: i.update(dtype="float64"), r"index\.json is damaged .*tokens of the type float64"),
    "twice as wide": (lambda i, s: i.update(dtype="uint32"), r"index\.json is damaged .*tokens in \d+ bytes"),
    "a wrong count": (lambda i, s: s.update(tokens=s["tokens"] + 1), r"index\.json is damaged .*and \d+ in shards"),
    "10 TB": (lambda i, s: s["shards"][0].update(tokens=10**13, bytes=2 * 10**13), r"index\.json is damaged .*and 1\d{13} in shards"),
    "a shard too many": (lambda i, s: s["shards"].append(s["shards"][0]), r"index\.json is damaged .*and \d+ in shards"),
    "a document too many": (lambda i, s: s.update(documents=s["documents"] + 1), "offsets of the train split are not where"),
    "a smaller vocabulary": (lambda i, s: i.update(n_vocab=100), r"shard train-00000\.bin has the token \d+, and its tokenizer only 100"),
    "another tokenizer": (lambda i, s: i.update(tokenizer_sha256="0" * 64), "holds the tokens of another tokenizer, 000000000000"),
    "a file elsewhere": (lambda i, s: s["shards"][0].update(file="../../canary"), r"index\.json is damaged .*a file outside its folder"),
    "a number that is none": (lambda i, s: s.update(tokens=1e999), r"index\.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_consistently_is_refused_in_one_line(data, lie):
    folder = prepare(data, 300, silent).folder
    change, words = LIES[lie]
    with_index(folder, change)
    with pytest.raises(UserError, match=words) as refused:
        prepare(data, 300, silent)
    assert f"delete {folder} to tokenise again" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["a pipe", "a link", "empty", "zeros for offsets", "deep"])
def test_a_shard_that_is_no_file_of_tokens_is_refused_at_once(data, tmp_path, what):
    folder = prepare(data, 300, silent).folder
    shard, offsets = folder / "train-00000.bin", folder / "train-offsets.npy"
    if what in ("a pipe", "a link"):
        shard.rename(tmp_path / "canary")
        os.mkfifo(shard) if what == "a pipe" else shard.symlink_to(tmp_path / "canary")
    elif what == "empty":
        shard.write_bytes(b"")
    elif what == "deep":
        (folder / "index.json").write_text("[" * 200_000)
    else:
        np.save(offsets, np.zeros_like(np.load(offsets)))
        with_index(folder, lambda i, s: None)
    with pytest.raises(UserError, match=r"delete|must be a regular file"):
        prepare(data, 300, silent)
