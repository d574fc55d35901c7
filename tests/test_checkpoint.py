"""Checkpoints: what comes back is what was saved, on any mesh, and damage is named.

Meshes of eight virtual devices need a process of their own, which is this file run as a script.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpointing import META, bits, flip, layout, sealed, small_state, two  # noqa: F401  # the last: a fixture
from jax.sharding import SingleDeviceSharding
from quick import QUICK

from nanojax import checkpoint, manifest
from nanojax.checkpoint import Checkpoints, state_sha256, storage
from nanojax.config import Config, ModelConfig, OptimConfig, TrainConfig
from nanojax.errors import NonFiniteError, StorageError, UserError
from nanojax.step import TrainState

# orbax leaves coroutines behind when a file is damaged; Python says so whenever it happens to collect them.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
MESHES = ("data=2,fsdp=2,tensor=2", "data=4,fsdp=1,tensor=2", "data=1")


# In the process with eight devices ----------------------------------------------------------------------------------------------------


def program_on(mesh: str):
    from nanojax.program import make_program

    config = Config(
        model=ModelConfig(depth=1, d_model=64, head_dim=16, n_kv_head=2, d_ffn=128, seq_len=64, vocab_size=512),
        train=TrainConfig(steps=10, batch_tokens=1024, mesh=mesh),
        optim=OptimConfig(reference_batch=None),
    )
    return make_program(config, jax.devices()[:1] if mesh == "data=1" else None)


def random_state(program) -> TrainState:
    """Every leaf full of random bits, the negative zeros, infinities and NaNs among them: zeros would compare equal to any mistake."""
    rng = np.random.default_rng(0)

    def fill(shape, sharding):
        return jax.device_put(np.frombuffer(rng.bytes(shape.size * shape.dtype.itemsize), shape.dtype).reshape(shape.shape), sharding)

    state = jax.tree.map(fill, program.shapes, program.shardings)
    return dataclasses.replace(state, step=jax.device_put(jnp.int32(5), program.shardings.step))


def reshape(folder: str) -> dict:
    """Save on the first mesh; restore on each, each time from what the one before saved."""
    jax.config.update("jax_num_cpu_devices", 8)
    program = program_on(MESHES[0])
    state = random_state(program)
    first, report = bits(state), {}
    digest = state_sha256(state, {"next_step": 7})
    for n, mesh in enumerate(MESHES):
        checkpoints = Checkpoints(Path(folder) / str(n), keep=2)
        checkpoints.save(state, META)
        checkpoints.wait()
        target = program_on(MESHES[n + 1]) if n + 1 < len(MESHES) else program
        state, meta = checkpoints.restore(target.shapes, target.shardings)
        params = checkpoints.restore_params(target.shapes.params, target.shardings.params)
        checkpoints.close()
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(target.shardings), strict=True)
        report[f"{mesh} -> {target.config.train.mesh}"] = {
            "changed": [name for name, value in bits(state).items() if value != first[name]],
            "changed_params": [name for name in params if np.asarray(params[name]).tobytes() != np.asarray(state.params[name]).tobytes()],
            "elsewhere": sum(leaf.sharding != sharding for leaf, sharding in pairs),
            "devices": len({shard.device for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards}),
            "cut": sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)),
            "same_hash": state_sha256(state, {"next_step": 7}) == digest,
            "same_meta": meta == META,
        }
    return report


@pytest.fixture(scope="module")
def reshaped(tmp_path_factory):
    argv = [sys.executable, __file__, str(tmp_path_factory.mktemp("reshaped"))]
    done = subprocess.run(argv, env=os.environ | QUICK, capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


JOURNEYS = [f"{MESHES[n]} -> {MESHES[(n + 1) % 3]}" for n in range(3)]


@pytest.mark.parametrize(("journey", "devices"), list(zip(JOURNEYS, (8, 1, 8), strict=True)))
def test_a_state_comes_back_bit_for_bit_on_another_mesh(reshaped, journey, devices):
    found = reshaped[journey]
    assert found["changed"] == []
    assert found["changed_params"] == []
    assert found["elsewhere"] == 0, "not laid out as asked"
    assert found["devices"] == devices
    assert (found["cut"] > 0) == (devices > 1)
    assert found["same_hash"]
    assert found["same_meta"]


# On one device ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield made
    made.close()


def test_meta_and_state_make_the_round_trip(checkpoints):
    state = small_state()
    checkpoints.save(state, META)
    checkpoints.wait()
    assert checkpoints.meta() == META
    restored, meta = checkpoints.restore(*layout(state))
    assert meta == META
    assert bits(restored) == bits(state)


def test_a_save_may_still_run_when_the_state_is_overwritten(checkpoints):
    """The next step is given the state's own buffers (donation) while orbax still writes."""
    state = small_state()
    before = bits(state)
    checkpoints.save(state, META)
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    moved = double(state)
    jax.block_until_ready(moved)
    checkpoints.wait()
    assert bits(checkpoints.restore(*layout(moved))[0]) == before


