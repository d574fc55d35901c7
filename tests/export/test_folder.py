"""An export's folder is not trusted: what is odd about it is answered in one line that names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from exporting import STEP, altered, runs  # noqa: F401  # fixture

from nanojax.config import DataConfig, TrainConfig
from nanojax.errors import UserError
from nanojax.export.folder import LONGEST_ROW, is_export, open_export, require_new
from nanojax.tokenizer import Tokenizer


@pytest.fixture
def folder(runs, tmp_path) -> Path:
    """A copy of an export, to be broken."""
    return Path(shutil.copytree(runs.export(precision="nvfp4"), tmp_path / "export"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_export(folder)
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 700
    assert str(folder) in said
    return said


def test_an_export_is_told_from_a_run_and_opened(runs, folder):
    export = open_export(folder)
    assert is_export(folder)
    assert not is_export(runs.base.path)
    assert (export.format, export.int4_group, export.step) == ("nvfp4", None, STEP)
    assert export.config == runs.run(precision="nvfp4").read()[0]
    assert export.tokenizer.sha256 == runs.base.tokenizer().sha256


def test_the_folder_does_not_say_where_compiled_programs_are_run_from_nor_how_its_weights_are_rounded(runs, tmp_path):
    config, _ = runs.run(precision="int4", int4_group=64).read()
    assert config.data.cache != DataConfig().cache
    plain = open_export(altered(runs.export(precision="int4", int4_group=64), tmp_path / "export")).plain_config
    assert plain.data.cache == DataConfig().cache
    assert plain.data.tokenizer == str(tmp_path / "export/nanojax_tokenizer.json")
    assert plain.train.four_bit is None
    head = dataclasses.replace(config, train=TrainConfig(precision="fp8_head"))
    export = dataclasses.replace(open_export(tmp_path / "export"), config=head)
    assert export.plain_config.train.precision == "auto"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "nanojax_tokenizer.json"])
def test_a_file_that_is_missing_linked_or_no_file_is_refused(folder, tmp_path, name):
    path, elsewhere = folder / name, tmp_path / f"elsewhere-{name}"
    path.rename(elsewhere)
    assert f"holds {name}" in refusal(folder)
    path.symlink_to(elsewhere)  # the same bytes, from outside
    assert "must be a regular file" in refusal(folder)
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    assert "must be a regular file" in refusal(folder)
    path.unlink()
    path.mkdir()
    assert "must be a regular file" in refusal(folder)


def test_a_config_or_tokenizer_beyond_any_that_we_write_is_not_read(folder):
    for name, most in (("config.json", 2**22), ("nanojax_tokenizer.json", 2**28)):
        with open(folder / name, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.truncate(most + 1)
        assert f"at most {most:,} are read" in refusal(folder)
        os.truncate(folder / name, size)


@pytest.mark.parametrize(
    "text",
    ["", "{", "\x00\xff", "[]", "3", '"text"', "[" * 100_000, '{"a":' * 50_000, "1" * 6000,
     '{"model_type": "qwen3"}', '{"model_type": "nanojax"}'],
    ids=lambda text: f"{text[:12]!r} of {len(text)}",
)  # fmt: skip
def test_a_config_of_garbage_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json is not an export's config" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "fp8"}, "format must be one of bf16, int4"),
        ({"format": ["nvfp4"]}, "format must be one of"),
        ({"format": {}}, "format must be one of"),
        ({"int4_group": 64}, "int4_group goes with int4"),
        ({"format": "int4"}, "int4_group goes with int4"),
        ({"format": "int4", "int4_group": 100}, "int4_group=100 must be one of"),
        ({"format": "int4", "int4_group": 128}, "d_model=64 must be a multiple of the 128"),
        ({"step": -1}, "step must be a whole number"),
        ({"step": 2**40}, "step must be a whole number"),
        ({"step": True}, "step must be a whole number"),
        ({"step": "9"}, "step must be a whole number"),
        ({"tokenizer_sha256": None}, "tokenizer_sha256 must be 64 hexadecimal digits"),
        ({"text_sha256": "../../etc/passwd"}, "text_sha256 must be 64 hexadecimal digits"),
        ({"config": []}, "an object of objects"),
        ({"config": {"model": 3}}, "an object of objects"),
        ({"config": {}}, "steps and batch_tokens must be numbers"),
        ({"config": {"model": {"depth": "2"}}}, "depth='2'"),
        ({"config": {"model": {"depth": 10**9}}}, "depth=1000000000"),
        ({"config": {"model": {"d_model": 2**30}}}, "must be at most"),
        ({"config": {"model": {"vocab_size": 10**400}}}, "vocab_size=a number of 1329 bits must be below"),
        ({"config": {"model": {"rope_base": 10**400}}}, ""),
        ({"config": {"model": {"softcap": float("nan")}}}, "softcap=nan"),
        ({"config": {"model": {"line\n\x1b[2J": 1}}}, "line\\n\\x1b"),
        ({"config": {"train": {"steps": 1, "batch_tokens": 2**29}, "model": {"seq_len": 2**29}}}, f"at most {LONGEST_ROW}"),
        ({"more": 1}, "nanojax must hold exactly"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_config_with_fields_that_cannot_be_is_refused(runs, tmp_path, fields, words):
    broken = altered(runs.export(precision="nvfp4"), tmp_path / "export", **fields)
    said = refusal(broken)
    assert "config.json is not an export's config" in said
    assert words in said


def test_a_config_without_one_of_its_fields_is_refused(folder):
    record = json.loads((folder / "config.json").read_text())
    for name in list(record["nanojax"]):
        rest = {key: value for key, value in record["nanojax"].items() if key != name}
        (folder / "config.json").write_text(json.dumps(record | {"nanojax": rest}))
        assert "nanojax must hold exactly" in refusal(folder)


def test_a_model_with_fewer_rows_than_its_tokenizer_has_tokens_is_refused(runs, tmp_path):
    config = runs.run(precision="nvfp4").read()[0].to_dict()
    config["model"]["vocab_size"] = 256
    broken = altered(runs.export(precision="nvfp4"), tmp_path / "export", config=config)
    assert "vocab_size=256" in refusal(broken)


def test_a_tokenizer_that_was_swapped_is_refused(folder):
    Tokenizer.train(["another text, another vocabulary " * 9], 270).save(folder / "nanojax_tokenizer.json")
    assert "put the export's own tokenizer back" in refusal(folder)
    (folder / "nanojax_tokenizer.json").write_text('{"format": "line\\n"}')
    assert "must hold exactly the keys" in refusal(folder)


def test_weights_that_lost_their_end_or_a_bit_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "model.safetensors is damaged: SHA-256" in refusal(folder)
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert "model.safetensors is damaged: SHA-256" in refusal(folder)
    path.write_bytes(whole)
    open_export(folder)


def test_a_new_folder_is_made_an_empty_one_taken_and_another_refused(tmp_path):
    require_new(tmp_path / "a/b")
    require_new(tmp_path / "a/b")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "a", tmp_path / "file"):
        with pytest.raises(UserError, match=r"is not an empty one; give another OUT, or delete it"):
            require_new(taken)
    for no in (tmp_path / "file/below", Path("/proc/nanojax"), tmp_path / ("long" * 100)):
        with pytest.raises(UserError, match=r"OUT must be a folder that can be written, given .*; give another OUT"):
            require_new(no)
