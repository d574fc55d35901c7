"""A run and its export are opened by one function, and give models that are used alike."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exporting import STEP, runs  # noqa: F401  # fixture

from nanojax.checkpoint import Checkpoints
from nanojax.config import DataConfig
from nanojax.errors import NonFiniteError, UserError
from nanojax.evals.command import main as eval_main
from nanojax.infer.load import open_source
from nanojax.infer.sample import main as sample_main
from nanojax.program import make_program
from nanojax.runs import RunFolder


def test_a_source_is_for_the_devices_that_there_are(runs):
    for folder in (runs.run(precision="nvfp4", mesh="data=4", micro_batch=1).path, runs.export(precision="nvfp4")):
        source = open_source(folder, attn_impl="reference", cache="elsewhere")
        train = source.config.train
        assert (train.mesh, train.micro_batch, train.attn_impl) == ("", None, "reference")
        assert source.config.data.cache == "elsewhere"
        assert source.config.data.tokenizer == str(next(folder.glob("*tokenizer.json")))
        assert source.tokenizer.sha256 == runs.base.tokenizer().sha256
    assert open_source(runs.base.path).config.data.cache == runs.base.read()[0].data.cache
    assert open_source(runs.export(precision="nvfp4")).config.data.cache == DataConfig().cache


def test_a_runs_weights_are_rounded_as_in_training_and_an_exports_are_those(runs, cache_dir):
    run = open_source(runs.run(precision="nvfp4").path).load(jax.devices()[:1])
    export = open_source(runs.export(precision="nvfp4"), cache=str(cache_dir)).load(jax.devices()[:1])
    assert (run.step, run.precision) == (STEP, "nvfp4")
    assert (export.step, export.precision) == (STEP, "nvfp4, exported")
    trained = runs.prepared(precision="nvfp4")
    for name in trained:
        np.testing.assert_array_equal(run.weights[name], trained[name], err_msg=name)
        if name.startswith("blocks.") and name.endswith(".w"):
            np.testing.assert_array_equal(export.weights[name], trained[name], err_msg=name)
        assert export.weights[name].sharding == run.weights[name].sharding


@pytest.mark.parametrize("what", ["run", "export"])
def test_eval_and_sample_take_either(runs, cache_dir, capsys, what):
    folder = str(runs.run(precision="nvfp4").path if what == "run" else runs.export(precision="nvfp4"))
    eval_main([folder, "--cache", str(cache_dir)])
    said = capsys.readouterr().out.splitlines()[-1]
    precision = "nvfp4" if what == "run" else "nvfp4, exported"
    wanted = rf"step {STEP}: ([0-9.]+) bits per byte, [0-9.]+ nats a token, [0-9,]+ tokens, attention xla, precision {precision}"
    found = re.fullmatch(wanted, said)
    assert found, said
    assert 1 < float(found[1]) < 20
    sample_main([folder, "--prompt", "ba ko", "--tokens", "5", "--cache", str(cache_dir)])
    assert capsys.readouterr().out.startswith("ba ko")


def test_a_model_that_says_nothing_is_not_reported(runs, tmp_path, capsys):
    """NaN in the weights is found as they are read; what overflows as it is used, in the result."""
    run = RunFolder(Path(shutil.copytree(runs.base.path, tmp_path / "run")))
    program = make_program(run.read()[0], jax.devices()[:1])
    checkpoints = Checkpoints(run.checkpoints, keep=3)
    state, _ = checkpoints.restore(program.shapes, program.shardings)
    for main, value, words in (
        (eval_main, 3e38, f"that of {run.path} at step {STEP + 1} is (nan|inf) nats a token"),
        (sample_main, jnp.nan, rf"head\.w in .*/{STEP + 2} has 1 values that are not"),
    ):
        head = state.params["head.w"].at[0, 0].set(value) if main is sample_main else jnp.full_like(state.params["head.w"], value)
        state = dataclasses.replace(state, step=state.step + 1, params=state.params | {"head.w": head})
        checkpoints.save(state, {})
        checkpoints.wait()
        with pytest.raises(NonFiniteError, match=words):
            main([str(run.path)])
    checkpoints.close()
    assert "bits per byte" not in capsys.readouterr().out


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="give the folder of a training run"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # as an export that was interrupted leaves it
    with pytest.raises(UserError, match=r"an export's folder holds config\.json"):
        open_source(tmp_path)
