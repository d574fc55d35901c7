"""A step on many devices, from its compiled program: bytes sent against a formula, what is wrong with it, how long it may take."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from nanojax.analysis.collectives import Collective, arrays, read_collectives
from nanojax.analysis.compiled import Memory, custom_calls
from nanojax.analysis.hlo import Op, read_program
from nanojax.analysis.plan import seconds_of
from nanojax.config import ModelConfig
from nanojax.program import Program
from nanojax.site import DTYPES
from nanojax.sizes import count_parameters

# Assumed, not measured here: what NCCL reaches of the 450 GB/s of an H100's or H200's NVLink, and of a 400 Gb/s network card for each GPU.
NVLINK, NETWORK = 370e9, 45e9  # bytes a second, in each direction
MOST_MEMORY = 0.9  # of a GPU's, for arguments and temporaries
MOST_WIRE = 1.1  # of the formula's bytes
LEAST_ASYNCHRONOUS = 0.9  # of the bytes of gathers and scatters
GAVE_UP = "Involuntary full rematerialization"  # XLA's words for a sharding that it reaches by way of the whole array on every device


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A step that was compiled for a mesh over hosts."""

    model: ModelConfig
    mesh: Mapping[str, int]
    accumulation: int
    size: int
    """Bytes of a number that products read."""
    memory: Memory
    ops: tuple[Op, ...]
    collectives: tuple[Collective, ...]
    said: str
    """What XLA wrote to stderr meanwhile."""

    @property
    def near(self) -> float:
        """Bytes a step that a device sends to others of its host."""
        return sum(c.times * c.near for c in self.collectives)

    @property
    def far(self) -> float:
        """And to other hosts."""
        return sum(c.times * c.far for c in self.collectives)

    @property
    def formula(self) -> dict[str, float] | None:
        """What the program should send; None where closed_form has none."""
        return closed_form(self.model, self.mesh, self.accumulation, self.size)

    @property
    def asynchronous(self) -> float:
        """Share of the bytes of gathers and scatters during which something is computed; 1 where there are none."""
        moved = [c for c in self.collectives if c.kind in ("all-gather", "reduce-scatter")]
        total = sum(c.sent for c in moved)
        return sum(c.sent for c in moved if c.done is not None) / total if total else 1.0

    @property
    def layers(self) -> int:
        """Blocks of the model whose scopes are in the program."""
        return len({found for op in self.ops for found in re.findall(r"\bblock_(\d+)\b", op.scope)})

    @property
    def attention(self) -> str:
        """Custom calls of attention with executions a step."""
        return custom_calls([op for op in self.ops if re.search("fmha|fused_attn", op.target)])


def scaled(program: Program, compiled: Any, said: str) -> Scaled:
    """What is read off the compiled step of a program."""
    ops = tuple(read_program(compiled.as_text() or ""))
    hosts = [device.process_index for device in program.mesh.devices.flat]
    size = jnp.dtype(DTYPES[program.compute]).itemsize
    collectives = tuple(read_collectives(ops, hosts))
    return Scaled(program.config.model, program.mesh.shape, program.accumulation, size, Memory.of(compiled), ops, collectives, said)


def closed_form(model: ModelConfig, mesh: Mapping[str, int], accumulation: int, size: int) -> dict[str, float] | None:
    """Bytes that a device sends a step, by what for, with matrices cut over fsdp and copied over data; None with context or tensor.

    A ring of n moves r(n) = (n - 1) / n of what it gathers or scatters, twice that of what it reduces to all. For A microbatches, f and d
    devices on fsdp and data, M numbers of `size` bytes in the blocks' matrices, H in the head, E in the embedding, G in the gains:
        gathered   A size r(f) (2 M + H + E)                forward and backward; head and embedding once
        scattered  A r(f) (size (M + H) + 4 E)              gradients; the embedding's are fp32
        reduced    2 r(d) (size (M + H) + 4 E) / f          what is left of them among the copies: XLA does so after the last microbatch
        gains      2 r(f d) 4 G
        Muon       2 size r(f) M / f                        each device is dealt whole matrices, and hands back their updates
    """
    if mesh["context"] * mesh["tensor"] > 1:
        return None
    f, d, n = mesh["fsdp"], mesh["data"], count_parameters(model)
    matrices, gradients = size * n.matrices, size * (n.matrices + n.head) + 4 * n.embedding

    def ring(devices: int) -> float:
        return (devices - 1) / devices

    return {
        "weights gathered": accumulation * ring(f) * (2 * matrices + size * (n.head + n.embedding)),
        "gradients scattered": accumulation * ring(f) * gradients,
        "gradients reduced over data": 2 * ring(d) * gradients / f,
        "gains reduced": 2 * ring(f * d) * 4 * n.gains,
        "Muon's matrices dealt out": 2 * ring(f) * matrices / f,
    }


