"""A run's state on disk: parameters, moments, step, key, data position, config and tokenizer hash as one unit, through orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
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
from nanojax.errors import NanoJaxError, NonFiniteError, StorageError, UserError
from nanojax.files import FULL, free_bytes, mb, require_plain_folder
from nanojax.manifest import Manifest, complete_steps
from nanojax.peers import ALONE, Peers
from nanojax.step import TrainState

# orbax warns of its own internals at every save (an OCDBT merge with nothing to merge), and when a load fails, each of its
# tasks logs a traceback; what fails raises, once.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
PARAMS = "params/"
"""Where a checkpoint has the parameters: a part of it that is read alone."""
DENSEST = 20  # bytes of arrays for a byte of their files, compressed: noise has 1.1, and no trained state is mostly zeros
SLACK_BYTES = 2**26  # of arrays that may be all zeros


class Checkpoints:
    """The checkpoints of one run, a folder for each step. The run itself says how many newest to `keep`, clears what an interrupted save
    left, and puts aside what is damaged; without it, this only reads, and leaves a save that may be under way alone.
    """

    def __init__(self, folder: Path, keep: int | None = None, peers: Peers = ALONE, fault: Callable[[int], None] | None = None):
        """`fault`, of a step, is called as its save is under way, and may raise OSError (faults.py)."""
        require_plain_folder(folder)
        self.folder, self._keep, self._peers, self._fault = folder, keep, peers, fault
        self._bad: set[int] = set()
        self._damage = ""
        """Of the last that was found damaged, in words."""
        self._seen: dict[tuple[int, str], Manifest] = {}
        """(step, part) whose files were found to be those that were saved."""
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
        self.require_space(state)
        with self._whole_or_not_at_all(bytes_of(state)):
            saving = ocp.save_checkpointables_async(str(self.folder.absolute() / str(step)), parts)
        self._pending = self._background.submit(self._commit, saving, (step, bytes_of(state)), meta, digests)

    def require_space(self, state: TrainState) -> None:
        """Raise StorageError where the disk has no room for a checkpoint of a state, or of its shapes; it is about as large as those."""
        with storage(self.folder):
            if free_bytes(self.folder) < (needed := bytes_of(state)):
                raise no_space(self.folder, needed, "found before saving")

    @contextmanager
    def _whole_or_not_at_all(self, needed: int) -> Iterator[None]:
        """Around a save: `storage`, and what a failed one has written is removed: half a checkpoint must not fill the disk."""
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # what orbax's abandoned threads say of a failed save
        try:
            with storage(self.folder, needed):
                yield
            sys.unraisablehook = hook  # after a failure they go on talking until the process ends
        except StorageError:
            if self._peers.first:
                with contextlib.suppress(OSError):
                    self._clear()
            raise

    def _commit(self, saving: Any, what: tuple[int, int], meta: dict[str, Any], digests: dict[str, jax.Array]) -> None:
        """In the background: the rest of a save, its manifest, and then the end of those that are too many. `what`: step, bytes."""
        step, needed = what
        with self._whole_or_not_at_all(needed):
            saving.result()
            if self._fault:
                self._fault(step)
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

    def verify(self, wanted: int, part: str = "") -> int:
        """Step of the newest checkpoint that is what was saved, as far as its files tell; newer ones are put aside, in words.

        `wanted`: bytes of the arrays that are to be read from it, of all or of one `part`. Raises UserError where no checkpoint is left,
        or where its files cannot hold so much: whoever wrote them may claim any size, and memory is taken for what is claimed.
        """
        return self._intact(wanted, part).step

    def _intact(self, wanted: int, part: str) -> Manifest:
        """Its manifest, without the files. Process 0 looks at them, and all take the step that it names."""

        def look() -> dict[str, Any]:
            found = self._newest(wanted, part)
            return {"step": found.step, "meta": found.meta, "arrays": found.arrays}

        return Manifest(**self._peers.share(look))

    def _newest(self, wanted: int, part: str) -> Manifest:
        while (step := self.latest) is not None:
            place = self.folder / str(step)
            if (step, part) in self._seen:
                return self._seen[step, part]
            try:
                with storage(self.folder):
                    found = manifest.read(place)
                    found.check_files(place, below=part)
            except manifest.Damaged as error:
                self._put_aside(step, error)
                continue
            held = sum(size for path, (size, _) in found.files.items() if path.startswith(part))
            if wanted > SLACK_BYTES + DENSEST * held:
                raise UserError(
                    f"checkpoint {place} is of another model: its files hold {mb(held)}, and this one has {mb(wanted)}; "
                    f"give this model's --out"
                )
            with self._reading(place):
                require_small_chunks(place)
            self._seen[step, part] = found
            return found
        if self._damage:
            raise UserError(f"{self._damage}, and there is no older one; bring back a copy, or start anew with another --out")
        raise UserError(f"a run needs a checkpoint to be read, and {self.folder} has none; train it first")

    def _load(self, target: dict[str, Any]) -> tuple[dict[str, Any], Manifest]:
        """(what was asked for, the manifest) of the newest checkpoint that is not damaged; the newer ones are put aside, in words.

        What comes back wrong has the same digest on all processes.
        """
        while True:
            found = self._intact(bytes_of(target), "" if len(target) > 1 else PARAMS)
            place = self.folder / str(found.step)
            if "rest" in target:
                require_same_kind(found, target, place)
            loaded = self._from_orbax(place, target)
            try:
                found.check_arrays(in_words(digests_of(named(loaded))))
                return loaded, found
            except manifest.Damaged as error:
                self._put_aside(found.step, error)

    def _from_orbax(self, place: Path, target: dict[str, Any]) -> dict[str, Any]:
        if not target:
            return {}
        with self._reading(place):
            return ocp.load_checkpointables(str(place.absolute()), target)

    @contextmanager
    def _reading(self, place: Path) -> Iterator[None]:
        """Around orbax: what it raises where a checkpoint is none of this model, in a line."""
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # what orbax's abandoned threads say of a failed load
        with storage(self.folder):
            try:
                yield
                sys.unraisablehook = hook  # after a failure they go on talking until the process ends
            except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, RecursionError) as error:
                if isinstance(error, ValueError) and os_error(error) is not None:
                    raise  # the disk's
                raise UserError(f"checkpoint {place} is of another model ({cause(error)}); give this model's --out") from error

    def _put_aside(self, step: int, damage: manifest.Damaged) -> None:
        """Never offer a checkpoint again. The run that writes here renames it, so that nobody else takes it for one."""
        self._damage = f"checkpoint {self.folder / str(step)} is damaged: {damage}"
        self._bad.add(step)
        self._seen = {key: found for key, found in self._seen.items() if key[0] != step}
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
            print(f"nanojax: {self._damage}{moved}; step {older} is read instead", file=sys.stderr)

    def _clear(self) -> None:
        """Remove what saves left that were interrupted: folders of orbax's, and steps that never got their manifest."""
        complete = {str(step) for step in complete_steps(self.folder)}
        for child in self.folder.iterdir():
            if child.name not in complete and manifest.STEP.fullmatch(re.sub(r"\.orbax-checkpoint-tmp.*", "", child.name)):
                remove(child)

    def close(self) -> None:
        """Wait for the save that runs."""
        try:
            self.wait()
        finally:
            self._background.shutdown()


