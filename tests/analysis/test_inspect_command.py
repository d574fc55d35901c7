"""`nanojax inspect` on a run that was traced here, and on what is no trace."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from nanojax import train as train_module
from nanojax.analysis.hlo import read_program
from nanojax.analysis.inspect_command import main
from nanojax.analysis.record import read_record
from nanojax.errors import UserError

PRESET = """from nanojax.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(depth=2, d_model=32, head_dim=16, d_ffn=64, seq_len=32, vocab_size=512),
    train=TrainConfig(steps=6, batch_tokens=256, micro_batch=4, eval_every=0, eval_tokens=256, save_every=0, loss_blocks=2),
    data=DataConfig(path={path!r}, cache={cache!r}, packing="concat", val_fraction=0.1),
)
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory, cache_dir):
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text").mkdir()
    (folder / "text" / "a.jsonl").write_text("".join(json.dumps({"text": f"word {i} and {i * i} " * 20}) + "\n" for i in range(60)))
    path = folder / "preset.py"
    path.write_text(PRESET.format(path=str(folder / "text"), cache=str(cache_dir)))
    return path


@pytest.fixture(scope="module")
def traced(preset):
    """A run whose steps 3 to 5 were traced."""
    folder = preset.parent / "run"
    train_module.main([str(preset), "--out", str(folder), "--profile", "3:5"])
    return folder


def numbers(text: str, name: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [float(x) for x in re.findall(r"[\d.]+", line.removeprefix(name).replace(",", ""))]


def test_a_traced_run_is_explained(traced, capsys):
    main([str(traced)])
    said = capsys.readouterr().out
    assert f"{traced}: " in said.splitlines()[0]
    assert "over 3 steps" in said.splitlines()[0]
    groups = ("matrix products", "attention", "elementwise", "optimizer", "unattributed", "idle")
    total = numbers(said, "a step")[0]
    assert sum(numbers(said, group)[0] for group in groups if f"\n{group}" in said) == pytest.approx(total, abs=0.05)
    assert numbers(said, "unattributed")[1] < 3 if "\nunattributed" in said else True
    for part in ("loss", "optimizer", "block/ffn", "backward: block/attention/qkv"):
        assert f"\n{part} " in said
    assert "FLOPs of a device and step: " in said
    assert (traced / "profile" / "step.png").read_bytes()[:4] == b"\x89PNG"


def test_a_step_that_was_traced_is_the_program_once(traced, capsys):
    main([str(traced)])
    said = capsys.readouterr().out
    _, program = read_record(traced / "profile") or (None, "")
    ops = read_program(program)
    ran = re.search(r"keys\), ([\d.e+]+) in what ran", said)
    assert ran
    assert float(ran[1]) == pytest.approx(sum(op.flops * op.times for op in ops), rel=1e-3)


def test_a_run_beside_itself_changes_nothing(traced, capsys):
    main([str(traced), str(traced / "profile")])
    said = capsys.readouterr().out
    assert numbers(said, "a step")[-1] == 0


def test_without_its_record_kernels_are_known_by_name(traced, capsys, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(traced / "profile", bare, ignore=shutil.ignore_patterns("about.json", "step.hlo.gz"))
    main([str(bare), "--picture", str(tmp_path / "a.svg"), "--steps", "3"])
    assert "The trace says nothing of the program" in capsys.readouterr().out
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_a_config_is_explained_without_running_it(preset, capsys):
    main([str(preset), "--remat"])
    said = dict(re.findall(r"^ *(\S.*?)  (.*)$", capsys.readouterr().out, re.M))
    assert set(said) == {"compiled for", "step", "FLOPs", "bytes", "memory", "kernels", "custom calls", "collectives", "recomputed"}
    assert said["collectives"] == "none"
    assert re.match(r"\d+ operations, \d+\.\d% of the FLOPs", said["recomputed"])


def damaged(traced, tmp_path, name: str, content: bytes):
    folder = tmp_path / "damaged"
    shutil.copytree(traced / "profile", folder)
    (path,) = folder.rglob(name)
    path.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("*.xplane.pb", b"", "holds no kernels"),
        ("*.xplane.pb", b"\xff" * 99, "no trace that can be read|holds no kernels"),
        ("about.json", b"{}", "must have the fields"),
        ("about.json", b"[", "cannot be read"),
        ("about.json", b"NaN", "must have the fields"),
        ("step.hlo.gz", b"no gzip", "cannot be read"),
        ("step.hlo.gz", b"\x1f\x8b", "cannot be read"),
    ],
)
def test_a_damaged_trace_gives_one_line(traced, tmp_path, name, content, words):
    with pytest.raises(UserError, match=words) as caught:
        main([str(damaged(traced, tmp_path, name, content))])
    assert "\n" not in str(caught.value)


def test_sizes_that_are_none_are_refused(traced, tmp_path):
    about = json.loads((traced / "profile" / "about.json").read_text())
    for field, value in (("steps", 0), ("steps", 2.5), ("flops", "many"), ("device", 3), ("tokens", True)):
        content = json.dumps(about | {field: value}).encode()
        with pytest.raises(UserError, match=rf"about.json must hold what a run writes, and {field}="):
            main([str(damaged(traced, tmp_path, "about.json", content))])
        shutil.rmtree(tmp_path / "damaged")


def test_a_call_that_names_no_trace_is_refused(tmp_path):
    with pytest.raises(UserError, match="takes the folder of a run or a trace, or a preset"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="holds no trace"):
        main([str(tmp_path)])
    os.mkfifo(tmp_path / "a.xplane.pb")
    with pytest.raises(UserError, match=r"a\.xplane\.pb"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="--top and --steps are at least 1"):
        main([str(tmp_path), "--top", "0"])
    with pytest.raises(UserError, match=r"--picture is a file that ends in \.png, \.svg, \.pdf, given 'a\.txt'"):
        main([str(tmp_path), "--picture", "a.txt"])


def test_more_steps_than_any_kernel_ran_are_refused(traced):
    with pytest.raises(UserError, match="a trace of 100000 steps runs a kernel in each"):
        main([str(traced), "--steps", "100000"])
