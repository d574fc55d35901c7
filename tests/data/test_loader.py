"""The loader: one stream of rows, whatever the processes, devices, accumulation and interruptions."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nanojax.data.loader import PREFETCH_STEPS, Loader, _Placement, _Steps, validation_batches
from nanojax.data.packing import plan
from nanojax.errors import UserError
from nanojax.ops.xent import IGNORED

T = 16
ROWS = 24  # a step
N_VOCAB = 60_000


class MemoryStore:
    """TokenStore's interface; token i of the corpus is i, and every read is counted."""

    split, folder = "train", Path("nowhere")

    def __init__(self, documents: int = 150) -> None:
        lengths = np.random.default_rng(0).integers(2, 40, documents)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = np.arange(self.offsets[-1], dtype=np.uint16)
        self.tokens_read = 0

    def read(self, start: int, length: int) -> np.ndarray:
        self.tokens_read += length
        return self.tokens[start : start + length]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def make(store: MemoryStore, packing: str = "concat", **changes) -> Loader:
    args = dict(rows_per_step=ROWS, sharding=None, seed=0, n_vocab=N_VOCAB)
    return Loader(store, plan(store.offsets, T, packing, 0), **(args | changes))


def take(loader: Loader, n: int) -> list[list]:
    return [[np.asarray(part).tolist() for part in next(loader)] for _ in range(n)]


def digests(loader: Loader, n: int) -> list[str]:
    return [hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in next(loader))).hexdigest() for _ in range(n)]


def test_targets_are_the_inputs_moved_by_one_and_segments_are_those_of_the_inputs(store):
    inputs, targets, segments = next(make(store))
    assert inputs.shape == targets.shape == segments.shape == (1, ROWS, T)
    assert inputs.dtype == targets.dtype == segments.dtype == np.int32
    assert (inputs[..., 1:] == targets[..., :-1]).all()
    documents = np.searchsorted(store.offsets, inputs, side="right")
    assert ((np.diff(segments) == 1) == (np.diff(documents) != 0)).all()
    assert (segments[..., 0] == 1).all()


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_an_epoch_reads_each_row_once_and_the_next_in_another_order(store, packing):
    rows = plan(store.offsets, T, packing, 0).rows
    loader = make(store, packing, rows_per_step=1)
    first, second = ([step[0][0][0] for step in take(loader, rows)] for _ in range(2))
    assert len({tuple(row) for row in first}) == rows
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_step_longer_than_an_epoch_goes_on_into_the_next(store):
    rows = plan(store.offsets, T, "concat", 0).rows
    (long,) = take(make(store, rows_per_step=2 * rows + 3), 1)
    short = take(make(store, rows_per_step=1), 2 * rows + 3)
    assert long[0][0] == [step[0][0][0] for step in short]