def parts_of(state: TrainState) -> dict[str, Any]:
    """A state as it lies on disk: parameters can be read alone."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
    return {"params": state.params, "rest": rest}


def named(tree: Any) -> dict[str, Any]:
    """Path -> array."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def require_same_kind(found: Manifest, target: dict[str, Any], place: Path) -> None:
    """Refuse a checkpoint whose state has other parts, parameters and moments aside."""
    there, wanted = ({name for name in names if name.startswith("rest/")} for names in (found.arrays, named(target)))
    if strange := sorted(name for name in there ^ wanted if not name.startswith("rest/moments/")):
        name = strange[0].removeprefix("rest/")
        why = (
            f"has no {name}: an older nanojax wrote it, or a run with --no-skip-spikes"
            if strange[0] in wanted
            else f"has {name}: a newer nanojax wrote it, or a run without --no-skip-spikes"
        )
        raise UserError(
            f"checkpoint {place} {why}; go on with the same version and flags, or start anew from its weights with "
            f"--init-from {place.parent.parent}"
        )


def remove(step: Path) -> None:
    """Remove a checkpoint. Its manifest goes first: what is left is none. Of a link, the link alone."""
    if step.is_symlink() or not step.is_dir():
        step.unlink(missing_ok=True)
        return
    with contextlib.suppress(IsADirectoryError):  # put there by whoever harmed it; it goes with the rest
        (step / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(step, ignore_errors=True)


@contextmanager
def storage(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what a full or failing disk raises, here and inside orbax, into StorageError. `needed`: bytes of what is being saved.

    Nothing is tried again: what comes through is what kernel and file system gave up on, and whoever starts a run that ended with the
    exit code of storage does so from the last checkpoint, which is whole.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, NanoJaxError) or (number := os_error(error)) is None:
            raise
        if number in FULL:
            raise no_space(folder, needed, os.strerror(number)) from error
        raise StorageError(
            f"cannot use {folder}: {os.strerror(number)}; look at that disk, then go on with --resume, or choose another --out"
        ) from error


def os_error(error: BaseException) -> int | None:
    """The number of the system's error behind one of Python's or of tensorstore's, which says it in its words; None where there is none."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search("os_error_code='([0-9]+)'", str(error)):
        return int(found[1])
    return errno.ENOSPC if re.search("RESOURCE_EXHAUSTED|No space left", str(error)) else None


def no_space(folder: Path, needed: int | None, why: str) -> StorageError:
    """What to say of a full disk: how much is needed, how much there is."""
    what = "" if needed is None else f"a checkpoint needs about {mb(needed)}, "
    return StorageError(
        f"no space left in {folder} ({why}): {what}{mb(free_bytes(folder))} are free, quotas aside; free some there and go on with "
        f"--resume, or give another --out"
    )


def require_small_chunks(place: Path) -> None:
    """Raise ValueError where an array is stored in pieces larger than itself: memory is taken for a whole one, or the process ends."""
    for array in jax.tree.leaves(ocp.checkpointables_metadata(str(place.absolute())).metadata):
        chunk = array.storage_metadata.chunk_shape
        if len(chunk) != len(array.shape) or any(c > max(n, 1) for c, n in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"an array of shape {array.shape} in pieces of {chunk}")


def bytes_of(tree: Any) -> int:
    """Of arrays, or of shapes of arrays, all together."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


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
