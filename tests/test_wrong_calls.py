"""Wrong calls of the real command: exit code 2 and one line that states the rule, the value and the remedy, before anything is compiled.

A start of Python and of the command line takes 0.3 s, and that of jax 2 to 3 s more: most calls here share a process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanojax.__main__ import dispatch
from nanojax.config import Config, DataConfig, ModelConfig, TrainConfig
from nanojax.data.shards import prepare
from nanojax.errors import UserError, run_main
from nanojax.runs import RunFolder
from nanojax.sizes import resolve
from nanojax.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "scripts/bench"))

import decode

VOCABULARY = 300
BARE_S, DEVICE_S = 2.0, 6.0  # the promise of the issue, on an idle machine
CORES = os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a corpus, its cache, and things to point wrong calls at."""

    root: Path
    cache: Path
    poisoned: Path
    """A folder with a `jax` that raises: first on PYTHONPATH, it shows who imports jax."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("wrong")
    rng = random.Random(5)
    text = [" ".join(rng.choice("abcdefgh") * rng.randint(1, 4) for _ in range(60)) for _ in range(40)]
    for folder in ("corpus", "empty", "broken", "runs", "notes"):
        (root / folder).mkdir()
    (root / "corpus/a.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in text))
    (root / "broken/b.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    (root / "file").write_text("a regular file")
    (root / "preset_raises.py").write_text('"""No config."""\n\nlearning_rate = 1 / 0\n')
    (root / "good.py").write_text('"""Loads."""\n\nfrom nanojax.config import Config\n\nconfig = Config()\n')
    (root / "preset_without.py").write_text('"""No config."""\n')
    cache = root / "cache"
    data = DataConfig(path="corpus", cache="cache", packing="concat")
    made = prepare(dataclasses.replace(data, path=str(root / "corpus"), cache=str(cache)), VOCABULARY, lambda _: None)
    model = ModelConfig(depth=1, d_model=64, head_dim=16, seq_len=64, vocab_size=VOCABULARY)  # as TRAIN below
    config = resolve(Config(model=model, train=TrainConfig(steps=9, batch_tokens=2048), data=data), made.tokenizer.n_vocab)
    run = RunFolder(root / "runs/finished")  # looks like a run with a checkpoint as long as nobody reads that
    run.make()
    run.write(config, made)
    (run.checkpoints / "5").mkdir(parents=True)
    (run.checkpoints / "5/manifest.json").touch()
    stray = RunFolder(root / "runs/swapped")  # its tokenizer was overwritten by that of another run
    stray.make()
    stray.write(config, made)
    (stray.checkpoints / "5").mkdir(parents=True)
    (stray.checkpoints / "5/manifest.json").touch()
    other = Tokenizer.train(["another text, another vocabulary " * 9], 270)
    other.save(root / "other.json")
    other.save(stray.path / "tokenizer.json")
    begun = RunFolder(root / "runs/begun")
    begun.make()
    begun.write(config, made)
    (root / "half").mkdir()  # an export that was interrupted
    (root / "half/model.safetensors").write_bytes(b"")
    (root / "runs/garbled").mkdir()
    (root / "runs/garbled/config.json").write_text("{")
    corrupt = prepare(DataConfig(path=str(root / "corpus"), cache=str(root / "corrupt")), VOCABULARY, lambda _: None)
    shard = corrupt.folder / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    short = prepare(DataConfig(path=str(root / "corpus"), cache=str(root / "short")), VOCABULARY, lambda _: None)
    shard = short.folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    poisoned = root / "poisoned"
    (poisoned / "jax").mkdir(parents=True)
    (poisoned / "jax/__init__.py").write_text("raise SystemExit('jax was imported')\n")
    return World(root, cache, poisoned)


def call(world: World, line: str, *, device: bool) -> tuple[subprocess.CompletedProcess, float]:
    """`nanojax LINE` in the world's folder, and its seconds: the better of two tries, because others share the cores."""
    argv = [sys.executable, "-m", "nanojax", *line.split()]
    env = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "" if device else str(world.poisoned)}
    env.pop("XLA_FLAGS", None)
    limit, took = allowed(device), 0.0
    for _ in range(2):
        began = time.perf_counter()
        done = subprocess.run(argv, cwd=world.root, env=env, capture_output=True, text=True, timeout=120, check=False)
        took = time.perf_counter() - began
        if took < limit:
            break
    return done, took


