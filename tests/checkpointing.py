"""Small states and their checkpoints: what tests of checkpoints and of manifests start from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from nanojax.checkpoint import Checkpoints
from nanojax.step import TrainState

META = {"data": {"next_step": 7}, "config": {"model": {"depth": 2}, "text": "né\n"}, "tokenizer_sha256": "ab" * 32, "val_bpb_initial": 3.25}


def bits(state: TrainState) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def small_state(step: int = 3) -> TrainState:
    rng = np.random.default_rng(step)
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in (("a.w", (4, 6)), ("b.gain", (6,)))}
    return TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(1),
        spikes=jnp.int32(2),
        in_a_row=jnp.int32(0),
        history={"loss": jnp.arange(4.0)},
        key=jnp.array([0, 42], jnp.uint32),
        params=params,
        moments=({"count": jnp.int32(9)}, {name: jnp.asarray(rng.standard_normal(p.shape), jnp.float32) for name, p in params.items()}),
    )


def layout(state: TrainState) -> tuple[TrainState, TrainState]:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return shapes, jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), state)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def files_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def sealed(body: str) -> str:
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The checkpoints of steps 3 and 4."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    made = Checkpoints(folder, keep=2)
    for step in (3, 4):
        made.save(small_state(step), META)
    made.close()
    return folder
