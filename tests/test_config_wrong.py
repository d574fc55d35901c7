"""Wrong configs: each is answered in one line that names the rule, what was given and the remedy, with exit code 2.

In this process, since what differs is the message. tests/test_wrong_calls.py has what needs a world of files, and real processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from nanojax.__main__ import dispatch
from nanojax.errors import run_main

BARE_S, DEVICE_S = 2.0, 6.0  # the promise of the issue, on an idle machine
TRAIN = "train --depth 2 --d-model 64 --head-dim 16 --seq-len 64 --batch-tokens 2048 --steps 9 --vocab-size 300"
# What follows `nanojax train` with the flags above: (the rule, the remedy), both words of the line.
FLAGS = {
    # Names and values.
    "--lerning-rate 1": ("unknown option --lerning-rate", "see nanojax train --help"),
    "--matrx-lr 1": ("unknown option --matrx-lr", "did you mean --optim.matrix-lr?"),
    "--optim.matrix-lr -1": ("optim.matrix_lr=-1.0 must be above 0", "leave it out for the default"),
    "--optim.matrix-lr nan": ("optim.matrix_lr=nan must be above 0 and finite", "leave it out for the default"),
    "--optim.matrix-lr 1e-3x": ("could not convert string to float: '1e-3x'", "see nanojax train --help"),
    "--steps 0": ("steps=0 must be above 0", "leave it out for the default"),
    "--steps 1e30": ("--steps takes INT or None, given '1e30'", "see nanojax train --help"),
    "--steps 99999999999999999999": ("steps=a number of 67 bits must be below 2147483648", "write a smaller number"),
    "--batch-tokens 0": ("batch_tokens=0 must be above 0", "leave it out for the default"),
    "--compute-dtype fp5": ("invalid choice 'fp5' for argument '--compute-dtype'", "Expected one of ('auto', 'fp32', 'bf16')"),
    "--grad-accum 2": ("unknown option --grad-accum", "see nanojax train --help"),
    "--optim.betas 0.9": ("Missing value for argument '--optim.betas'", "see nanojax train --help"),
    "--optim.betas 0.9 1": ("optim.betas=(0.9, 1.0) must lie in [0, 1)", "the default is (0.8, 0.95)"),
    "--seed -1": ("seed=-1 must be at least 0", "leave it out for the default"),
    "--keep 0": ("keep=0 must be above 0", "leave it out for the default"),
    # Sizes that must go together.
    "--d-model 65": ("d_model=65 must be a multiple of head_dim=16", "try --d-model 80"),
    "--n-kv-head 3": ("n_head=4 must be a multiple of n_kv_head=3", "try --n-kv-head 2"),
    "--d-model 60 --head-dim 15": ("head_dim=15 must be even (RoPE rotates its halves)", "try 16"),
    "--rope-base 0.5": ("rope_base=0.5 must be above 1", "try 100000"),
    "--seq-len 1": ("seq_len=1 must be a multiple of loss_blocks=8", "try --loss-blocks 1"),
    "--batch-tokens 100": ("batch_tokens=100 must be a multiple of seq_len=64", "try --batch-tokens 128"),
    "--depth 5000": ("depth=5000, d_model=64 must be at most 1024 and 131072", "choose a smaller model"),
    "--optim.warmup-steps 100": ("optim.warmup_steps=100 must not exceed steps=9", "try --optim.warmup-steps 0"),
    "--window 0": ("window=0 must be above 0", "leave it out for the default"),
    "--window-pattern SL": ("window_pattern=SL needs a window", "add --window 16"),
    "--window 8 --window-pattern XS": ("window_pattern='XS' must be made of S and L", "try SSSL"),
    "--window 8 --window-pattern L": ("window=8 is for layers that are S", "drop both, or try --window-pattern S"),
    "--data.max-documents 8": ("data.max_documents=8 is for documents hidden from each other", "add --data.mask-documents"),
    "--data.val-fraction 1": ("data.val_fraction=1.0 must lie between 0 and 1", "try 0.02"),
    "--data.glob *.py": ("data.glob='*.py' needs a folder to search", "add --data.path DIR"),
    # Formats.
    "--precision int4": ("d_model=64 must be a multiple of the 128 that share a scale in int4", "--d-model 128, or --int4-group 64"),
    "--int4-group 64": ("int4_group=64 needs precision=int4", "or write --int4-group 128"),
    "--fp4-head": ("fp4_head=True needs a 4-bit precision, given auto", "add --precision"),
    "--precision nvfp4 --fp4-until 0": ("fp4_until=0.0 must be above 0 and at most 1", "try 0.82"),
    "--precision nvfp4 --fp4-skip-first 2": ("fp4_skip_first=2 and fp4_skip_last=0 leave none of 2 blocks", "skip fewer"),
    "--precision mxfp4 --fp4-recipe full": ("fp4_recipe=full has weights in nvfp4_2d, given precision=mxfp4", "drop --precision"),
    "--precision fp32 --compute-dtype bf16": ("precision=fp32 needs fp32 activations", "drop one of the two"),
    "--precision fp8 --compute-dtype fp32": ("precision=fp8 needs bf16 activations", "drop one of the two"),
    # Devices, and how it is run.
    "--mesh data=-1,fsdp=-1": ("--mesh takes axis=size pairs of data, fsdp, context, tensor, given 'data=-1'", "try --mesh data=2,fsdp=2"),
    "--mesh data=2,data=2": ("--mesh names each axis once", "write one size for data"),
    "--mesh pipe=2": ("given 'pipe=2'", "try --mesh data=2,fsdp=2"),
    "--allow precision": ("--allow precision is for a run that goes on", "add --resume"),
    "--stop-after 0": ("--stop-after takes a step from 1 on, given 0", "try 1"),
    "--profile 9:2": ("--profile takes first:last steps, given '9:2'", "try --profile 20:23"),
    "--steps 40 --profile 41:42": ("--profile must begin at a step from 1 to 40, given 41:42", "try 1:1"),
    "--steps 40 --stop-after 3 --profile 10:12": ("--profile must begin at a step from 1 to 3, given 10:12", "try 1:1"),
    "--peak-tflops nan": ("peak_tflops=nan must be above 0 and finite", "leave it out for the default"),
    "configs/d12.py": ("the preset comes before all flags", "move it to the front"),
}
HEAD = "from nanojax.config import *\n"
# The body of a preset, and its answer: what a file of another kind would get wrong.
PRESETS = {
    "config = Config(model=ModelConfig(depth=2, depth=3))": ("raised SyntaxError: keyword argument repeated: depth", "run it with python"),
    "config = Config(model=ModelConfig(depth=2)": ("raised SyntaxError: '(' was never closed", "run it with python"),
    "config = Config(optim=OptimConfig(matrx_lr=1.0))": ("got an unexpected keyword argument 'matrx_lr'", "did you mean matrix_lr?"),
    "config = Config(model=ModelConfig(window=8, causal=False))": ("got an unexpected keyword argument 'causal'", "run it with python"),
    "config = Config(model=ModelConfig(depth='12'))": ("depth='12' must be one of these: int", "write one of them"),
    "config = Config(optim=OptimConfig(matrix_lr='1e-3'))": ("matrix_lr='1e-3' must be one of these: float", "write one of them"),
    "config = ModelConfig()": ("a preset must assign `config = Config(...)`", "write one there"),
    "raise SystemExit(0)": ("raised SystemExit: 0", "run it with python"),
    "config = Config(model=ModelConfig(d_model=65))": ("d_model=65 must be a multiple of head_dim=128", "try --d-model 128"),
}  # fmt: skip
# Whole calls of other verbs.
VERBS = {
    "plan --devices 99999999": ("--devices takes 1 to 16384, given 99999999", "leave it out for those there are"),
    "plan --memory 80": ("--memory takes a number with GiB, GB, MiB or MB, given '80'", "try --memory 80GiB"),
    "plan --target b200": ("invalid choice 'b200' for argument '--target'", "Expected one of ('here', 'h100', 'h200')"),
    "plan --target h200 --topology 64x8": ("--topology takes slices x hosts x devices of a host", "try 64x1x8"),
    "plan --topology 64x1x8": ("--topology 64x1x8 is of GPUs that are not there", "add --target h200"),
    "inspect tests": ("tests holds no trace (*.xplane.pb)", "make one with nanojax train ... --profile 20:23"),
    "inspect tests nowhere": ("tests holds no trace", "--profile"),
    "inspect nowhere": ("inspect takes the folder of a run or a trace, or a preset, and 'nowhere' is none", "try nanojax inspect runs/d12"),
}
CALLS = {f"{TRAIN} {flags}": words for flags, words in FLAGS.items()} | VERBS


def answer(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong call prints, whose exit code is 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(dispatch, argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("nanojax: error: ")
    return line


def test_there_are_at_least_34_wrong_configs_and_no_two_are_the_same_mistake():
    rules = Counter(rule for rule, _ in (FLAGS | PRESETS).values())
    assert len(rules) >= 34
    assert set(rules.values()) == {1}, rules.most_common(3)


@pytest.mark.parametrize("line", CALLS)
def test_a_wrong_config_is_answered_with_its_rule_and_a_remedy(line, capsys):
    said = answer(line.split(), capsys)
    assert all(words in said for words in CALLS[line]), said


@pytest.mark.parametrize("body", PRESETS)
def test_a_wrong_preset_is_answered_with_its_rule_and_a_remedy(body, capsys, tmp_path):
    (tmp_path / "preset.py").write_text(HEAD + body + "\n")
    said = answer(["train", str(tmp_path / "preset.py")], capsys)
    assert f"preset {tmp_path / 'preset.py'}" in said or "a preset must assign" in said
    assert all(words in said for words in PRESETS[body]), said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_wrong_call_ends_in_a_process_of_its_own_in_time_and_without_jax(tmp_path):
    """The better of two tries; seconds times the processes that wait for each core."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise SystemExit('jax was imported')\n")
    for line in CALLS:
        took = 0.0
        for _ in range(2):
            began, waiting = time.perf_counter(), max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
            env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
            argv = [sys.executable, "-m", "nanojax", *line.split()]
            done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
            took = time.perf_counter() - began
            if took < BARE_S * waiting:
                break
        assert (done.returncode, done.stdout) == (2, ""), (line, done)
        assert done.stderr.count("\n") == 1, (line, done.stderr)
        assert took < BARE_S * waiting, (line, took)