def test_the_order_of_a_seed_never_changes():
    """A literal, not worked by hand: were it to move with grain's version, a resumed run would meet other data."""
    store = MemoryStore()
    store.offsets = np.array([0, 5 * T + 1])
    loader = Loader(store, plan(store.offsets, T, "concat", None), rows_per_step=5, sharding=None, seed=0, n_vocab=N_VOCAB)
    assert [(next(loader).inputs[0, :, 0] // T).tolist() for _ in range(3)] == [[2, 3, 1, 0, 4], [3, 2, 4, 1, 0], [1, 2, 0, 4, 3]]


def test_epoch_one_of_a_seed_is_not_epoch_nought_of_the_next(store):
    rows = plan(store.offsets, T, "concat", 0).rows
    zero, one = make(store, rows_per_step=rows, seed=0), make(store, rows_per_step=rows, seed=1)
    next(zero)
    assert take(zero, 1) != take(one, 1)


def test_accumulation_only_groups_the_rows_of_a_step(store):
    whole, split = next(make(store)), next(make(store, accum=3))
    for a, b in zip(whole, split, strict=True):
        assert b.shape == (3, ROWS // 3, T)
        assert (a.reshape(b.shape) == b).all()


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_loader_yields_what_an_uninterrupted_one_does(store, stop):
    uninterrupted = take(make(store), 12)
    interrupted = make(store)
    take(interrupted, stop)
    wait_until(lambda: store.tokens_read > 0 or stop == 0)
    state = json.loads(json.dumps(interrupted.get_state()))
    assert state == {"next_step": stop}
    interrupted.close()
    resumed = make(store)
    take(resumed, 2)  # the position may be set at any time, also with steps read ahead
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert take(resumed, 12 - stop) == uninterrupted[stop:]


def test_steps_read_ahead_do_not_count_as_handed_out(store):
    loader = make(store)
    next(loader)
    wait_until(lambda: store.tokens_read >= 3 * ROWS * (T + 1))
    assert loader.get_state() == {"next_step": 1}
    next(loader)
    assert loader.get_state() == {"next_step": 2}


def test_a_jump_to_a_far_step_reads_nothing_in_between(store):
    loader = make(store)
    loader.set_state({"next_step": 5_000_000})
    next(loader)
    loader.close()
    assert store.tokens_read <= (1 + PREFETCH_STEPS + 1) * ROWS * (T + 1)


@pytest.mark.parametrize("state", [{}, {"next_step": -1}, {"next_step": "3"}, {"next_index": 3}])
def test_a_position_of_another_kind_is_refused(store, state):
    with pytest.raises(UserError, match="next_step"):
        make(store).set_state(state)


@pytest.mark.parametrize("end", ["close", "collect"])
def test_no_thread_outlives_its_loader(store, end):
    before = set(threading.enumerate())
    loader = make(store)
    next(loader)
    assert set(threading.enumerate()) - before
    if end == "close":
        loader.close()
    del loader
    wait_until(lambda: not set(threading.enumerate()) - before)


class HalfOfTheRows:
    """A sharding as process p of two sees it: its device holds half of each micro-batch."""

    def __init__(self, process: int) -> None:
        self.process = process

    def addressable_devices_indices_map(self, shape):
        half = shape[1] // 2
        return {"device": (slice(None), slice(self.process * half, (self.process + 1) * half), slice(None))}


def test_two_processes_read_disjoint_halves_of_the_batches_of_one(store):
    made = plan(store.offsets, T, "best_fit", 0)
    halves = [_Steps(store, made, _Placement((3, ROWS // 3, T), HalfOfTheRows(p)), 0, N_VOCAB) for p in (0, 1)]
    whole = make(store, "best_fit", accum=3)
    for step in range(4):
        batch = next(whole)
        for part, name in enumerate(batch._fields):
            both = [half[step][part].reshape(3, ROWS // 6, T) for half in halves]
            assert (np.concatenate(both, axis=1) == batch[part]).all(), name
    whole.close()
    store.tokens_read = 0
    assert halves[0][9].inputs_RT.shape == (ROWS // 2, T)
    assert store.tokens_read == ROWS // 2 * (T + 1)


@pytest.mark.parametrize(("rows", "max_tokens"), [(8, 20 * T), (8, 19 * T + 1), (5, 10**9), (64, 3 * T), (1, 1)])
def test_validation_counts_each_target_once_also_with_a_ragged_end(store, rows, max_tokens):
    made = plan(store.offsets, T, "concat", None)
    batches = list(validation_batches(store, made, rows_per_batch=rows, max_tokens=max_tokens, sharding=None, n_vocab=N_VOCAB))
    assert all(part.shape == (1, rows, T) for batch in batches for part in batch)
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    expected = min(made.rows, -(-max_tokens // T)) * T
    assert targets[targets != IGNORED].tolist() == list(range(1, expected + 1))  # in order, from the beginning
    assert (targets[expected:] == IGNORED).all()
    for batch in batches:
        assert batch.inputs.min() >= 0
        assert batch.segments.min() >= 1


def test_ids_beyond_the_vocabulary_are_refused(store):
    top = int(store.tokens[-1])
    made = plan(store.offsets, T, "concat", None)
    args = dict(rows_per_batch=8, max_tokens=10**9, sharding=None)
    kept = (made.rows * T, made.rows * T + 1)  # the last id in a row, and the size that just holds it
    assert list(validation_batches(store, made, n_vocab=kept[1], **args))
    with pytest.raises(UserError, match=f"below the vocabulary's size {kept[0]}, given {kept[0]}"):
        list(validation_batches(store, made, n_vocab=kept[0], **args))
    loader = make(store, n_vocab=100)
    with pytest.raises(UserError, match="below the vocabulary's size 100"):
        next(loader)
    assert loader.get_state() == {"next_step": 0}
    store.tokens = np.full(top + 1, -1, np.int32)
    with pytest.raises(UserError, match="below the vocabulary's size"):
        next(make(store))


def test_rows_that_do_not_divide_are_refused(store):
    with pytest.raises(UserError, match="accum=5"):
        make(store, accum=5)


# A worker holds `devices` of the global mesh, prints digests of what it holds and leaves without closing the loader.
WORKER = """
import json, sys
from test_loader import *
from test_loader import _Placement, _Steps
import jax
process, processes, devices, port = map(int, sys.argv[1:5])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
from jax.experimental import multihost_utils
from nanojax.mesh import batch_sharding, make_mesh
store = MemoryStore()
sharding = batch_sharding(make_mesh(dict(data=2, fsdp=2, tensor=jax.device_count() // 4)))
loader = make(store, "best_fit", accum=3, sharding=sharding)
gather = multihost_utils.process_allgather if processes > 1 else lambda x: x
found = []
for _ in range(4):
    batch = next(loader)
    assert all(part.shape == (3, ROWS // 3, T) and part.sharding == sharding for part in batch)
    full = [np.asarray(gather(part, tiled=True) if processes > 1 else part) for part in batch]
    found.append(hashlib.sha256(b"".join(part.tobytes() for part in full)).hexdigest())
steps = _Steps(store, plan(store.offsets, T, "best_fit", 0), _Placement((3, ROWS // 3, T), sharding), 0, N_VOCAB)
made = plan(store.offsets, T, "concat", None)
val = [np.asarray(gather(batch.targets, tiled=True) if processes > 1 else batch.targets) for batch in
       validation_batches(store, made, rows_per_batch=8, max_tokens=20 * T, sharding=sharding, n_vocab=N_VOCAB)]
refused = ""
try:
    make(store, rows_per_step=6, sharding=sharding)
except UserError as error:
    refused = str(error)
print("FOUND" + json.dumps([found, len(steps[0].inputs_RT), np.concatenate(val).ravel().tolist(), refused]))
"""


def run_workers(processes: int, devices: int) -> list[list]:
    """What each worker found; every one must end by itself, with its loader open."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).resolve()
    paths = [str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    commands = [[sys.executable, "-c", WORKER, *map(str, (p, processes, devices, port))] for p in range(processes)]
    workers = [subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        results = [worker.communicate(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, err) in zip(workers, results, strict=True):
        assert worker.returncode == 0, err
        assert "Exception ignored" not in err
    return [json.loads(out.split("FOUND")[1].splitlines()[0]) for out, _ in results]


@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 2)])
def test_a_mesh_of_devices_and_processes_gets_the_batches_of_one(store, processes, devices):
    expected = digests(make(store, "best_fit", accum=3), 4)
    for found, rows_read, targets, refused in run_workers(processes, devices):
        assert found == expected
        assert rows_read == ROWS // processes  # each row once a process, though the tensor axis holds copies
        assert targets == [*range(1, 20 * T + 1), *[IGNORED] * 4 * T]
        assert "divide evenly over the mesh, given 6" in refused


def wait_until(condition) -> None:
    """Fail unless the condition comes true within five seconds; the reading thread needs milliseconds."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
