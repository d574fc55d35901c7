"""Runs that go on in another precision, or begin with another run's weights."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from training import presets, start, straight  # noqa: F401  # fixtures

from nanojax.checkpoint import Checkpoints
from nanojax.config import TrainConfig
from nanojax.errors import Interrupted, UserError
from nanojax.evals.command import main as eval_main
from nanojax.program import make_program
from nanojax.runs import PRECISION, RunFolder
from nanojax.sizes import resolve
from nanojax.train import read_command

FOUR_BIT = ("--precision", "nvfp4")
FEW = ("--eval-every", "0", "--save-every", "0")


def weights(folder) -> dict[str, np.ndarray]:
    """Master weights of the newest checkpoint."""
    config, _ = folder.read()
    program = make_program(config, jax.devices()[:1])
    checkpoints = Checkpoints(folder.checkpoints)
    params = checkpoints.restore_params(program.shapes.params, program.shardings.params)
    checkpoints.close()
    return {name: np.asarray(w) for name, w in params.items()}


@pytest.fixture(scope="module")
def quantised(presets, start, tmp_path_factory):
    """A run stopped after 6 of its 40 steps, in NVFP4."""
    out = tmp_path_factory.mktemp("quantised") / "run"
    return start(presets["modern"], *FOUR_BIT, *FEW, "--stop-after", "6", out=out, expect=Interrupted)


def test_master_weights_and_what_is_saved_know_nothing_of_the_precision(quantised, straight):
    mine, other = weights(quantised.folder), weights(straight.folder)
    assert {n: (w.shape, w.dtype) for n, w in mine.items()} == {n: (w.shape, w.dtype) for n, w in other.items()}
    matrix = mine["blocks.0.attention.q.w"]
    assert len(np.unique(np.abs(matrix[:16, 0]))) == 16, "master weights keep their own values"
    losses = [[r["loss"] for r in run.records if "loss" in r][:6] for run in (quantised, straight)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # o and down begin at zero, so the first loss is the same
    assert losses[0][-1] != losses[1][-1]


def test_a_run_goes_on_in_another_precision_when_it_is_allowed_to_and_back(presets, start, quantised, capsys):
    folder = quantised.folder
    with pytest.raises(UserError, match=r"changed are train.precision nvfp4 -> bf16; add --allow precision"):
        start(presets["modern"], "--precision", "bf16", *FEW, "--resume", out=folder.path)
    other = ("--precision", "bf16", *FEW, "--allow", "precision", "--resume")
    start(presets["modern"], *other, "--stop-after", "8", out=folder.path, expect=Interrupted)
    assert folder.read()[0].train.precision == "bf16"
    start(presets["modern"], *FOUR_BIT, "--fp4-skip-last", "1", *FEW, "--allow", "precision", "--resume", out=folder.path)
    capsys.readouterr()
    eval_main([str(folder.path)])
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["precision"] == "nvfp4"
    found = re.search(r"([0-9.]+) bits per byte", said := capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(summary["val_bpb"], abs=5.1e-7)  # half of the last place that is printed
    assert "precision nvfp4" in said
    rows = [r["step"] for r in quantised.records if "loss" in r]
    assert rows == list(range(1, 41))


@pytest.mark.slow
def test_a_config_is_rewritten_when_a_checkpoint_bears_it_out(presets, start, tmp_path):
    out = tmp_path / "run"
    start(presets["modern"], "--precision", "bf16", *FEW, "--steps", "6", "--stop-after", "2", out=out, expect=Interrupted)
    flags = ("--precision", "fp32", *FEW, "--steps", "6", "--allow", "precision", "--resume")
    with pytest.raises(RuntimeError, match="killed"):
        start(presets["modern"], *flags, out=out, at=(3, fail))
    assert RunFolder(out).read()[0].train.precision == "bf16"
    start(presets["modern"], *flags, "--stop-after", "4", out=out, expect=Interrupted)
    assert RunFolder(out).read()[0].train.precision == "fp32"
    # Without a preset, flags are read beside the run's own fields.
    command, _ = read_command(["--out", str(out), "--resume", "--fp4-recipe", "full", "--precision", "auto", "--allow", "precision"])
    full = resolve(command.config, RunFolder(out).read()[0].model.vocab_size).train
    assert (full.steps, full.fp4_skip_last) == (6, 1), "the recipe leaves out what it leaves out in a new run"


def test_a_complete_run_has_no_step_left_for_another_precision(start, straight):
    with pytest.raises(UserError, match=r"is complete, and has no step left to train otherwise; start anew with --init-from"):
        start(None, "--resume", *FOUR_BIT, "--allow", "precision", out=straight.folder.path)


def fail():
    raise RuntimeError("killed")


def test_what_is_allowed_with_the_precision_is_all_that_says_how_to_round():
    names = (field.name for field in dataclasses.fields(TrainConfig))
    assert {f"train.{name}" for name in names if re.match("precision|int4_|fp[48]_", name)} == PRECISION


def test_allowing_the_precision_allows_nothing_else(presets, start, quantised):
    with pytest.raises(UserError, match=r"optim.matrix_lr 0.02 -> 0.5.*drop those flags"):
        start(
            presets["modern"],
            "--precision",
            "mxfp4",
            "--optim.matrix-lr",
            "0.5",
            *FEW,
            "--allow",
            "precision",
            "--resume",
            out=quantised.folder.path,
        )


def test_allow_is_for_a_run_that_goes_on(presets, start):
    with pytest.raises(UserError, match=r"--allow precision is for a run that goes on; add --resume"):
        start(presets["modern"], "--allow", "precision")


def test_a_run_begins_with_the_weights_of_another_and_nothing_else(presets, start, straight, tmp_path):
    source, out = str(straight.folder.path), tmp_path / "run"
    how = (*FOUR_BIT, "--init-from", source, "--seed", "5", "--steps", "2", *FEW)
    run = start(presets["modern"], *how, "--stop-after", "1", out=out, expect=Interrupted)
    assert run.batches[0] != straight.batches[0]
    # bits per byte before its first step: the other run's last, but for the rounding of its matrices
    first = next(r["val_bpb"] for r in run.records if "val_bpb" in r)
    assert first == pytest.approx(straight.summary["val_bpb"], rel=0.02)
    assert first != straight.summary["val_bpb"]
    # As ever, --resume goes on from the run's own checkpoint, not from --init-from.
    summary = start(None, "--resume", out=out).summary
    assert (summary["steps"], summary["val_bpb_initial"]) == (2, first)


@pytest.mark.slow
def test_and_a_run_without_4_bits_with_those_of_one_in_them(presets, start, straight, tmp_path):
    steps = ("--steps", "6", *FEW)
    run = start(presets["modern"], *FOUR_BIT, "--init-from", str(straight.folder.path), *steps, out=tmp_path / "run")
    how = ("--init-from", str(run.folder.path), *steps, "--stop-after", "1")
    back = start(presets["modern"], *how, out=tmp_path / "back", expect=Interrupted)
    first = next(r for r in back.records if "val_bpb" in r)
    assert first["val_bpb"] == pytest.approx(run.summary["val_bpb"], rel=0.02)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--d-model", "32"], r"has d_model=64, and this run has 32; give --d-model 64"),
        (["--norm", "fixed"], r"has norm=learnable, and this run has fixed; give --norm learnable"),
        (["--vocab-size", "384"], r"has the tokenizer .*; add --tokenizer .*tokenizer.json"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(presets, start, straight, flags, words):
    with pytest.raises(UserError, match=words):
        start(presets["modern"], "--init-from", str(straight.folder.path), *flags)


def test_weights_of_no_run_are_refused(presets, start, tmp_path):
    with pytest.raises(UserError, match=r"holds config.json, and .* does not"):
        start(presets["modern"], "--init-from", str(tmp_path))
