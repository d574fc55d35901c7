"""Copies of a state that differ are named, values that are not finite are found, and a process that is slow is told of."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpointing import small_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanojax.errors import NonFiniteError
from nanojax.replicas import Look, Watch, bit_sum, odd_ones

ROOT = Path(__file__).parents[1]


class Grid:
    """As much of a mesh as `odd_ones` reads."""

    axis_names = ("data", "fsdp", "context", "tensor")


@pytest.mark.parametrize(
    ("spec", "changed", "found"),
    [
        (P(), {}, []),
        (P(), {5: 1}, [5]),
        (P("fsdp"), {5: 1}, [5]),
        (P(None, "fsdp"), {0: 7, 5: 1}, [0, 5]),
        (P(("data", "fsdp")), {5: 1}, []),  # each device has a part of its own
    ],
)
def test_the_copy_that_differs_from_most_is_the_odd_one(spec, changed, found):
    """On a mesh of data=4, fsdp=2; parts of one array differ, copies do not."""
    sums = np.zeros(8, np.uint32)
    sums[1::2] += np.uint32(3) * ("fsdp" in str(spec))
    for device, by in changed.items():
        sums[device] += by
    assert odd_ones(sums.reshape(4, 2, 1, 1), Grid, spec) == found


def test_of_two_that_differ_nobody_knows_which_is_right():
    assert odd_ones(np.array([1, 2], np.uint32).reshape(2, 1, 1, 1), Grid, P()) == [0, 1]


def test_any_bit_that_flips_changes_the_sum():
    x = np.random.default_rng(0).standard_normal(6).astype(np.float32)
    whole = int(bit_sum(jnp.asarray(x)))
    for bit in range(8 * x.nbytes):
        content = bytearray(x.tobytes())
        content[bit // 8] ^= 1 << bit % 8
        assert int(bit_sum(jnp.asarray(np.frombuffer(bytes(content), np.float32)))) != whole, bit
    assert int(bit_sum(jnp.array([1.0, -2.5], jnp.float32))) == (0x3F800000 + 0xC0200000) % 2**32  # by hand


@pytest.fixture(scope="module")
def watch(mesh) -> Watch:
    return Watch(mesh, jax.tree.map(lambda _: NamedSharding(mesh, P()), small_state()))


def test_values_that_are_not_finite_are_found_in_the_parameters(watch):
    state = small_state()
    watch.start(3, state, 0.1)
    step, look = watch.read()
    watch.require_finite(look, step)
    watch.require_equal(look, step)
    assert watch.read() is None
    for bad in (jnp.nan, -jnp.inf):
        watch.start(4, dataclasses.replace(state, params=state.params | {"b.gain": state.params["b.gain"].at[2].set(bad)}), 0.1)
        with pytest.raises(NonFiniteError, match=r"after step 4, b\.gain has values that are not finite"):
            watch.require_finite(watch.read()[1], 4)


def slow(watch: Watch, *busy: float, seconds: float = 0.4) -> list[str]:
    """What is said where each of several processes has one device."""
    devices = np.array([type("Device", (), {"process_index": n})() for n in range(len(busy))], object)
    watch.mesh = type("Mesh", (), {"devices": devices})()
    return watch.slow(Look(np.zeros((2, 1)), np.zeros((2, 1)), np.array(busy, np.float32)), seconds)


def test_a_process_that_keeps_the_others_waiting_is_named_once_until_it_no_longer_does(mesh, monkeypatch):
    watch = Watch(mesh, jax.tree.map(lambda _: NamedSharding(mesh, P()), small_state()))
    assert slow(watch, 0.001, 0.002) == slow(watch, 0.09, 0.01, 0.02) == []
    assert slow(watch, np.nan, np.nan) == []
    (words,) = slow(watch, 0.001, 0.2)
    assert words.startswith("process 1 takes 0.200 s of each step's 0.400 on its host, where 0.001 is usual, and the others wait")
    assert slow(watch, 0.001, 0.2) == []
    assert slow(watch, 0.001, 0.001) == []
    assert len(slow(watch, 0.2, 0.01, 0.02, 0.3)) == 2


FLIPS = """
    import dataclasses, jax, numpy as np
    from nanojax.config import Config, ModelConfig, TrainConfig
    from nanojax.errors import DriftError
    from nanojax.program import make_program
    from nanojax.replicas import Watch
    from nanojax.sizes import resolve

    model = ModelConfig(depth=1, d_model=32, head_dim=16, d_ffn=48, seq_len=8, vocab_size=128)
    for mesh in ("data=8", "data=4,fsdp=2"):
        train = TrainConfig(steps=4, batch_tokens=64, mesh=mesh)
        program = make_program(resolve(Config(model=model, train=train), 128))
        watch = Watch(program.mesh, program.shardings)
        with jax.set_mesh(program.mesh):
            state = jax.block_until_ready(program.init(jax.random.key(0)))
            watch.start(1, state, 0.0)
            watch.require_equal(watch.read()[1], 1)
            for n in range(8):
                name = sorted(state.params)[n]
                w = state.params[name]
                shards = list(w.addressable_shards)
                bits = np.array(shards[n].data).view(np.uint32)
                bits.flat[n % bits.size] ^= 1 << (4 * n)
                copy = jax.device_put(bits.view(np.float32), shards[n].device)
                parts = [copy if m == n else shard.data for m, shard in enumerate(shards)]
                bad = jax.make_array_from_single_device_arrays(w.shape, w.sharding, parts)
                watch.start(n, dataclasses.replace(state, params=state.params | {name: bad}), 0.0)
                try:
                    watch.require_equal(watch.read()[1], n)
                    print("silent")
                except DriftError as error:
                    print(mesh, str(error) == f"after step {n}, params/{name} has other bits on device {shards[n].device.id} of process 0"
                          " than in the other copies")
