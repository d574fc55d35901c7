"""Token shards: what is read back is what was written, and damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from nanojax.config import DataConfig
from nanojax.data import corpus, shards
from nanojax.data.shards import TokenStore, prepare
from nanojax.errors import StorageError, UserError
from nanojax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

TEXTS = [f"document {i}: " + f"word{i % 13} né 中 <|bos|> {i * i}\n" * (1 + i % 7) for i in range(300)]


def silent(line: str) -> None:
    pass


@pytest.fixture
def data(tmp_path) -> DataConfig:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(path=str(folder), cache=str(tmp_path / "cache"), val_fraction=0.05)


def texts_of(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    found = []
    for begin, end in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True):
        ids = store.read(begin, end - begin)
        assert ids[0] == tokenizer.bos
        assert tokenizer.bos not in ids[1:]
        found.append(tokenizer.decode(ids[1:]))
    return found


def test_every_document_begins_with_bos_and_decodes_to_its_text(data):
    made = prepare(data, 350, silent)
    assert made.tokenizer.n_vocab == 350
    for store in (made.train, made.val):
        assert texts_of(store, made.tokenizer) == list(corpus.documents(data, store.split))
        assert store.dtype == np.uint16
        assert store.offsets.dtype == np.int64
        assert store.offsets[-1] == store.tokens
        assert len(store.offsets) == store.documents + 1
    train_text = "".join(corpus.documents(data, "train")).encode()
    assert made.train.text_bytes == len(train_text)
    assert made.bytes_per_token == pytest.approx(len(train_text) / (made.train.tokens - made.train.documents))


def test_bytes_of_the_tokens_add_up_to_the_bytes_of_the_text(data):
    made = prepare(data, 300, silent)
    lengths = made.tokenizer.bytes_per_token()
    assert lengths[made.val.read(0, made.val.tokens)].sum() == made.val.text_bytes


def test_no_document_crosses_a_shard(data, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    made = prepare(data, 300, silent)
    files = sorted(made.folder.glob("train-*.bin"))
    assert len(files) > 5
    assert texts_of(made.train, made.tokenizer) == list(corpus.documents(data, "train"))
    for file in files:
        ids = np.fromfile(file, "<u2")
        assert ids[0] == made.tokenizer.bos
        assert len(ids) <= 500
    ends = np.cumsum([file.stat().st_size // 2 for file in files])
    assert np.isin(ends, made.train.offsets).all()
    with pytest.raises(IndexError):
        made.train.read(int(ends[0]) - 1, 2)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1), (10**9, 1), (-5, 3)])
def test_reading_outside_the_tokens_raises(data, start, length):
    made = prepare(data, 300, silent)
    with pytest.raises(IndexError):
        made.train.read(start, length)


def test_a_view_is_read_only_and_takes_microseconds(data):
    store = prepare(data, 300, silent).train
    assert not store.read(0, 5).flags.writeable
    began = time.perf_counter()
    for _ in range(10_000):
        store.read(100, 50)
    assert (time.perf_counter() - began) / 10_000 < 20e-6  # measured 0.4 us; a busy machine may take many times that


def test_a_vocabulary_above_65536_is_stored_in_uint32(data, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)} | {b"%c%c%c" % (i >> 16, i >> 8 & 255, i & 255): 256 + i for i in range(70_000)}
    big = Tokenizer("big", SPLIT_PATTERN, ranks, {s: len(ranks) + i for i, s in enumerate(SPECIAL_TOKENS)})
    path = Path(data.path).parent / "big.json"
    big.save(path)
    made = prepare(replace(data, tokenizer=str(path)), 300, silent)
    assert made.train.dtype == np.uint32
    assert made.train.read(0, 1)[0] == big.bos > 65535
    assert texts_of(made.val, big) == list(corpus.documents(data, "val"))


def test_exactly_65536_tokens_still_fit_into_uint16(data):
    ranks = {bytes([i]): i for i in range(256)} | {b"\xff%c%c" % (i >> 8, i & 255): 256 + i for i in range(65_536 - 256 - 9)}
    full = Tokenizer("full", SPLIT_PATTERN, ranks, {s: len(ranks) + i for i, s in enumerate(SPECIAL_TOKENS)})
    assert full.n_vocab == 65_536
    path = Path(data.path).parent / "full.json"
    full.save(path)
    made = prepare(replace(data, tokenizer=str(path)), 300, silent)
    assert made.train.dtype == np.uint16
    assert made.train.read(0, 1)[0] == full.bos


def test_the_second_time_nothing_is_read_or_trained_again(data, monkeypatch):
    first = prepare(data, 300, silent)

    def never(*args, **kwargs):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(corpus, "_read", never)
    monkeypatch.setattr(Tokenizer, "train", never)
    lines: list[str] = []
    second = prepare(data, 300, lines.append)
    assert second.folder == first.folder
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert (second.train.read(0, 50) == first.train.read(0, 50)).all()
    assert any(first.fingerprint[:16] in line for line in lines)


def test_another_corpus_vocabulary_or_share_gets_another_folder(data):
    folders = {
        prepare(data, 300, silent).folder,
        prepare(data, 301, silent).folder,
        prepare(replace(data, val_fraction=0.2), 300, silent).folder,
    }
    with open(Path(data.path) / "rows.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    folders.add(prepare(data, 300, silent).folder)
    assert len(folders) == 4


def test_another_share_gets_another_folder_even_with_the_same_tokenizer(data):
    prepare(data, 300, silent)
    fixed = replace(data, tokenizer=str(next(Path(data.cache, "tokenizers").iterdir())))
    few, many = prepare(fixed, 300, silent), prepare(replace(fixed, val_fraction=0.5), 300, silent)
    assert few.folder != many.folder
    assert few.val.documents < many.val.documents


def test_the_same_corpus_in_another_cache_gives_the_same_bytes(data, tmp_path):
    one, two = prepare(data, 300, silent), prepare(replace(data, cache=str(tmp_path / "other")), 300, silent)
    assert one.folder.name == two.folder.name
    for file in sorted(p.name for p in one.folder.iterdir()):
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()


def test_the_index_holds_the_sha256_of_every_shard_and_of_the_text(data):
    made = prepare(data, 300, silent)
    index = json.loads((made.folder / "index.json").read_text())
    for split in ("train", "val"):
        digest = hashlib.sha256()
        for text in corpus.documents(data, split):
            digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        assert index["splits"][split]["text_sha256"] == digest.hexdigest()
        for shard in index["splits"][split]["shards"]:
            assert shard["sha256"] == hashlib.sha256((made.folder / shard["file"]).read_bytes()).hexdigest()
    assert index["tokenizer_sha256"] == made.tokenizer.sha256
    assert index["fingerprint"] == made.fingerprint


@pytest.mark.parametrize("file", ["train-00000.bin", "val-00000.bin", "train-offsets.npy"])
def test_one_flipped_bit_names_the_shard_and_the_folder_to_delete(data, file):
    folder = prepare(data, 300, silent).folder
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"shard {file} is corrupt: SHA-256 .* expected .*; delete {folder} to tokenise again"):
        prepare(data, 300, silent)
    shutil.rmtree(folder)
    prepare(data, 300, silent)


def test_a_shard_cut_short_or_gone_and_a_broken_index_are_named(data):
    folder = prepare(data, 300, silent).folder
    shard = folder / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"train-00000\.bin is corrupt: \d+ bytes, expected \d+"):
        prepare(data, 300, silent)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin cannot be read"):
        prepare(data, 300, silent)
    for broken in ("{", "[]", '{"splits": {}}', '{"splits": {"train": 3}}'):
        (folder / "index.json").write_text(broken)
        with pytest.raises(UserError, match=f"delete {folder}"):
            prepare(data, 300, silent)


def test_a_damaged_tokenizer_in_the_cache_says_to_delete_it(data):
    prepare(data, 300, silent)
    (path,) = Path(data.cache, "tokenizers").glob("*.json")
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path.name} is not JSON.*delete it"):
        prepare(data, 300, silent)


def test_a_cache_that_cannot_be_written_names_the_flag(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"--data\.cache") as refused:
        prepare(replace(data, cache=str(tmp_path / "file")), 300, silent)
    assert "\n" not in str(refused.value)


def test_a_disk_that_fills_up_is_a_storage_error_and_leaves_no_half_folder(data, monkeypatch):
    prepare(data, 300, silent)  # so that the tokenizer is there
    shutil.rmtree(Path(data.cache, "tokens"))

    def full(self, text, tokens):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards._Writer, "add", full)
    with pytest.raises(StorageError, match="No space left on device"):
        prepare(data, 300, silent)
    assert list(Path(data.cache, "tokens").iterdir()) == []


def test_a_corpus_that_fails_half_way_leaves_nothing_behind(data):
    prepare(data, 300, silent)
    shutil.rmtree(Path(data.cache, "tokens"))
    tokenizer = next(Path(data.cache, "tokenizers").iterdir())
    with open(Path(data.path) / "rows.jsonl", "a") as file:
        file.write("no json\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:301 is not JSON"):
        prepare(replace(data, tokenizer=str(tokenizer)), 300, silent)
    assert list(Path(data.cache, "tokens").iterdir()) == []


def test_who_loses_the_race_uses_the_winners_folder(data, monkeypatch):
    winner = prepare(data, 300, silent).folder
    kept = winner.with_name("kept")
    winner.rename(kept)
    encoded = shards._encoded

    def meanwhile(*args):
        yield from encoded(*args)
        shutil.copytree(kept, winner)
        (winner / "sign").write_text("the winner's")

    monkeypatch.setattr(shards, "_encoded", meanwhile)
    made = prepare(data, 300, silent)
    assert (made.folder / "sign").is_file()
    assert sorted(p.name for p in winner.parent.iterdir()) == sorted(["kept", winner.name])


def test_a_store_pickles_without_its_memory_maps(data):
    store = prepare(data, 300, silent).train
    before = store.read(0, 50).copy()
    pickled = pickle.dumps(store)
    assert len(pickled) < 4000
    assert (pickle.loads(pickled).read(0, 50) == before).all()


def test_left_out_documents_are_counted_in_the_log(data):
    with open(Path(data.path) / "rows.jsonl", "a") as file:
        file.write('{"text": " "}\n' * 3)
    lines: list[str] = []
    prepare(data, 300, lines.append)
    assert "left out: 3 empty documents" in lines


def test_a_named_encoding_is_used_as_it_is(data, monkeypatch):
    fake = tiktoken.Encoding(
        "fake", pat_str=SPLIT_PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|end|>": 256}
    )
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["fake"])
    monkeypatch.setattr(tiktoken, "get_encoding", {"fake": fake}.__getitem__)
    made = prepare(replace(data, tokenizer="fake"), 300, silent)
    assert made.tokenizer.bos == 257
    assert made.bytes_per_token == 1.0
    assert not Path(data.cache, "tokenizers").exists()


def test_the_embedded_corpus_is_ready_within_seconds_and_then_at_once(tmp_path):
    data = DataConfig(cache=str(tmp_path))
    began = time.monotonic()
    prepare(data, 4096, silent)
    cold = time.monotonic() - began
    began = time.monotonic()
    made = prepare(data, 4096, silent)
    cached = time.monotonic() - began
    assert made.tokenizer.n_vocab == 4096
    assert 3 < made.bytes_per_token < 5
    assert cold < 30  # measured 1.1 s on 2 idle cores
    assert cached < 3  # measured 0.03 s
