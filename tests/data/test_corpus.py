"""Where text comes from: order, splits, and one line for every way in which a folder can be wrong."""

from __future__ import annotations

import builtins
import inspect
import itertools
import json
import os
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanojax.config import DataConfig
from nanojax.data import corpus
from nanojax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


def write_parquet(path, texts, column="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, **options)


def both(data):
    return list(corpus.documents(data, "train")), list(corpus.documents(data, "val"))


@pytest.fixture
def mixed(tmp_path):
    write_jsonl(tmp_path / "b" / "rows.jsonl", [f"jsonl {i}" for i in range(60)])
    write_parquet(tmp_path / "a" / "rows.parquet", [f"parquet {i}" for i in range(40)], row_group_size=7)
    (tmp_path / "notes.txt").write_text("not a document")
    return DataConfig(path=str(tmp_path), val_fraction=0.1)


def test_the_splits_are_disjoint_complete_and_in_the_same_order_every_time(mixed):
    train, val = both(mixed)
    assert sorted(train + val) == sorted([f"jsonl {i}" for i in range(60)] + [f"parquet {i}" for i in range(40)])
    assert len(val) == 10  # ceil(99 * 0.1)
    assert train[0] == "parquet 0"  # folder a comes before folder b
    assert (train, val) == both(mixed)


@given(st.integers(2, 3000), st.floats(1e-6, 1 - 1e-6))
def test_both_splits_have_a_document_and_the_share_is_the_one_asked_for(n, fraction):
    val = sum(corpus.split_of(i, fraction) == "val" for i in range(n))
    assert 1 <= val <= n - 1
    assert abs(val - n * fraction) <= 2
    assert corpus.split_of(0, fraction) == "train"
    assert corpus.split_of(1, fraction) == "val"


def test_documents_are_streamed_and_a_huge_file_is_never_loaded_whole(tmp_path):
    path = tmp_path / "huge.jsonl"
    line = json.dumps({"text": "x" * 1000}) + "\n"
    with open(path, "w") as file:
        for _ in range(40):
            file.write(line * 1000)
    stream = corpus.documents(DataConfig(path=str(tmp_path)), "train")
    assert inspect.isgenerator(stream)
    tracemalloc.start()
    assert sum(1 for _ in itertools.islice(stream, 3000)) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # bytes; the file has 40 million


def test_with_a_pattern_every_text_file_is_a_document(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "b.txt").write_bytes("\ufeffsecond\r\n".encode())
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.txt").write_bytes(b"nul\0nul")
    (tmp_path / "e.txt").write_text(" \n")
    (tmp_path / "f.md").write_text("other")
    data = DataConfig(path=str(tmp_path), glob="**/*.txt")
    skipped = Counter()
    assert [text for _, text in corpus.labelled(data, corpus.find(data), skipped)] == ["first", "second\r\n"]
    assert skipped == {"not UTF-8": 1, "binary": 1, "empty documents": 1}


def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (home / "a.txt").write_text("a")
    (home / "b.txt").write_text("b")
    os.symlink(outside / "secret.txt", home / "c.txt")
    os.symlink(outside, home / "sub")
    os.symlink(home / "a.txt", home / "d.txt")
    for pattern, expected in (("*.txt", ["a", "b", "a"]), ("**/*.txt", ["a", "b", "a"])):
        data = DataConfig(path=str(home), glob=pattern)
        assert [text for _, text in corpus.labelled(data, corpus.find(data))] == expected
    for pattern in ("sub/*.txt", "../outside/*.txt"):
        with pytest.raises(UserError, match="matches no file"):
            corpus.find(DataConfig(path=str(home), glob=pattern))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "is not JSON"),
        ('"just text"', "no string 'text', given str"),
        ('{"body": "x"}', "no string 'text', given keys 'body'"),
        ('{"text": 3}', "no string 'text'"),
        ('{"text": null}', "no string 'text'"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_file_and_number(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=says) as refused:
        list(corpus.documents(DataConfig(path=str(tmp_path)), "train"))
    assert f"{path}:3 " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_not_utf8_and_lone_surrogates_in_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b"}\n{"text": "c"}\n')
    assert both(DataConfig(path=str(path))) == (["a\ufffdb"], ["c"])
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        both(DataConfig(path=str(path)))


def test_parquet_without_the_column_of_another_type_or_broken_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    data = DataConfig(path=str(tmp_path))
    write_parquet(path, ["a", "b"], column="body")
    with pytest.raises(UserError, match=r"rows\.parquet has no column 'text', given body"):
        both(data)
    write_parquet(path, [1, 2])
    with pytest.raises(UserError, match=r"rows\.parquet has int64 in its column"):
        both(data)
    write_parquet(path, ["some text"] * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rows\.parquet"):
        both(data)
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match=r"rows\.parquet") as refused:
        both(data)
    assert "\n" not in str(refused.value)


def test_empty_documents_and_nulls_in_parquet_are_left_out(tmp_path):
    write_parquet(tmp_path / "rows.parquet", ["a", None, "", "b", "  "])
    assert both(DataConfig(path=str(tmp_path))) == (["a"], ["b"])


def test_without_pyarrow_the_extra_to_install_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "rows.parquet", ["a", "b"])
    real = builtins.__import__

    def no_pyarrow(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(UserError, match=r"pip install 'nanojax\[data\]'"):
        both(DataConfig(path=str(tmp_path)))


def test_every_wrong_folder_is_told_apart_with_a_remedy(tmp_path):
    def refusal(**fields):
        with pytest.raises(UserError) as refused:
            both(DataConfig(**fields))
        return str(refused.value)

    assert "does not exist" in refusal(path=str(tmp_path / "none"))
    (tmp_path / "a.txt").write_text("text")
    assert "--data.glob '**/*.txt'" in refusal(path=str(tmp_path))
    assert "matches no file" in refusal(path=str(tmp_path), glob="*.py")
    for bad in ("", "/etc/*", "**.txt"):
        assert ("pattern" if bad else "glob must not be empty") in refusal(path=str(tmp_path), glob=bad)
    assert "1 documents to train on and 0 to validate on" in refusal(path=str(tmp_path), glob="*.txt")
    write_jsonl(tmp_path / "rows.jsonl", ["", " "])
    assert "left out: 2 empty documents" in refusal(path=str(tmp_path))


def test_the_fingerprint_changes_with_names_sizes_and_times_and_only_with_them(tmp_path):
    data = DataConfig(path=str(tmp_path))
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ["a", "b"])
    os.utime(path, ns=(10**18, 10**18))
    seen = {corpus.fingerprint(data)}
    assert corpus.fingerprint(data) in seen
    os.utime(path, ns=(10**18, 10**18 + 1))
    seen.add(corpus.fingerprint(data))
    write_jsonl(path, ["a", "bb"])
    os.utime(path, ns=(10**18, 10**18))
    seen.add(corpus.fingerprint(data))
    path.rename(tmp_path / "other.jsonl")
    seen.add(corpus.fingerprint(data))
    seen.add(corpus.fingerprint(DataConfig(path=str(tmp_path), glob="*.jsonl")))
    assert len(seen) == 5