"""


def on_eight_devices(code: str) -> str:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_bit_that_flips_on_any_of_eight_devices_is_named_with_its_parameter():
    assert on_eight_devices(FLIPS).splitlines() == ["data=8 True"] * 8 + ["data=4,fsdp=2 True"] * 8


PROCESSES = """
    import sys, jax
    rank, port = int(sys.argv[1]), sys.argv[2]
    jax.distributed.initialize(f"127.0.0.1:{port}", 3, rank)
    import numpy as np
    from nanojax.config import Config, ModelConfig, TrainConfig
    from nanojax.errors import DriftError
    from nanojax.faults import Faults, parse_faults
    from nanojax.program import make_program
    from nanojax.replicas import Watch
    from nanojax.sizes import resolve
    from dataclasses import replace

    model = ModelConfig(depth=1, d_model=32, head_dim=16, d_ffn=48, seq_len=8, vocab_size=128)
    program = make_program(resolve(Config(model=model, train=TrainConfig(steps=4, batch_tokens=24)), 128))
    watch = Watch(program.mesh, program.shardings)
    with jax.set_mesh(program.mesh):
        state = jax.block_until_ready(program.init(jax.random.key(0)))
        faults = Faults(parse_faults("bitflip_param@step=9,rank=1"), rank)
        for step in (8, 9):
            state = replace(state, params=faults.before_step(step, step, state.params))
            watch.start(step, state, 0.2 if rank == 2 else 0.01)
            step, look = watch.read()
            try:
                watch.require_equal(look, step)
                print("equal", [words[:36] for words in watch.slow(look, 0.4)])
            except DriftError as error:
                print(str(error).replace(f"device {jax.devices()[1].id}", "device"))
"""


@pytest.mark.slow
def test_three_processes_all_hear_which_of_them_is_slow_and_which_has_other_bits():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", textwrap.dedent(PROCESSES)]
    ranks = [
        subprocess.Popen([*argv, str(rank), port], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(3)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=250)
        slow, drift = out.splitlines()[-2:] if process.returncode == 0 else (err, "")
        assert slow == "equal ['process 2 takes 0.200 s of each step']"
        assert re.fullmatch(r"after step 9, params/\S+ has other bits on device of process 1 than in the other copies", drift)