def test_the_newest_keep_checkpoints_stay(checkpoints):
    for step in (3, 4, 5, 9):
        checkpoints.save(small_state(step), META)
    checkpoints.wait()
    assert checkpoints.latest == 9
    assert sorted(int(child.name) for child in checkpoints.folder.iterdir()) == [5, 9]
    assert int(checkpoints.restore(*layout(small_state()))[0].step) == 9


def test_weights_that_are_not_finite_are_given_to_no_model(checkpoints):
    shapes, shardings = (each.params for each in layout(small_state()))
    checkpoints.save(small_state(3), META)
    checkpoints.wait()
    assert checkpoints.finite_params(shapes, shardings).keys() == shapes.keys()
    bad = small_state(4).params["a.w"].at[1, 2:4].set(jnp.array([jnp.nan, jnp.inf]))
    checkpoints.save(dataclasses.replace(small_state(4), params=small_state(4).params | {"a.w": bad}), META)
    checkpoints.wait()
    with pytest.raises(NonFiniteError, match=r"a\.w in .*/4 has 2 values that are not; move that folder away"):
        checkpoints.finite_params(shapes, shardings)


def test_saving_a_step_twice_saves_it_once(checkpoints):
    checkpoints.save(small_state(3), META)
    checkpoints.save(small_state(3), META | {"data": {"next_step": 8}})
    checkpoints.wait()
    assert checkpoints.meta() == META


def test_a_reader_of_checkpoints_leaves_a_save_that_runs_alone(checkpoints):
    """`nanojax sample RUN` while RUN trains: the unfinished folder of the trainer's save must not be cleared away."""
    checkpoints.save(small_state(3), META)
    checkpoints.wait()
    unfinished = checkpoints.folder / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = Checkpoints(checkpoints.folder)
    reader.meta()
    reader.close()
    assert unfinished.exists()


def test_one_bit_of_any_leaf_changes_the_hash():
    state = small_state()
    leaves, structure = jax.tree.flatten(state)
    digests = {state_sha256(state, {"next_step": 3})}
    for n, leaf in enumerate(leaves):
        content = bytearray(np.asarray(leaf).tobytes())
        content[-1] ^= 1
        flipped = np.frombuffer(bytes(content), leaf.dtype).reshape(leaf.shape)
        digests.add(state_sha256(jax.tree.unflatten(structure, [*leaves[:n], jnp.asarray(flipped), *leaves[n + 1 :]]), {"next_step": 3}))
    assert len(leaves) == 11
    assert len(digests) == 1 + len(leaves)


def test_the_hash_covers_the_data_position_and_nothing_that_may_differ():
    state = small_state()
    digest = state_sha256(state, {"next_step": 3})
    assert digest == state_sha256(small_state(), {"next_step": 3})
    assert digest != state_sha256(state, {"next_step": 4})
    reversed_params = dict(reversed(state.params.items()))
    assert digest == state_sha256(dataclasses.replace(state, params=reversed_params), {"next_step": 3})


def test_two_leaves_that_change_places_change_the_hash():
    """Names are hashed, not only bytes."""
    one = dataclasses.replace(small_state(), params={"a": jnp.ones(2), "b": jnp.zeros(2)})
    other = dataclasses.replace(small_state(), params={"a": jnp.zeros(2), "b": jnp.ones(2)})
    assert state_sha256(one, {}) != state_sha256(other, {})


def test_without_a_checkpoint_there_is_nothing_to_restore(checkpoints):
    assert checkpoints.latest is None
    for read in (lambda: checkpoints.restore(*layout(small_state())), checkpoints.meta):
        with pytest.raises(UserError, match=r"needs a checkpoint.*has none; train it first"):
            read()