def problems(step: Scaled, gpu_memory: int, smaller: Scaled | None = None) -> list[str]:
    """What is wrong with a step on so many devices, in words; nothing is an empty list. `smaller`: the same on fewer hosts."""
    found: list[str] = []
    if (need := step.memory.state + step.memory.temporary) > MOST_MEMORY * gpu_memory:
        found.append(f"arguments and temporaries of {need:,} bytes are more than {MOST_MEMORY:.0%} of the GPU's {gpu_memory:,}")
    wire, formula = step.near + step.far, sum((step.formula or {"none": math.inf}).values())
    if wire > MOST_WIRE * formula:
        found.append(f"a device sends {wire:,.0f} bytes a step, more than {MOST_WIRE} times the formula's {formula:,.0f}")
    smallest = step.model.width * min(step.model.hidden, step.model.kv_heads * step.model.head_dim) // step.mesh["tensor"]
    for c in step.collectives:
        wide = any(kind == "f32" and math.prod(dims) >= smallest for kind, dims in c.results)
        if c.kind == "all-gather" and wide and step.size < 4:
            found.append(f"a whole matrix is gathered in f32, in {c.scope or 'a scope that is not known'}; cast it before")
    if GAVE_UP in step.said:
        found.append(f"XLA gave up on a sharding: {next(line for line in step.said.splitlines() if GAVE_UP in line):.300}")
    if step.asynchronous < LEAST_ASYNCHRONOUS:
        found.append(
            f"something is computed during {step.asynchronous:.1%} of the bytes of gathers and scatters, not {LEAST_ASYNCHRONOUS:.0%}"
        )
    if smaller is not None:
        before = Counter(arrays(smaller.collectives))
        if smaller.mesh["data"] == 1 < step.mesh["data"]:  # what is scattered within a host is now reduced among hosts as well
            before["all-reduce"] += before["reduce-scatter"]
        for kind, count in arrays(step.collectives).items():
            if count > before[kind]:
                found.append(f"{count} arrays a step go through {kind}, on fewer hosts {before[kind]}: collectives grow with the devices")
    return found


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step: a prediction from rates, not a measurement."""

    computing: float
    near: float
    """Bytes to the own host at NVLINK."""
    far: float
    """Bytes to others at NETWORK."""
    scheduled: float
    """With what the program computes during each collective; one is under way at a time."""

    @property
    def least(self) -> float:
        """Everything at once."""
        return max(self.computing, self.near, self.far)

    @property
    def most(self) -> float:
        """One after another."""
        return self.computing + self.near + self.far


def roofline(step: Scaled, peak_flops: float, bandwidth: float) -> Roofline:
    """Of a device with so many FLOP/s and bytes a second of memory; what it reaches of them is in plan.py."""
    computing = [0.0 if op.collective else seconds_of(op, peak_flops, bandwidth) for op in step.ops]
    starts = {c.start: c for c in step.collectives}
    waits = {c.done: c for c in step.collectives if c.done is not None}
    ends: dict[int, float] = {}
    clock = wire = 0.0
    for i, seconds in enumerate(computing):
        if c := starts.get(i):
            wire = ends[i] = max(clock, wire) + c.times * max(c.near / NVLINK, c.far / NETWORK)
            clock = clock if c.done is not None else wire
        elif c := waits.get(i):
            clock = max(clock, ends[c.start])
        clock += seconds
    return Roofline(sum(computing), step.near / NVLINK, step.far / NETWORK, clock)
