"""Runs with a checkpoint, made without training, and their exports: what tests of exports start from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nanojax.checkpoint import Checkpoints
from nanojax.config import Config, DataConfig, ModelConfig, TrainConfig
from nanojax.data.shards import prepare
from nanojax.export.command import main as export_main
from nanojax.precision import Rounding, prepare_weights
from nanojax.program import make_program
from nanojax.runs import RunFolder
from nanojax.sizes import resolve

TYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1"}
STEP = 9
FORMATS = ("int4", "nvfp4", "nvfp4_2d", "mxfp4")


@dataclass(frozen=True)
class Runs:
    """One set of weights, as the newest checkpoint of runs that were trained in whatever format is asked for."""

    root: Path
    base: RunFolder
    params: dict[str, np.ndarray]
    known: dict[Any, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def run(self, **train: Any) -> RunFolder:
        """A run with those fields of its TrainConfig."""
        name = "-".join(f"{key}={value}" for key, value in train.items()) or "base"
        folder = self.root / "runs" / name
        if not folder.exists():
            shutil.copytree(self.base.path, folder)
            config, hashes = self.base.read()
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
            RunFolder(folder).write_json("config.json", {"config": config.to_dict(), **hashes})
        return RunFolder(folder)

    def export(self, *flags: str, **train: Any) -> Path:
        """That run, exported with those flags. Not to be changed: see `altered`."""
        out = self.root / "exports" / "-".join([*flags, *(f"{key}={value}" for key, value in train.items()), "out"])
        if not out.exists():
            export_main([str(self.run(**train).path), str(out), *flags])
        return out

    def prepared(self, dtype: Any = jnp.float32, rule: str = "ceil", **train: Any) -> dict[str, np.ndarray]:
        """The weights that such a run's products read in training."""
        config, _ = self.run(**train).read()
        rounding = dataclasses.replace(Rounding.of(config, config.train.precision), rule=rule)
        if (rounding, dtype) not in self.known:
            made = jax.jit(functools.partial(prepare_weights, rounding=rounding, dtype=dtype))(self.params)
            self.known[rounding, dtype] = {name: np.asarray(w) for name, w in made.items()}
        return self.known[rounding, dtype]


@functools.cache
def make_runs(root: Path, cache: Path) -> Runs:
    """Two query heads share a key head, so that no two matrices of a block have the shape of each other's transpose."""
    rng = random.Random(11)
    (root / "corpus").mkdir(parents=True)
    words = ["ba", "ko", "ri", "tun", "melsa", "vodi", "quane", "pil", "zor"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(30, 90)))}) for _ in range(60)]
    (root / "corpus/a.jsonl").write_text("\n".join(lines) + "\n")
    data = DataConfig(path=str(root / "corpus"), cache=str(cache), packing="concat", val_fraction=0.2)
    model = ModelConfig(depth=2, d_model=64, head_dim=16, n_kv_head=2, d_ffn=128, seq_len=32, vocab_size=300)
    train = TrainConfig(steps=STEP, batch_tokens=128, loss_blocks=2, eval_tokens=512)
    prepared = prepare(data, 300, lambda _: None)
    config = resolve(Config(model=model, train=train, data=data), prepared.tokenizer.n_vocab)
    run = RunFolder(root / "base")
    run.write(config, prepared)
    program = make_program(config, jax.devices()[:1])
    draw = np.random.default_rng(3)
    params = {}
    for name, leaf in sorted(program.shapes.params.items()):
        noise = draw.standard_normal(leaf.shape)
        params[name] = np.float32(1 + 0.3 * noise if leaf.ndim == 1 else noise / leaf.shape[0] ** 0.5)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), program.shapes)
    state = dataclasses.replace(state, step=jnp.int32(STEP), params={name: jnp.asarray(w) for name, w in params.items()})
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    checkpoints.save(state, {})
    checkpoints.close()
    return Runs(root, run, params)


@pytest.fixture
def runs(tmp_path_factory, cache_dir) -> Runs:
    """The same for all tests of a session."""
    return make_runs(tmp_path_factory.getbasetemp() / "exporting", cache_dir)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file by its definition: the length of the header, the header, the bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    found = {}
    for name, entry in header.items():
        start, end = (8 + length + at for at in entry["data_offsets"])
        found[name] = np.frombuffer(content[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def altered(export: Path, to: Path, tensors: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A copy of an export with other tensors (None: without) and other fields of config.json's part of ours, its hash made to fit."""
    shutil.copytree(export, to)
    path = to / "model.safetensors"
    if tensors:
        changed = read_tensors(path) | tensors
        save_file({name: np.array(w, order="C") for name, w in changed.items() if w is not None}, path, metadata={"format": "pt"})
    record = json.loads((to / "config.json").read_text())
    record["nanojax"] |= {"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()} | fields
    (to / "config.json").write_text(json.dumps(record))
    return to