def allowed(device: bool) -> float:
    """The promised seconds, times how many processes wait for each core: on an idle machine exactly the promise."""
    return (DEVICE_S if device else BARE_S) * max(1.0, os.getloadavg()[0] / CORES)


def check(code: object, took: float, said: str, words: tuple[str, ...], *, device: bool) -> None:
    lines = said.strip().splitlines()
    assert "Traceback" not in said, said
    assert "jax was imported" not in f"{code} {said}", "it needs no device, and imported jax"
    assert code == 2, (code, said)
    assert 1 <= len(lines) <= 3, said
    assert lines[-1].startswith("nanojax: error: "), said
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"
    assert took < allowed(device), f"{took:.1f} s"


# Every line of stdin as a command; of each its exit code, its seconds, and what it said.
ONE_BY_ONE = """
import contextlib, io, json, sys, time
from nanojax.__main__ import dispatch
from nanojax.errors import run_main

for line in json.load(sys.stdin):
    err, began = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = run_main(dispatch, line.split())
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, time.perf_counter() - began, err.getvalue()]))
"""


@pytest.fixture(scope="module")
def answers(world) -> dict[str, tuple[object, float, str]]:
    """Command -> (exit code, seconds, stderr) of all in BARE, in one process in which nobody may import jax."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(world.poisoned)}
    lines, argv = json.dumps(list(BARE)), [sys.executable, "-c", ONE_BY_ONE]
    done = subprocess.run(argv, input=lines, cwd=world.root, env=env, capture_output=True, text=True, timeout=120, check=True)
    return dict(zip(BARE, map(json.loads, done.stdout.splitlines()), strict=True))


TRAIN = "train --depth 1 --d-model 64 --head-dim 16 --seq-len 64 --batch-tokens 2048 --steps 9 --vocab-size 300 --data.packing concat"
HERE = f"{TRAIN} --data.path corpus --data.cache cache"

# What is called: (the words that stderr must hold: the value given, and the remedy).
BARE = {
    # The ten, but for the mesh.
    f"{HERE} --dept 12": ("--dept", "did you mean --depth?"),
    f"{HERE} --n-kv-head 3": ("n_head=4", "n_kv_head=3", "try --n-kv-head 2"),
    f"{HERE} --d-model 65 --head-dim 13": ("head_dim=13", "even", "try 14"),
    f"{TRAIN} --data.path nowhere --data.cache cache": ("--data.path nowhere does not exist", "give a folder"),
    f"{TRAIN} --data.path empty --data.cache cache": ("--data.path empty holds no", "--data.glob"),
    f"{TRAIN} --data.path corpus --data.cache corrupt --out r1": ("train-00000.bin is corrupt", "SHA-256", "delete"),
    f"{TRAIN} --data.path corpus --data.cache short --out r1": ("train-00000.bin is corrupt", "bytes, expected", "delete"),
    f"{HERE} --out file/below": ("file/below", "try another --out"),
    f"{HERE} --out /proc/nanojax": ("/proc/nanojax", "try another --out"),
    "train good.py --out runs/nothing --resume": ("--resume needs a checkpoint", "runs/nothing has none", "drop --resume"),
    f"{HERE} --out runs/begun --resume": ("--resume needs a checkpoint", "runs/begun has none", "drop --resume"),
    f"{HERE} --out runs/finished --resume --tokenizer other.json": ("tokenizer", "add --tokenizer runs/finished/tokenizer.json"),
    # Others that people make.
    "trian --depth 1": ("unknown verb 'trian'", "did you mean train?"),
    "train configs/nothing.py": ("'configs/nothing.py' is none", "try configs/tiny.py"),
    f"{HERE} --stop-after 0": ("--stop-after", "given 0", "try 1"),
    "eval notes": ("notes does not", "give the folder of a training run"),
    "eval runs/swapped": ("runs/swapped/tokenizer.json", "put the run's own tokenizer back"),
    "sample notes": ("notes does not", "give the folder of a training run"),
    "export runs/finished packed --format int4": ("d_model=64", "128", "--int4-group 64"),
    "eval half": ("half does not", "nanojax export"),
    "sample runs/finished --temperature -0.5": ("temperature=-0.5", "try 0.8"),
}
# More of them, in this process: what differs from those above is the message, not how the process ends.
QUICK = {
    "frobnicate": ("unknown verb 'frobnicate'", "there are train, launch, eval"),
    "train preset_raises.py": ("preset_raises.py", "ZeroDivisionError", "run it with python"),
    "train preset_without.py": ("preset_without.py", "config = Config("),
    f"{HERE} --steps 0": ("steps=0", "above 0"),
    f"{HERE} --depth twelve": ("twelve", "--depth", "--help"),
    f"{HERE} --ffn gelu": ("gelu", "swiglu", "--help"),
    f"{HERE} --optim.warmdown 1.5": ("optim.warmdown=1.5", "between 0 and 1"),
    f"{HERE} --batch-tokens 100": ("batch_tokens=100", "seq_len=64", "try --batch-tokens 128"),
    f"{HERE} --mesh data=2,tensors=2": ("'tensors=2'", "try --mesh data=2,fsdp=2"),
    f"{HERE} --tokenizer gpt5": ("gpt5",),
    f"{TRAIN} --data.path broken --data.cache cache": ("b.jsonl:2", "rename"),
    f"{HERE} --out runs/finished": ("runs/finished already holds a run", "--resume", "another --out"),
    f"{HERE} --out runs/finished --resume --optim.matrix-lr 0.5": ("optim.matrix_lr 0.02 -> 0.5", "drop those flags"),
    "eval runs/begun": ("runs/begun/checkpoints has none", "train it first"),
    "eval runs/garbled": ("runs/garbled/config.json", "restore it or train again"),
    "eval runs/finished --eval-tokens -4": ("eval_tokens=-4", "above 0"),
    "eval": ("run", "--help"),
    "sample runs/begun": ("has none", "train it first"),
    "sample runs/finished --temperature nan": ("temperature=nan", "try 0.8"),
    "sample runs/finished --top-k -1": ("top_k=-1", "at least 0"),
    "export runs/begun out": ("has none", "train it first"),
    "export notes out": ("notes does not", "give the folder of a training run"),
    "export runs/finished": ("Missing", "OUT", "--help"),
    "export runs/finished file": ("file is not an empty one", "another OUT"),
    "export runs/finished corpus": ("corpus is not an empty one", "another OUT"),
    "export runs/finished file/below": ("file/below", "another OUT"),
    "export runs/finished out --format fp8": ("fp8", "nvfp4", "--help"),
    "export runs/finished out --int4-group 64": ("int4_group=64", "--format int4"),
    "export runs/swapped out": ("put the run's own tokenizer back",),
    "sample half": ("half does not", "nanojax export"),
    "sample file": ("file", "give the folder of a training run"),
    "tokenizer": ("train", "eval"),
    "data fetch": ("fetch", "download"),
    "train --out runs/nothing --resume": ("--resume needs a checkpoint", "runs/nothing has none", "drop --resume"),
}
# These meet the devices, as those of DEVICE do, in a process that has jax already.
QUICK |= {
    f"{HERE} --profile 5:2 --out r2": ("--profile", "'5:2'", "try --profile 20:23"),
    f"{HERE} --attn-impl cudnn --out d2": ("attn_impl=cudnn: cudnn runs on NVIDIA GPUs", "the device is a cpu", "--attn-impl auto"),
    f"{HERE} --attn-impl te --out d4": ("attn_impl=te: te runs on NVIDIA GPUs", "the device is a cpu", "--attn-impl auto"),
    f"{HERE} --micro-batch 5 --out d3": ("micro_batch=5", "try --micro-batch 4"),
}
# Of scripts/bench/decode.py, after the preset that is the default config.
BENCH = {
    "--formats foo": ("'foo'", "'nvfp4'", "--help"),
    "--formats fp8": ("'fp8'", "'nvfp4'", "--help"),
    "--formats nvfp4": ("packed weights", "choose --formats bf16"),
    "--formats": ("given []", "for the defaults"),
    "--batches": ("given ['bf16'], []", "for the defaults"),
    "--batches 1 0": ("[1, 0]", "for the defaults"),
    "--rounds 99999999999": ("99999999999", "for the defaults"),
    "--prompt 0": ("given 0 and 512", "try --prompt 512"),
    "--prompt -5": ("given -5", "try --prompt 512"),
    "--vocab-size 100": ("vocab_size=100", "at least 265", "leave it out"),
    "--compute-dtype fp32": ("compute_dtype=fp32", "drop --compute-dtype"),
    "--precision nvfp4": ("precision=nvfp4", "drop --compute-dtype and --precision"),
}
DEVICE = {
    f"{HERE} --mesh data=3,fsdp=2 --out d1": ("data=3,fsdp=2 makes 6, there are 1", "try --mesh data=1"),
    # A checkpoint is read by orbax, which imports jax.
    "sample runs/finished": ("runs/finished/checkpoints", "older"),
}


@pytest.mark.parametrize("line", BARE)
def test_a_wrong_call_is_answered_in_a_line_without_a_device(answers, line):
    check(*answers[line], BARE[line], device=False)


@pytest.mark.parametrize("line", [f"{HERE} --dept 12", "trian --depth 1"])
def test_so_it_is_as_a_process_of_its_own(world, line):
    done, took = call(world, line, device=False)
    check(done.returncode, took, done.stderr, BARE[line], device=False)


@pytest.mark.parametrize("line", QUICK)
def test_a_wrong_call_states_value_and_remedy(world, line, monkeypatch, capsys):
    monkeypatch.chdir(world.root)
    with pytest.raises(SystemExit) as stop:
        # The whole path, for jax goes on to keep programs there when this process has left the folder.
        run_main(dispatch, line.replace("--data.cache cache", f"--data.cache {world.cache}").split())
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert 1 <= len(said) <= 3
    assert said[-1].startswith("nanojax: error: ")
    assert all(word in "\n".join(said) for word in QUICK[line]), said


@pytest.mark.parametrize("line", BENCH)
def test_a_bench_that_cannot_be_is_refused_before_its_table_begins(world, line, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(decode.main, [str(world.root / "good.py"), *line.split()])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert re.fullmatch("nanojax: error: .*\n", err)
    assert all(word in err for word in BENCH[line]), err


@pytest.mark.parametrize("line", DEVICE)
def test_a_wrong_call_that_meets_the_devices_is_answered_in_a_line(world, line):
    done, took = call(world, line, device=True)
    check(done.returncode, took, done.stderr, DEVICE[line], device=True)


def test_nothing_is_left_behind_by_calls_that_fail_before_they_write(world):
    for line in (f"{HERE} --n-kv-head 3 --out left", f"{HERE} --out left --resume"):
        assert call(world, line, device=False)[0].returncode == 2
    assert not (world.root / "left").exists()


def test_debug_brings_the_traceback_back(world):
    done, _ = call(world, f"{HERE} --n-kv-head 3 --debug", device=False)
    assert "Traceback" in done.stderr
    assert UserError.__name__ in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("line", ["--help", "train --help", "sample --help"])
def test_help_comes_without_jax(world, line):
    done, took = call(world, line, device=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: nanojax" in done.stdout
    assert took < allowed(device=False)


def test_the_config_is_printed_without_jax_and_with_the_flags_applied(world):
    done, _ = call(world, f"{HERE} --optim.matrix-lr 0.5 --print-config", device=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "model.depth = 1\n" in done.stdout
    assert "optim.matrix_lr = 0.5\n" in done.stdout


@pytest.mark.parametrize(
    ("flags", "vocab"), [("", 384), (" --tokenizer other.json", 384), (" --tokenizer gpt2", 300)], ids=["trained", "loaded", "named"]
)
def test_the_printed_config_is_the_resolved_one_where_its_vocabulary_is_here(world, flags, vocab, monkeypatch, capsys):
    monkeypatch.chdir(world.root)
    dispatch(f"{HERE}{flags} --print-config".split())
    said = capsys.readouterr().out
    assert f"model.vocab_size = {vocab}\n" in said  # 300 and other.json's 270 to full tiles of 128
    assert ("model.d_ffn = 256\n" in said) == (vocab == 384)
    assert "train.micro_batch = None\n" in said, "that follows from the devices"
