"""Folders of strangers: whoever reads one refuses it in a line, before memory is taken, and touches nothing outside it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import jax
import pytest
import tensorstore as ts
from checkpointing import files_of, sealed
from exporting import STEP, runs  # noqa: F401  # fixture

from nanojax import manifest
from nanojax.__main__ import dispatch
from nanojax.errors import run_main
from nanojax.runs import RunFolder

MOST_RSS = 200 * 2**20  # reliability.md, S10
# coroutines that orbax leaves behind when a load fails, said of whenever Python collects them
pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Bomb:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Bomb(canary.with_name("made")))


def step(run: Path) -> Path:
    return run / "checkpoints" / str(STEP)


def replaced(path: Path, make) -> None:
    path.unlink(missing_ok=True)
    make(path)


def config(run: Path, section: str, **changes) -> None:
    """A config that says something else, and weights whose manifest agrees with all of it."""
    record = json.loads((run / "config.json").read_text())
    record["config"].setdefault(section, {}).update(changes)
    (run / "config.json").write_text(json.dumps(record))


def stored(run: Path, change) -> None:
    """An array whose description in the store is another, under a manifest that fits."""
    old = manifest.read(step(run))
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{step(run)}/params/"}).result()
    key = next(key for key in store.list().result() if key.endswith(b"zarr.json"))
    record = json.loads(store.read(key).result().value)
    change(record)
    store.write(key, json.dumps(record).encode()).result()
    manifest.write(step(run), STEP, old.meta, old.arrays)


def ten_tb_chunks(record) -> None:
    """Decoded with nothing but its metadata believed, this ends the process: std::bad_alloc."""
    record["chunk_grid"]["configuration"]["chunk_shape"] = [2**21, 2**20]
    record["codecs"][0]["configuration"]["chunk_shape"] = [2**21, 2**20]


def manifest_with(run: Path, change) -> None:
    record = json.loads((step(run) / manifest.NAME).read_text().rsplit("\n", 2)[0])
    change(record)
    (step(run) / manifest.NAME).write_text(sealed(json.dumps(record)))


def a_file(run: Path) -> Path:
    return next(step(run) / name for name in files_of(step(run)) if "params/d/" in name)


# What is done to a run's folder, with a canary beside it that must stay as it is, and the words that refuse it.
FOLDERS = {
    "a pickle in a checkpoint": (
        lambda run, out: (step(run) / "params/w.pkl").write_bytes(pickled(out)), r"w\.pkl does not belong to it"),
    "a pickle for a checkpoint's file": (
        lambda run, out: a_file(run).write_bytes(pickled(out)), r"has \d+ bytes instead of"),
    "a link to a file outside": (lambda run, out: replaced(a_file(run), lambda path: path.symlink_to(out)), "is no regular file"),
    "a pipe in a checkpoint": (lambda run, out: replaced(a_file(run), os.mkfifo), "is no regular file"),
    "a checkpoint that is a link": (
        lambda run, out: (step(run).rename(out.parent / "moved"), step(run).symlink_to(out.parent / "moved")), "it is a link, and"),
    "checkpoints that are a link": (
        lambda run, out: ((run / "checkpoints").rename(out.parent / "all"), (run / "checkpoints").symlink_to(out.parent / "all")),
        "checkpoints must be a folder itself, and is a link"),
    "a device for a manifest": (
        lambda run, out: replaced(step(run) / manifest.NAME, lambda path: path.symlink_to("/dev/zero")), "has none|no file of a size"),
    "a manifest of 10 TB": (lambda run, out: os.truncate(step(run) / manifest.NAME, 10**13), "no file of a size that a manifest has"),
    "../ in a manifest": (
        lambda run, out: manifest_with(run, lambda r: r["files"].update({f"../../../{out.name}": [4, "0" * 64]})), "is missing"),
    "pieces of 10 TB": (lambda run, out: stored(run, ten_tb_chunks), "is of another model .*in pieces of"),
    "an array of 10 TB": (lambda run, out: stored(run, lambda r: r.update(shape=[2**21, 2**20])), "is of another model"),
    "a model of 10 TB": (lambda run, out: config(run, "model", depth=1024, d_model=2**17), "its files hold|has depth=1024"),
    "a model of a million blocks": (lambda run, out: config(run, "model", depth=10**6), "must be at most 1024"),
    "a config that is a pipe": (lambda run, out: replaced(run / "config.json", os.mkfifo), r"config\.json must be a regular file"),
    "a config of 10 TB": (lambda run, out: os.truncate(run / "config.json", 10**13), r"at most [\d,]+ are read"),
    "a deep config": (lambda run, out: (run / "config.json").write_text("[" * 10**6), "is not a run's config"),
    "a name twice": (
        lambda run, out: (run / "config.json").write_text('{"config": {}, "config": {}}'), "is not a run's config .it has a name twice"),
    "an unknown class": (lambda run, out: config(run, "os.system", _target_="os.system"), r"given also \['os\.system'\]"),
    "an unknown field": (lambda run, out: config(run, "model", __reduce__="os.system"), "is not a run's config"),
    "a cache in the folder": (lambda run, out: config(run, "data", cache=f"{run}/../run/cache"), r"data\.cache must not lie in"),
    "a tokenizer that is a link": (
        lambda run, out: replaced(run / "tokenizer.json", lambda path: path.symlink_to("/dev/zero")), r"tokenizer\.json must be a regular"),
    "metrics that are a link": (lambda run, out: (run / "metrics.jsonl").symlink_to(out), r"metrics\.jsonl must be a regular file"),
    "a picture that is a link": (lambda run, out: (run / "loss.png").symlink_to(out), r"loss\.png must be a regular file"),
}  # fmt: skip
LATE = {"an array of 10 TB"}  # which orbax tells from the model's as it loads
VERBS = {
    "eval": ["eval", "{run}"],
    "sample": ["sample", "{run}", "--tokens", "1"],
    "export": ["export", "{run}", "{out}"],
    "resume": ["train", "--resume", "--out", "{run}"],
    "init-from": ["train", "{run}.py", "--init-from", "{run}", "--out", "{out}"],
}


def memory(what: str) -> int:
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    run = tmp_path / "theirs/run"
    shutil.copytree(runs.base.path, run)
    own, _ = RunFolder(run).read()
    parts = ", ".join(f"{name}={getattr(own, name)!r}" for name in ("model", "train", "data", "optim"))
    (tmp_path / "theirs/run.py").write_text(
        '"""That run."""\n\nfrom nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig\n\n'
        f"config = Config({parts})\n"
    )
    (tmp_path / "theirs/canary").write_text("mine")
    return run


@pytest.mark.parametrize(
    ("what", "verb"),
    [
        pytest.param(what, verb, marks=[] if verb == "eval" or (verb == "resume" and what not in LATE) else pytest.mark.slow)
        for what in FOLDERS
        for verb in VERBS
    ],
)
def test_a_folder_of_strangers_is_refused_by_everything_that_reads_it(copy, capsys, monkeypatch, what, verb):
    harm, words = FOLDERS[what]
    canary = copy.with_name("canary")
    harm(copy, canary)
    if what not in LATE:
        monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("it was compiled before it was looked at"))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    with pytest.raises(SystemExit) as stop:
        run_main(dispatch, [word.format(run=copy, out=copy.with_name("out")) for word in VERBS[verb]])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(said) == 1
    assert re.search(words, said[0]), said
    assert memory("VmHWM") - before < MOST_RSS
    assert canary.read_text() == "mine"
    assert not canary.with_name("made").exists()
