"""`nanojax export` as it is called, and a run that is exported, deleted and used."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from exporting import STEP, runs  # noqa: F401  # fixture

from nanojax.data.shards import prepare
from nanojax.errors import StorageError, UserError
from nanojax.evals.bpb import validator
from nanojax.export.command import ExportCommand, ExportFormat, choose, main
from nanojax.formats import FORMATS
from nanojax.infer.engine import Engine
from nanojax.infer.load import open_source
from nanojax.infer.params import SamplingParams


def test_every_4_bit_format_can_be_exported():
    assert set(get_args(ExportFormat)) == {"auto", "bf16", *FORMATS}


def test_a_cache_of_ones_own_is_used(runs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file: Not a directory"):
        main([str(runs.base.path), str(tmp_path / "out"), "--cache", str(tmp_path / "file")])


def test_an_export_is_as_good_as_its_run_when_that_is_gone(runs, cache_dir, tmp_path):
    """Its packed weights are the trained ones; the others are rounded to bf16, which alone tells the two figures apart."""
    run = Path(shutil.copytree(runs.run(precision="nvfp4").path, tmp_path / "run"))
    model, config = open_source(run).load(), runs.base.read()[0]
    data = prepare(config.data, config.model.vocab_size, lambda _: None)
    validate = validator(model.program, data)
    packed = model.program.rounding.names(model.weights)
    rounded = {name: w if name in packed else w.astype(jnp.bfloat16).astype(w.dtype) for name, w in model.weights.items()}
    with jax.set_mesh(model.program.mesh):
        trained, others_in_bf16 = validate(model.weights).bpb, validate(rounded).bpb

    main([str(run), str(tmp_path / "out")])
    shutil.rmtree(run)
    exported = open_source(tmp_path / "out", cache=str(cache_dir)).load()
    with jax.set_mesh(exported.program.mesh):
        found = validator(exported.program, data)(exported.weights).bpb
    assert found == pytest.approx(others_in_bf16, abs=1e-6)
    assert found == pytest.approx(trained, abs=1e-3)
    assert abs(found - runs_in_fp32(runs, data)) > 1e-3, "packing must be seen in the figure, or it proves nothing"

    ids = [[data.tokenizer.bos, *data.tokenizer.encode("ba ko")]]
    greedy = SamplingParams(temperature=0.0, tokens=20)
    remembered = dataclasses.replace(model, weights=rounded)
    (added,), (same,) = (Engine(each, data.tokenizer).generate(ids, greedy) for each in (exported, remembered))
    assert added.tokens == same.tokens
    assert len(added.tokens) > 5


def runs_in_fp32(runs, data) -> float:
    """Bits per byte of the weights as they are."""
    model = open_source(runs.base.path).load()
    with jax.set_mesh(model.program.mesh):
        return validator(model.program, data)(model.weights).bpb


@pytest.mark.parametrize(
    ("trained", "flags", "format", "group", "rule", "words"),
    [
        ("fp32", {}, "bf16", None, "", "bf16, rounded from the master weights of a run in fp32"),
        ("bf16", {}, "bf16", None, "", "bf16"),
        ("nvfp4", {}, "nvfp4", None, "ceil", "nvfp4, the codes that the run was trained with"),
        ("mxfp4", {}, "mxfp4", None, "ceil", "mxfp4, the codes that the run was trained with"),
        ("int4", {}, "int4", 64, "ceil", "int4, the codes that the run was trained with"),
        ("int4", {"format": "int4"}, "int4", 64, "ceil", "int4, the codes that the run was trained with"),
        ("int4", {"format": "int4", "int4_group": 128}, "int4", 128, "even",
         "int4, post-training quantisation, trained in int4 in groups of 64"),
        ("bf16", {"format": "mxfp4"}, "mxfp4", None, "even", "mxfp4, post-training quantisation, trained in bf16"),
        ("nvfp4_2d", {"format": "nvfp4"}, "nvfp4", None, "even", "nvfp4, post-training quantisation, trained in nvfp4_2d"),
        ("nvfp4", {"format": "bf16"}, "bf16", None, "", "bf16, rounded from the master weights of a run in nvfp4"),
    ],
)  # fmt: skip
def test_the_format_and_where_it_comes_from(runs, trained, flags, format, group, rule, words):
    train = {"int4_group": 64, "precision": "int4"} if trained == "int4" else {"precision": trained}
    target = choose(runs.run(**train).read()[0], ExportCommand(run="run", out="out", **flags), trained)
    assert (target.format, target.int4_group, target.rule, target.words) == (format, group, rule, words)


def test_a_run_that_left_4_bits_before_its_end_is_exported_in_what_it_ended_in(runs, tmp_path, capsys):
    run = runs.run(precision="nvfp4", fp4_until=0.5)
    main([str(run.path), str(tmp_path / "out")])
    assert "as bf16, rounded from the master weights of a run in fp32" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    main([str(run.path), str(tmp_path / "packed"), "--format", "nvfp4"])
    assert "as nvfp4, post-training quantisation, trained in fp32" in capsys.readouterr().out


def test_the_summary_and_the_folder(runs, tmp_path, capsys):
    run, out = runs.run(precision="nvfp4"), tmp_path / "out"
    out.mkdir()  # an empty one is taken
    main([str(run.path), str(out)])
    files = {file.name: file for file in out.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "nanojax_tokenizer.json"}
    assert {oct(file.stat().st_mode & 0o777) for file in files.values()} == {"0o644"}
    size = sum(file.stat().st_size for file in files.values())
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    tensors = 14 * 3 + 1 + 2 * 4 + 1 + 1  # packed matrices; embedding, gains, last gain and head
    assert capsys.readouterr().out.splitlines() == [
        f"step {STEP} of {run.path} as nvfp4, the codes that the run was trained with",
        f"14 matrices packed, {weights:,} weights at {0.5625 + 14 * 4 / weights:.4f} bytes each, scales included; the rest is bf16",
        f"{out}: {tensors} tensors, {size:,} bytes; see it with: nanojax sample {out}",
    ]
    record = json.loads(files["config.json"].read_text())
    config, hashes = run.read()
    assert (record["model_type"], record["dtype"]) == ("nanojax", "bfloat16")
    own = record["nanojax"]
    assert own["config"] == json.loads(json.dumps(config.to_dict()))
    assert (own["format"], own["int4_group"], own["step"]) == ("nvfp4", None, STEP)
    assert {name: own[name] for name in hashes} == hashes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--format", "int4"],
            "d_model=64 must be a multiple of the 128 that share a scale in int4; .*try --int4-group 64 or --format bf16.nvfp4",
        ),
        (["--format", "int4", "--int4-group", "256"], "d_model=64 must be a multiple of the 256"),
        (["--int4-group", "64"], "int4_group=64 needs --format int4, given auto"),
        (["--format", "mxfp4", "--int4-group", "64"], "int4_group=64 needs --format int4, given mxfp4"),
        (["--format", "fp8"], "fp8"),
        (["--int4-group", "32", "--format", "int4"], "32"),
    ],
)
def test_a_format_that_cannot_be_is_refused_before_anything_is_made(runs, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        main([str(runs.base.path), str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_overwritten(runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file", runs.base.path):
        with pytest.raises(UserError, match=r"is not an empty one; give another OUT, or delete it"):
            main([str(runs.base.path), str(out)])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_in_small_groups_goes_into_every_other_format(runs, tmp_path):
    folder = runs.run(precision="int4", int4_group=64).path
    for format in ("nvfp4", "mxfp4"):
        main([str(folder), str(tmp_path / format), "--format", format])


def test_an_export_does_not_go_into_its_run(runs):
    folder = runs.run(precision="nvfp4").path
    with pytest.raises(UserError, match="lies in that of the run; give another OUT"):
        main([str(folder), str(folder / "checkpoints" / "99")])


def test_an_export_is_not_exported_again(runs, tmp_path):
    export = runs.export(precision="nvfp4")
    with pytest.raises(UserError, match=rf"RUN must be the folder of a training run, and {export} is an export"):
        main([str(export), str(tmp_path / "out")])
