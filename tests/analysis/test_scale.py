"""The formula, the checks and the prediction of steps on many devices, and the gate over the shipped configs.

The gate compiles for H200s that are not there: jax's CUDA plugin is needed, and some minutes for each config. With it installed,

    pytest tests/analysis/test_scale.py -m slow -s

prints its table. Compiling happens in a process of its own, which is this file run as a script: the suite compiles with half of XLA off.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanojax.analysis.collectives import read_collectives
from nanojax.analysis.compiled import Memory
from nanojax.analysis.hlo import read_program
from nanojax.analysis.scale import NETWORK, NVLINK, Scaled, closed_form, problems, roofline
from nanojax.config import ModelConfig
from nanojax.sizes import count_parameters

ROOT = Path(__file__).parents[2]
HOSTS = (1, 8, 64)  # of eight devices
# (preset, precision, cap of the logits or 0: the preset's own, hosts). In 8 bits devices agree on a scale for each tensor; with a cap the
# head's product ends in the loss. On more than a host the 8-bit step of d12, one microbatch, has too little left to hide its last scatter
# behind.
GATED = [(name, "auto", 0, HOSTS) for name in ("d12", "d20", "d32", "nanochat_d20")]
GATED += [("d12", "fp8", 0, (1,)), ("d12", "auto", 15, (1,)), ("d20", "auto", 15, (1,))]
MODEL = ModelConfig(depth=1, d_model=16, head_dim=16, d_ffn=16, seq_len=32, vocab_size=128, norm="fixed")  # the smallest matrix: 16 x 16
MESH = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
# What FSDP does, on four devices: the weight is cast, then gathered while something is computed, and so is its gradient scattered.
STEP = """HloModule jit_step

