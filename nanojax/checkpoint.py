"""A run's state on disk: parameters, moments, step, key, data position, config and tokenizer hash as one unit, through orbax."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from nanojax.errors import NonFiniteError, StorageError, UserError
from nanojax.step import TrainState

# orbax warns of its own internals at every save (an OCDBT merge with nothing to merge), and when a load fails, each of its
# tasks logs a traceback; what fails raises, once.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)


class Checkpoints:
    """The checkpoints of one run, numbered by step. The run itself says how many newest to `keep`, and clears what an
    interrupted save left; without it, this only reads, and leaves a save that may be under way alone.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder, self._keep = folder, keep
        with storage(folder):
            self._orbax = ocp.training.Checkpointer(
                str(folder.absolute()),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep or 0),  # pyright: ignore[reportArgumentType]  # orbax's own two protocols disagree
                cleanup_tmp_directories=keep is not None,
            )
        self._pending: Any = None

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, None when there is none."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start saving; `meta` is JSON: data position, config, tokenizer hash. Waits first for a save that still runs.

        Raises StorageError, also for the failure of an earlier save.
        """
        step = int(state.step)
        self.wait()
        if step == self.latest:
            return
        rest = {"step": state.step, "skipped": state.skipped, "key": state.key, "moments": state.moments}
        assert self._keep is not None, "opened for reading"
        with storage(self.folder):
            self._pending = self._orbax.save_checkpointables_async(
                step, {"params": state.params, "rest": rest, "meta": {"json": json.dumps(meta)}}, force=True
            )

    def wait(self) -> None:
        """Until the save that runs is on disk. Raises StorageError when it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with storage(self.folder):
                pending.result()

    def restore(self, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(newest state, its meta), laid out by `shardings`, whatever mesh it was saved from."""
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        rest = {"step": target.step, "skipped": target.skipped, "key": target.key, "moments": target.moments}
        loaded = self._load({"params": target.params, "rest": rest, "meta": None})
        return TrainState(params=loaded["params"], **loaded["rest"]), json.loads(loaded["meta"]["json"])

    def restore_params(self, shapes: dict[str, Any], shardings: dict[str, Any]) -> dict[str, jax.Array]:
        """Parameters alone, without the moments."""
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in shapes.items()}
        return self._load({"params": target})["params"]

    def finite_params(self, shapes: dict[str, Any], shardings: dict[str, Any]) -> dict[str, jax.Array]:
        """`restore_params` for a model that is used. Raises NonFiniteError where values are not finite: no run saves such, a disk may."""
        params = self.restore_params(shapes, shardings)
        counts = jax.device_get({name: not_finite(w) for name, w in params.items()})
        if bad := [name for name, count in counts.items() if count]:
            raise NonFiniteError(
                f"weights must be finite, and {bad[0]} in {self.folder / str(self.latest)} has {counts[bad[0]]} values that are not; "
                f"move that folder away to go on from an older one"
            )
        return params

    def meta(self) -> dict[str, Any]:
        """Meta of the newest checkpoint."""
        return json.loads(self._load({"meta": None})["meta"]["json"])

    def _load(self, target: dict[str, Any]) -> dict[str, Any]:
        step = self.latest
        if step is None:
            raise UserError(f"a run needs a checkpoint to be read, and {self.folder} has none; train it first")
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # what orbax's abandoned threads say of a failed load
        with storage(self.folder):
            try:
                loaded = self._orbax.load_checkpointables(step, target)
                sys.unraisablehook = hook  # after a failure they go on talking until the process ends
                return loaded
            except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
                raise UserError(
                    f"checkpoint {self.folder / str(step)} is damaged or of another model ({cause(error)}); "
                    f"move that folder away to go on from an older one"
                ) from error

    def close(self) -> None:
        """Wait for the save that runs and let orbax go."""
        try:
            self.wait()
        finally:
            with storage(self.folder):
                self._orbax.close()  # raises the failure of a background save once more


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises, here and inside orbax, into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot use {folder}: {error.strerror or error}; free space there or choose another --out") from error
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "No space left" not in str(error):
            raise
        raise StorageError(f"no space left in {folder}; free some there, or give another --out") from error


@jax.jit
def not_finite(w: jax.Array) -> jax.Array:
    """How many values are NaN or infinite. Of one array: those of a model have few shapes, each of which compiles once."""
    return jnp.sum(~jnp.isfinite(w))


def cause(error: BaseException) -> str:
    """First line of the innermost exception: orbax wraps what went wrong in words of its own."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def state_sha256(state: TrainState, data_state: dict[str, int]) -> str:
    """SHA-256 over the names and bytes of every array of the state, in order of name, and the data position: equal runs have equal ones."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    for name, leaf in sorted(leaves.items()):
        host = np.asarray(leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True))
        digest.update(f"{name} {host.dtype} {host.shape}\n".encode())
        digest.update(np.ascontiguousarray(host).tobytes())
    digest.update(json.dumps(data_state, sort_keys=True).encode())
    return digest.hexdigest()
