"""A run's state on disk: parameters, moments, step, key, data position, config and tokenizer hash as one unit, through orbax."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from nanojax import manifest
from nanojax.digests import digests_of, in_words
from nanojax.errors import NonFiniteError, StorageError, UserError
from nanojax.manifest import Manifest, complete_steps
from nanojax.peers import ALONE, Peers
from nanojax.step import TrainState

# orbax warns of its own internals at every save (an OCDBT merge with nothing to merge), and when a load fails, each of its
# tasks logs a traceback; what fails raises, once.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)


class Checkpoints:
    """The checkpoints of one run, a folder for each step. The run itself says how many newest to `keep`, clears what an interrupted save
    left, and puts aside what is damaged; without it, this only reads, and leaves a save that may be under way alone.
    """

    def __init__(self, folder: Path, keep: int | None = None, peers: Peers = ALONE):
        self.folder, self._keep, self._peers = folder, keep, peers
        self._bad: set[int] = set()
        self._damage = ""
        """Of the last that was found damaged, in words."""
        self._pending: Future[None] | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if keep is not None and peers.first:
            with storage(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._clear()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint that is not known to be damaged, None when there is none."""
        return max((step for step in complete_steps(self.folder) if step not in self._bad), default=None)

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start saving; `meta` is JSON: data position, config, tokenizer hash. Waits first for a save that still runs. All processes save.

        Raises StorageError, also for the failure of an earlier save.
        """
        assert self._keep is not None, "opened for reading"
        step = int(state.step)
        self.wait()
        if step == self._peers.share(lambda: self.latest):
            return
        parts = parts_of(state)
        digests = digests_of(named(parts))  # before the next step is given these buffers
        with storage(self.folder):
            saving = ocp.save_checkpointables_async(str(self.folder.absolute() / str(step)), parts)
        self._pending = self._background.submit(self._commit, saving, step, meta, digests)

    def _commit(self, saving: Any, step: int, meta: dict[str, Any], digests: dict[str, jax.Array]) -> None:
        """In the background: the rest of a save, its manifest, and then the end of those that are too many."""
        with storage(self.folder):
            saving.result()
            words = in_words(digests)
            if self._peers.first:
                try:
                    manifest.write(self.folder / str(step), step, meta, words)
                except manifest.Damaged as error:
                    raise StorageError(
                        f"what was just saved in {self.folder / str(step)} is not all there: {error}; look at the disk"
                    ) from error
                for old in [n for n in complete_steps(self.folder) if n < step][: -(self._keep or 1) + 1 or None]:
                    remove(self.folder / str(old))
            self._peers.barrier("checkpoint")  # what is a checkpoint to one process is one to all

    def check(self) -> None:
        """Raise StorageError where the save in the background has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the save that runs is a checkpoint. Raises StorageError when it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(newest state that is not damaged, its meta), laid out by `shardings`, whatever mesh it was saved from."""
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        loaded, found = self._load(parts_of(target))
        return TrainState(params=loaded["params"], **loaded["rest"]), found.meta

    def restore_params(self, shapes: dict[str, Any], shardings: dict[str, Any]) -> dict[str, jax.Array]:
        """Parameters alone, without the moments."""
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in shapes.items()}
        return self._load({"params": target})[0]["params"]

    def finite_params(self, shapes: dict[str, Any], shardings: dict[str, Any]) -> dict[str, jax.Array]:
        """`restore_params` for a model that is used. Raises NonFiniteError where values are not finite: no run saves such."""
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
        return self._load({})[1].meta

    def _load(self, target: dict[str, Any]) -> tuple[dict[str, Any], Manifest]:
        """(what was asked for, the manifest) of the newest checkpoint that is not damaged; the newer ones are put aside, in words.

        Process 0 looks at the files, and all read the step that it names. What comes back wrong has the same digest everywhere.
        """
        while True:
            found = Manifest(**self._peers.share(lambda: self._newest(below="" if len(target) > 1 else "params/")))
            place = self.folder / str(found.step)
            loaded = self._from_orbax(place, target)
            try:
                found.check_arrays(in_words(digests_of(named(loaded))))
                return loaded, found
            except manifest.Damaged as error:
                self._put_aside(found.step, f"checkpoint {place} is damaged: {error}")

    def _newest(self, below: str) -> dict[str, Any]:
        """Of the newest checkpoint whose files are those of its manifest, the manifest without them."""
        while (step := self.latest) is not None:
            place = self.folder / str(step)
            try:
                with storage(self.folder):
                    found = manifest.read(place)
                    found.check_files(place, below=below)
                return {"step": step, "meta": found.meta, "arrays": found.arrays}
            except manifest.Damaged as error:
                self._put_aside(step, f"checkpoint {place} is damaged: {error}")
        if self._damage:
            raise UserError(f"{self._damage}, and there is no older one; bring back a copy, or start anew with another --out")
        raise UserError(f"a run needs a checkpoint to be read, and {self.folder} has none; train it first")

    def _from_orbax(self, place: Path, target: dict[str, Any]) -> dict[str, Any]:
        if not target:
            return {}
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # what orbax's abandoned threads say of a failed load
        with storage(self.folder):
            try:
                loaded = ocp.load_checkpointables(str(place.absolute()), target)
                sys.unraisablehook = hook  # after a failure they go on talking until the process ends
                return loaded
            except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
                raise UserError(f"checkpoint {place} is of another model ({cause(error)}); give this model's --out") from error

    def _put_aside(self, step: int, damage: str) -> None:
        """Never offer a checkpoint again. The run that writes here renames it, so that nobody else takes it for one."""
        self._bad.add(step)
        self._damage = damage
        older, moved = self.latest, ""
        if self._keep is not None and self._peers.first:
            place = self.folder / f"{step}.corrupt"
            while place.exists():
                place = place.with_name(place.name + "_")
            with storage(self.folder):
                (self.folder / str(step)).rename(place)
            self._bad.discard(step)
            moved = f"; moved to {place.name}"
        if older is not None and self._peers.first:
            print(f"nanojax: {damage}{moved}; step {older} is read instead", file=sys.stderr)

    def _clear(self) -> None:
        """Remove what saves left that were interrupted: folders of orbax's, and steps that never got their manifest."""
        complete = {str(step) for step in complete_steps(self.folder)}
        for child in self.folder.iterdir():
            if child.name not in complete and re.fullmatch(r"[0-9]{1,10}(\.orbax-checkpoint-tmp.*)?", child.name):
                remove(child)

    def close(self) -> None:
        """Wait for the save that runs."""
        try:
            self.wait()
        finally:
            self._background.shutdown()


def parts_of(state: TrainState) -> dict[str, Any]:
    """A state as it lies on disk: parameters can be read alone."""
    return {
        "params": state.params,
        "rest": {"step": state.step, "skipped": state.skipped, "key": state.key, "moments": state.moments},
    }


def named(tree: Any) -> dict[str, Any]:
    """Path -> array."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def remove(step: Path) -> None:
    """Remove a checkpoint. Its manifest goes first: what is left is none."""
    (step / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(step, ignore_errors=True)


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