ENTRY %main (w: f32[4,16], x: f32[16,16]) -> f32[4,16] {
  %w = f32[4,16]{1,0} parameter(0)
  %x = f32[16,16]{1,0} parameter(1)
  %cast = bf16[4,16]{1,0} convert(%w)
  %gather = ((bf16[4,16]{1,0}), bf16[16,16]{1,0}) all-gather-start(%cast), replica_groups=[1,4]<=[4], metadata={op_name="jit(step)/jvp(block_0)/ffn/dot"}
  %before = f32[16,16]{1,0} dot(%x, %x), lhs_contracting_dims={1}
  %gathered = bf16[16,16]{1,0} all-gather-done(%gather)
  %scatter = ((f32[16,16]{1,0}), f32[4,16]{1,0}) reduce-scatter-start(%before), replica_groups=[1,4]<=[4]
  %after = f32[16,16]{1,0} dot(%x, %x), lhs_contracting_dims={1}
  ROOT %scattered = f32[4,16]{1,0} reduce-scatter-done(%scatter)
}
"""  # noqa: E501  # an instruction is a line
# The same by a cast that comes after.
CAST_LATE = STEP.replace("all-gather-start(%cast)", "all-gather-start(%w)").replace(
    "((bf16[4,16]{1,0}), bf16[16,16]{1,0})", "((f32[4,16]{1,0}), f32[16,16]{1,0})"
).replace("bf16[16,16]{1,0} all-gather-done", "f32[16,16]{1,0} all-gather-done")  # fmt: skip


def step_of(text: str, *, model: ModelConfig = MODEL, memory: int = 0, said: str = "", data: int = 1, hosts: int = 1) -> Scaled:
    ops = tuple(read_program(text))
    devices = 4 * data
    collectives = tuple(read_collectives(ops, [n * hosts // devices for n in range(devices)]))
    return Scaled(model, MESH | {"data": data}, 1, 2, Memory(memory, 0, 0), ops, collectives, said)


def test_a_sound_step_has_no_problems():
    step = step_of(STEP)
    assert problems(step, 10**9) == []
    assert (step.asynchronous, step.layers, step.attention) == (1.0, 1, "none")


@pytest.mark.parametrize(
    ("text", "how", "words"),
    [
        (CAST_LATE, {}, "a whole matrix is gathered in f32, in jit(step)/jvp(block_0)/ffn/dot; cast it before"),
        (STEP, {"memory": 901}, "arguments and temporaries of 901 bytes are more than 90% of the GPU's 1,000"),
        (STEP, {"said": "W1 x.cc] [SPMD] Involuntary full rematerialization. The compiler"}, "XLA gave up on a sharding: W1 x.cc]"),
        (STEP.replace("bf16[16,16]", "bf16[512,512]"), {}, "a device sends 393,984 bytes a step, more than 1.1 times the formula's"),
        (STEP.replace("dot(%x, %x)", "bitcast(%x)"), {}, "something is computed during 0.0% of the bytes of gathers and scatters"),
        (STEP.replace("metadata=", 'backend_config={"is_sync":true}, metadata='), {}, "something is computed during 66.7% of the bytes"),
    ],
)  # fmt: skip
def test_a_broken_step_fails_by_name(text, how, words):
    found = problems(step_of(text, **how), 1000)
    assert len(found) == 1, found
    assert words in found[0]


def test_small_arrays_may_be_gathered_in_fp32():
    assert problems(step_of(CAST_LATE, model=dataclasses.replace(MODEL, d_model=32, vocab_size=1024)), 10**9) == []


def test_collectives_that_grow_with_the_devices_are_a_problem_and_the_sum_among_hosts_is_none():
    def with_sum(name: str, operand: str) -> str:
        return f"  {name} = f32[4,16]{{1,0}} all-reduce({operand}), replica_groups=[4,2]<=[2,4]T(1,0)\n}}"

    reduced = STEP.replace("ROOT ", "").replace("\n}", "\n" + with_sum("ROOT %sum", "%scattered"))
    twice = reduced.replace("\n}", "\n" + with_sum("%again", "%after"))
    one, two, grown = step_of(STEP), step_of(reduced, data=2, hosts=2), step_of(twice, data=2, hosts=2)
    assert problems(two, 10**9, one) == []
    for smaller in (one, two):
        (found,) = problems(grown, 10**9, smaller)
        assert "2 arrays a step go through all-reduce, on fewer hosts 1: collectives grow with the devices" in found


def test_the_formula_by_hand():
    model = ModelConfig(depth=2, d_model=256, d_ffn=512, vocab_size=1024)
    matrices, table, gains = 2 * (4 * 256**2 + 3 * 256 * 512), 1024 * 256, 5 * 256 + 2 * 2 * 128
    assert dataclasses.astuple(count_parameters(model)) == (table, table, matrices, gains)
    found = closed_form(model, {"data": 3, "fsdp": 4, "context": 1, "tensor": 1}, accumulation=5, size=2)
    assert found is not None
    assert list(found.values()) == pytest.approx(
        [
            5 * 3 / 4 * (2 * 2 * matrices + 2 * table + 2 * table),
            5 * 3 / 4 * (2 * matrices + 2 * table + 4 * table),
            2 * 2 / 3 * (2 * matrices + 2 * table + 4 * table) / 4,
            2 * 11 / 12 * 4 * gains,
            2 * 3 / 4 * 2 * matrices / 4,
        ]
    )


def test_one_device_sends_nothing_and_what_is_cut_otherwise_has_no_formula():
    one = dict.fromkeys(MESH, 1)
    assert set((closed_form(MODEL, one, 1, 2) or {}).values()) == {0.0}
    assert closed_form(MODEL, one | {"tensor": 2}, 1, 2) is None
    assert closed_form(MODEL, one | {"context": 2}, 1, 2) is None


def test_a_collective_is_hidden_by_what_is_computed_under_it_and_no_further():
    flops = 2 * 16**3
    # A product takes a second, at what products reach; the gather half of one, the scatter two: one is hidden, of the other a second.
    step, rate = step_of(STEP), flops / 0.7
    gather, scatter = (dataclasses.replace(c, near=seconds * NVLINK) for c, seconds in zip(step.collectives, (0.5, 2.0), strict=True))
    found = roofline(dataclasses.replace(step, collectives=(gather, scatter)), rate, 1e12)
    assert found.computing == pytest.approx(2)
    assert found.near == pytest.approx(2.5)
    assert found.scheduled == pytest.approx(1 + 2)
    assert (found.least, found.most) == pytest.approx((2.5, 4.5))
    waits = dataclasses.replace(gather, done=None, near=0.0, far=3 * NETWORK)
    found = roofline(dataclasses.replace(step, collectives=(waits, dataclasses.replace(scatter, near=0.0))), rate, 1e12)
    assert found.scheduled == pytest.approx(3 + 2)


# The gate ------------------------------------------------------------------------------------------------------------------------------


def gate(preset: str, precision: str, softcap: str, *many: str) -> None:
    """A line of JSON for each number of hosts, with as many tokens a step for each as the config has on one."""
    from nanojax.analysis.scale_report import compile_for
    from nanojax.analysis.targets import GPUS, target_devices
    from nanojax.cli import load_preset
    from nanojax.sizes import resolve

    config, smaller = load_preset(ROOT / f"configs/{preset}.py"), None
    model = dataclasses.replace(config.model, softcap=float(softcap) or config.model.softcap)
    config = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, precision=precision))
    config = resolve(config, config.model.vocab_size)
    for hosts in map(int, many):
        grown = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_tokens=config.batch_tokens * hosts))
        step = compile_for(grown, target_devices("h200", f"{hosts}x1x8"), 8)
        roof = roofline(step, 989e12, GPUS["h200"].bandwidth)
        row = {
            "config": f"{preset} {precision} {softcap}", "GPUs": 8 * hosts,
            "layers": step.layers, "parameters": count_parameters(step.model).total,
            "attention": step.attention, "microbatches": step.accumulation,
            "state GB": step.memory.state / 1e9, "temporaries GB": step.memory.temporary / 1e9,
            "NVLink MB": step.near / 1e6, "network MB": step.far / 1e6,
            "of the formula": (step.near + step.far) / sum((step.formula or {}).values()), "asynchronous": step.asynchronous,
            "predicted ms": 1e3 * roof.scheduled, "of them computing": roof.computing / roof.scheduled,
            "problems": problems(step, GPUS["h200"].memory, smaller),
        }  # fmt: skip
        print("gate " + json.dumps(row), flush=True)
        smaller = step


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("preset", "precision", "softcap", "hosts"), GATED)
def test_shipped_configs_pass_the_gate_at_8_64_and_512_gpus(preset, precision, softcap, hosts):
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("compiling for GPUs that are not there needs jax's CUDA plugin: pip install 'nanojax[cuda]'")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, __file__, preset, precision, str(softcap), *map(str, hosts)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=3500, check=False)
    rows = [json.loads(line.removeprefix("gate ")) for line in done.stdout.splitlines() if line.startswith("gate ")]
    for row in rows:
        print(" | ".join(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["GPUs"] for row in rows] == [8 * n for n in hosts]
    assert [row["problems"] for row in rows] == [[]] * len(hosts)
    for row in rows:
        assert row["of the formula"] > 0.7, "far less than the formula: collectives were not read"
        assert "fmha" in row["attention"] or "fused_attn" in row["attention"]


if __name__ == "__main__":
    gate(*sys.argv[1:])
