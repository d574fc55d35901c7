"""Whole runs of a tiny model on a generated corpus, as fixtures for the tests that look at runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nanojax import train as train_module
from nanojax.cli import load_preset
from nanojax.config import Config
from nanojax.data.loader import Loader
from nanojax.data.shards import prepare
from nanojax.runs import RunFolder

TIMING = {"seconds", "tokens_per_second"}  # of a record, what two equal runs need not share
PRESET = '''"""A run of seconds, for tests."""

from nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, nanochat

sizes = dict(depth=2, d_model=64, head_dim=16, d_ffn=128, seq_len=64, vocab_size=512)
config = Config(
    model={model}(**sizes),
    train=TrainConfig(steps=40, batch_tokens=512, micro_batch=4, eval_every=20, eval_tokens=1024, save_every=10, loss_blocks=2),
    optim=OptimConfig(warmup_steps=5, reference_batch=None),
    data=DataConfig(path={path!r}, cache={cache!r}, packing="concat", val_fraction=0.1),
)
'''


@dataclass(frozen=True)
class Run:
    """A run that ended, and what went into its steps."""

    folder: RunFolder
    batches: list[str]
    """Hashes of the inputs and targets of each step, in the order in which the run took them."""

    @property
    def summary(self) -> dict:
        return json.loads((self.folder.path / "summary.json").read_text())

    @property
    def records(self) -> list[dict]:
        """metrics.jsonl without what depends on the clock."""
        lines = self.folder.metrics.read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]


@functools.cache
def make_presets(folder: Path, cache: Path) -> dict[str, str]:
    """Paths of the presets 'modern' and 'nanochat' over one corpus: four documents longer than any step, and many short ones."""
    rng = random.Random(7)
    syllables = ["ba", "ko", "ri", "tun", "mel", "sa", "vo", "di", "qua", "ne", "pil", "zor"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(200)]
    frequency = [1 / (rank + 1) for rank in range(200)]  # Zipf: there is something to learn
    (folder / "corpus").mkdir(parents=True)
    with open(folder / "corpus/a.jsonl", "w") as file:
        for n in range(60):
            length = 3000 if n % 15 == 1 else rng.randint(20, 300)
            file.write(json.dumps({"text": " ".join(rng.choices(words, frequency, k=length)) + "."}) + "\n")
    made = {}
    for name, model in (("modern", "ModelConfig"), ("nanochat", "nanochat")):
        made[name] = str(folder / f"{name}.py")
        text = PRESET.replace("{model}", model).replace("{path!r}", repr(str(folder / "corpus"))).replace("{cache!r}", repr(str(cache)))
        Path(made[name]).write_text(text)
    return made


def train(preset: str | None, *flags: str, out: Path, expect=None, at=None) -> Run:
    """`nanojax train` in this process, which saves the start of another. `at` is (step, what to call as that step takes its batch)."""
    taken: list[str] = []
    original = Loader.__next__

    def spy(self):
        if at and self.get_state()["next_step"] == at[0]:
            at[1]()
        batch = original(self)
        taken.append(hashlib.sha256(np.asarray(batch.inputs).tobytes() + np.asarray(batch.targets).tobytes()).hexdigest())
        return batch

    argv = [*([preset] if preset else []), "--out", str(out), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__next__", spy)
        if expect is None:
            train_module.main(argv)
        else:
            with pytest.raises(expect) if expect else contextlib.nullcontext():
                train_module.main(argv)
    return Run(RunFolder(out), taken)


@functools.cache
def undisturbed(preset: str, out: Path) -> Run:
    """That run in that folder."""
    return train(preset, out=out)


@pytest.fixture(scope="module")
def presets(tmp_path_factory, cache_dir) -> dict[str, str]:
    """The same for all tests of a session: see make_presets."""
    return make_presets(tmp_path_factory.getbasetemp() / "training", cache_dir)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(preset, *flags, out=a new folder, ...): see train."""
    return lambda *words, out=None, **how: train(*words, out=out or tmp_path_factory.mktemp("run") / "run", **how)


@pytest.fixture(scope="module")
def straight(presets, tmp_path_factory) -> Run:
    """The undisturbed run that the others are compared with, the same for all tests of a session."""
    return undisturbed(presets["modern"], tmp_path_factory.getbasetemp() / "training/straight")


@pytest.fixture(scope="module")
def config(straight) -> Config:
    """Resolved, as saved."""
    return straight.folder.read()[0]


@pytest.fixture(scope="module")
def data(presets):
    config = load_preset(presets["modern"])
    return prepare(config.data, config.model.vocab_size, lambda _: None)
