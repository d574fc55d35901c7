"""What a run does about bad numbers: leaves an update out, goes back to a checkpoint, or ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training import Run, presets, start, straight  # noqa: F401  # fixtures

from nanojax.errors import Interrupted, NonFiniteError, StorageError, UserError
from nanojax.manifest import complete_steps

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hurt(presets, start, monkeypatch):
    """hurt(fault, *flags, ...): the run with a fault."""

    def run(fault: str, *flags: str, **how) -> Run:
        monkeypatch.setenv("NANOJAX_FAULT", fault)
        return start(presets["modern"], "--eval-every", "0", *flags, **how)

    return run


# Each of these tests trains; one of them is for every day.


def test_updates_are_left_out_and_counted_and_a_run_with_too_many_goes_back_and_on_behind_the_data(hurt, capsys):
    """The batches from 13 on are bad: 21 of them are seen, and one more is under way by then."""
    run = hurt("nan_grad@step=3; inf_grad@step=5; nan_loss@step=7; nan_grad@batch=13..34")
    out, err = (" ".join(text.split()) for text in capsys.readouterr())
    assert "FAULTS on purpose, by NANOJAX_FAULT: nan_grad@step=3; inf_grad@step=5; nan_loss@step=7; nan_grad@batch=13..34" in out
    assert "step 20 is not saved: the last 8 updates were left out" in err
    assert "up to step 33, were not finite or spikes, and were left out; back to step 10, and on with batch 35: those from 11 are" in err
    lines = [record for record in run.records if "loss" in record]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["skipped"] for line in lines] == [0] * 2 + [1] * 2 + [2] * 2 + [3] * 34
    assert (run.summary["left_out"], run.summary["skipped"], run.summary["spikes"]) == ([[11, 34]], 3, 0)
    assert len(run.batches) == 40 + 24
    assert np.isfinite(run.summary["val_bpb"])


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "left_out"), [(36, [11, 34]), (15, [16, 34])])
def test_a_run_that_goes_back_and_is_stopped_goes_on_as_it_would_have(hurt, tmp_path, stop, left_out):
    """Stopped in the bad stretch, it has its last checkpoint there, to which it goes back."""
    fault, out = "nan_grad@batch=13..34", tmp_path / "run"
    whole = hurt(fault)
    hurt(fault, "--stop-after", str(stop), out=out, expect=Interrupted)
    resumed = hurt(fault, "--stop-after", str(stop), "--resume", out=out)
    assert resumed.summary["left_out"] == [left_out]
    if stop == 36:
        assert resumed.summary["state_sha256"] == whole.summary["state_sha256"]
        assert resumed.records == whole.records


@pytest.mark.slow
def test_a_run_that_comes_to_the_same_again_ends(hurt, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"up to step 37, were .*; going back to step 10 was no help; look at the data, or start anew"):
        hurt("nan_loss@step=17..", out=out, expect=())
    assert complete_steps(out / "checkpoints") == [10]


@pytest.mark.slow
def test_without_a_checkpoint_there_is_nothing_to_go_back_to(hurt, tmp_path):
    with pytest.raises(NonFiniteError, match="there is no checkpoint to go back to"):
        hurt("nan_loss@step=2..", "--save-every", "0", out=tmp_path / "run", expect=())


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_never_saved_and_cost_what_came_after_the_last_checkpoint(hurt, tmp_path, capsys):
    out = tmp_path / "run"
    run = hurt("inf_param@step=14", out=out)
    assert "back to step 10, and on with batch 36" in capsys.readouterr().err.replace("\n", " ")
    assert run.summary["left_out"] == [[11, 35]]
    assert np.isfinite(run.summary["train_loss"])


@pytest.mark.slow
def test_sigterm_while_parameters_are_not_finite_saves_nothing_of_them(hurt, tmp_path, capsys):
    out = tmp_path / "run"
    hurt("inf_param@step=14; sigterm@step=16", out=out, expect=Interrupted)
    assert "has values that are not finite; back to step 10" in capsys.readouterr().err.replace("\n", " ")
    assert complete_steps(out / "checkpoints") == [10]


@pytest.mark.slow
def test_a_save_that_fails_ends_the_run_and_the_one_before_it_is_whole(hurt, tmp_path):
    out = tmp_path / "run"
    hurt("io_error@step=20", out=out, expect=StorageError)
    assert complete_steps(out / "checkpoints") == [10]


@pytest.mark.slow
def test_a_spike_is_left_out_and_a_run_without_the_rule_takes_it(hurt, presets, start, monkeypatch):
    monkeypatch.setattr("nanojax.spikes.WINDOW", 16)
    run = hurt("spike_grad@step=30; spike_loss@step=33,x=4")
    assert (run.summary["spikes"], run.summary["skipped"]) == (2, 0)
    taken = hurt("spike_grad@step=30", "--no-skip-spikes")
    assert (taken.summary["spikes"], taken.summary["skipped"]) == (0, 0)


@pytest.mark.slow
def test_a_checkpoint_of_another_kind_of_state_is_refused_in_a_line(hurt, tmp_path):
    out = tmp_path / "run"
    hurt("", "--stop-after", "3", "--no-skip-spikes", out=out, expect=Interrupted)
    with pytest.raises(
        UserError, match=r"checkpoints/3 has no history/grad_norm: an older nanojax wrote it, or a run with --no-skip-spikes"
    ):
        hurt("", "--resume", out=out, expect=())


BAD = {"nan_grad": 10, "inf_grad": 10, "nan_loss": 10, "spike_grad": 10, "spike_loss": 2}


@pytest.mark.slow
def test_of_forty_two_bad_updates_every_one_is_left_out_and_no_other(hurt):
    """Those that are not finite come in the first 120 steps. The history is full after 128 finite ones, and the spikes come behind it."""
    steps = iter([*range(3, 123, 4), *range(180, 420, 20)])
    faults = [(kind, next(steps)) for kind, count in BAD.items() for _ in range(count)]
    run = hurt("; ".join(f"{kind}@step={step}" for kind, step in faults), "--steps", "420", "--save-every", "0")
    lines = [record for record in run.records if "loss" in record]
    for counter, kinds in (("skipped", ("nan_grad", "inf_grad", "nan_loss")), ("spikes", ("spike_grad", "spike_loss"))):
        counts = [0.0, *(line[counter] for line in lines)]
        found = [line["step"] for before, line in zip(counts, lines, strict=False) if line[counter] > before]
        assert found == [step for kind, step in faults if kind in kinds]


@pytest.mark.slow
def test_a_clean_run_of_a_thousand_steps_has_no_false_alarm(hurt, capsys):
    run = hurt("", "--steps", "1000", "--save-every", "100")
    assert [run.summary[name] for name in ("skipped", "spikes", "left_out")] == [0, 0, []]
    said = capsys.readouterr().err
    assert "left out" not in said
    assert "process" not in said


DRIFTS = """
import json, os, sys
from nanojax.errors import DriftError
from nanojax.train import main

preset, folder = sys.argv[1:]
for name, fault in (("clean", ""), ("once", "bitflip_param@step=13"), ("twice", "bitflip_param@step=13..")):
    os.environ["NANOJAX_FAULT"] = fault
    try:
        main([preset, "--eval-every", "0", "--mesh", "data=2", "--steps", "30", "--out", f"{folder}/{name}"])
        print(json.load(open(f"{folder}/{name}/summary.json"))["state_sha256"])
    except DriftError as error:
        print("DriftError", error)
"""


@pytest.mark.slow
def test_after_a_bit_flipped_on_a_device_the_run_goes_back_and_ends_as_it_would_have_and_a_second_time_it_stops(presets, tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", DRIFTS, presets["modern"], str(tmp_path)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    clean, once, twice = [line for line in done.stdout.splitlines() if re.match("[0-9a-f]{64}$|DriftError", line)]
    assert once == clean
    said = " ".join(done.stderr.split())
    found = r"params/blocks\.0\.\S+ has other bits on device 0 of process 0 and device 1 of process 0 than in the other copies; "
    assert re.search(f"after step 20, {found}back to step 10 ", said)
    assert re.match(f"DriftError after step 25, {found}going back to step 20 was no help; go on without that device", twice), twice