def test_a_manifest_names_the_validation_file_and_half_a_download_is_refused(tmp_path):
    for i in (0, 1, 9):
        write_parquet(tmp_path / f"shard_{i:05d}.parquet", [f"{i}.{k}" for k in range(5)])
    manifest = {"validation": "shard_00009.parquet", "files": [f"shard_{i:05d}.parquet" for i in (0, 1, 9)]}
    (tmp_path / corpus.MANIFEST).write_text(json.dumps(manifest))
    train, val = both(DataConfig(path=str(tmp_path), val_fraction=0.5))
    assert val == [f"9.{k}" for k in range(5)]
    assert train == [f"{i}.{k}" for i in (0, 1) for k in range(5)]
    data = DataConfig(path=str(tmp_path))
    assert list(corpus.labelled(data, corpus.find(data))) == [("train", t) for t in train] + [("val", v) for v in val]
    (tmp_path / "shard_00001.parquet").unlink()
    with pytest.raises(UserError, match=r"not complete, shard_00001\.parquet is missing"):
        corpus.find(data)
    (tmp_path / corpus.MANIFEST).write_text('{"validation": 3}')
    with pytest.raises(UserError, match="damaged"):
        corpus.find(data)


def test_the_embedded_corpus_is_this_pythons_library_without_tests_and_tables():
    data = DataConfig()
    source = corpus.find(data)
    names = [file.relative_to(source.root).as_posix() for file in source.files]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [n for n in names if n.startswith(("test/", "encodings/", "site-packages/", "pydoc_data/", "idlelib/idle_test/"))]
    train, val = both(data)
    assert len(val) >= 1
    assert sum(map(len, train)) > 1_000_000
    assert corpus.fingerprint(data) == corpus.fingerprint(data)


def test_a_python_without_its_library_is_told_to_bring_text(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("x = 1")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"--data\.path"):
        corpus.find(DataConfig())