@pytest.mark.parametrize("victim", ["rest/d", "params/d", "params/manifest.ocdbt"])
def test_a_run_walks_back_to_the_newest_good_checkpoint_and_puts_the_damaged_one_aside(two, tmp_path, capsys, victim):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    file = next(file for file in (folder / "4").rglob("*") if file.is_file() and victim in file.as_posix())
    flip(file, 100)
    reader = Checkpoints(folder)
    assert bits(reader.restore(*layout(small_state()))[0]) == bits(small_state(3))
    name = file.relative_to(folder / "4").as_posix()
    assert f"4 is damaged: {name} has other bytes than were saved; step 3 is read instead" in capsys.readouterr().err
    assert (folder / "4").is_dir(), "a reader moves nothing"
    run = Checkpoints(folder, keep=2)
    restored, meta = run.restore(*layout(small_state()))
    assert (bits(restored), meta) == (bits(small_state(3)), META)
    assert "moved to 4.corrupt; step 3 is read instead" in capsys.readouterr().err
    assert sorted(child.name for child in folder.iterdir()) == ["3", "4.corrupt"]
    run.save(small_state(4), META)  # the step comes round again
    run.close()
    assert bits(Checkpoints(folder).restore(*layout(small_state()))[0]) == bits(small_state(4))


def test_with_every_checkpoint_damaged_nothing_is_begun_from_scratch(two, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    for step in ("3", "4"):
        (folder / step / "_CHECKPOINT_METADATA").unlink()
    run = Checkpoints(folder, keep=2)
    with pytest.raises(UserError, match=r"3 is damaged: _CHECKPOINT_METADATA is missing, and there is no older one; bring back") as caught:
        run.restore(*layout(small_state()))
    assert "\n" not in str(caught.value)


def test_damage_on_the_way_is_found_by_the_arrays(two, tmp_path):
    """Files as the manifest has them, and an array that is not what was saved."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    source = folder / "4" / manifest.NAME
    record = json.loads(source.read_text().rpartition("}")[0] + "}")
    record["arrays"]["params/a.w"] = "0" * 32
    source.write_text(sealed(json.dumps(record)))
    reader = Checkpoints(folder)
    assert bits(reader.restore(*layout(small_state()))[0]) == bits(small_state(3))


def test_a_save_that_never_got_its_manifest_is_none_and_is_cleared_by_the_run(two, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    (folder / "4" / manifest.NAME).unlink()
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    (folder / "03").mkdir()  # somebody else's
    assert Checkpoints(folder).latest == 3
    assert (folder / "4").is_dir()
    assert Checkpoints(folder, keep=2).latest == 3
    assert sorted(child.name for child in folder.iterdir()) == ["03", "3"]


def test_a_checkpoint_of_another_model_is_refused_in_one_line(checkpoints):
    checkpoints.save(small_state(), META)
    checkpoints.wait()
    shapes, shardings = layout(small_state())
    for name in ("a.w", "c.w"):
        other = {"b.gain": shapes.params["b.gain"], name: jax.ShapeDtypeStruct((5, 6), jnp.float32)}
        places = {key: SingleDeviceSharding(jax.devices()[0]) for key in other}
        with pytest.raises(UserError, match=r"is of another model") as caught:
            checkpoints.restore(dataclasses.replace(shapes, params=other), dataclasses.replace(shardings, params=places))
        assert "\n" not in str(caught.value)


class Failing:
    """A save of orbax that fails, at once or when it is waited for."""

    def __init__(self, error: Exception, *, late: bool):
        self.error, self.late = error, late

    def save_checkpointables_async(self, *_, **__):
        if not self.late:
            raise self.error
        return self

    def result(self):
        raise self.error


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file \"x\": No space left on device"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
    ],
)  # fmt: skip
def test_a_full_or_closed_disk_is_a_storage_error_with_a_remedy(tmp_path, monkeypatch, error, late):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", Failing(error, late=late).save_checkpointables_async)

    def save():
        checkpoints.save(small_state(), META)
        checkpoints.wait()

    with pytest.raises(StorageError, match=r"checkpoints.*; (free|look at that disk)") as caught:
        save()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert checkpoints._pending is None, "a failure is reported once"


def test_other_errors_of_orbax_keep_their_name(tmp_path):
    with pytest.raises(ValueError, match="a bug of ours") as caught, storage(tmp_path):
        raise ValueError("a bug of ours")
    assert not isinstance(caught.value, StorageError)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another --out"):
        Checkpoints(tmp_path / "file/below", keep=1)


if __name__ == "__main__":
    print(json.dumps(reshape(sys.argv[1])))
