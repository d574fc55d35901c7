"""`nanojax plan --topology`: a config's step compiled for many hosts of GPUs that are not there, and what it comes to, in words."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from nanojax.analysis import plan
from nanojax.analysis.scale import NETWORK, NVLINK, Scaled, problems, roofline, scaled
from nanojax.analysis.targets import GPUS, target_devices
from nanojax.config import Config
from nanojax.program import make_program
from nanojax.sizes import count_parameters, resolve
from nanojax.telemetry import duration, gib, peak_flops


def compile_for(config: Config, devices: list[Any], per_host: int) -> Scaled:
    """The step of a resolved config on such devices; without a mesh of its own, data goes across hosts and fsdp within one."""
    mesh = config.train.mesh or f"data={len(devices) // per_host},fsdp={per_host}"
    program = make_program(dataclasses.replace(config, train=dataclasses.replace(config.train, mesh=mesh)), devices)
    with stderr_kept() as said:
        compiled = program.compile_step()
    return scaled(program, compiled, "".join(said))


@contextlib.contextmanager
def stderr_kept() -> Iterator[list[str]]:
    """A list that, after the block, holds what the process wrote to stderr in it, XLA's own lines too; it is passed on then."""
    said: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        real = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
            sys.stderr.write(said[0])


def plan_topology(config: Config, target: str, topology: str, hosts: int, per_host: int) -> None:
    """Print it, for a topology that is so many hosts of so many devices."""
    resolved = resolve(config, config.model.vocab_size)
    devices, gpu = target_devices(target, topology), GPUS[target]
    step = compile_for(resolved, devices, per_host)
    mesh = ",".join(f"{axis}={size}" for axis, size in step.mesh.items() if size > 1) or "data=1"
    chosen = "" if config.train.mesh else " (data across hosts, fsdp within one; --mesh NAME=SIZE,... chooses another)"
    print(f"{count_parameters(step.model).total:,} parameters, compiled for {len(devices)} x {gpu.name}, which are not here")
    print(f"topology {topology}: {hosts} hosts of {per_host}; --mesh {mesh}{chosen}")
    share = resolved.batch_tokens // len(devices)
    print(f"{resolved.batch_tokens:,} tokens a step, {share:,} on each GPU, in microbatches: {step.accumulation}")
    memory = step.memory
    print(
        f"memory of a GPU: {gib(memory.state)} state and batch, {gib(memory.temporary)} temporaries, of {gib(gpu.memory)}"
        f"; {step.layers} layers, {step.attention}\n"
    )
    print(collectives_table(step))
    print(formula_table(step))
    peak = peak_flops(devices[:1], None)
    assert peak is not None, "a target is in the table of peaks"
    print(prediction(step, resolved, peak, gpu.bandwidth, len(devices)))
    wrong = problems(step, gpu.memory)
    print("\n".join(f"wrong: {words}" for words in wrong) if wrong else "nothing is wrong with it")


def collectives_table(step: Scaled) -> str:
    """A line for each that sends a megabyte or more a step."""
    rows = [
        "| collective | a step | arrays | devices | hosts | NVLink | network | meanwhile | of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in sorted(step.collectives, key=lambda c: -c.sent):
        if c.sent >= 1e6:
            meanwhile = "computes" if c.done is not None else "waits"
            words = (c.kind, f"{c.times:g}", len(c.results), c.group, c.hosts, mb(c.times * c.near), mb(c.times * c.far), meanwhile)
            rows.append(f"| {' | '.join(map(str, words))} | {c.scope[-60:].replace('|', '/')} |")
    return "\n".join(rows) + "\n"


def formula_table(step: Scaled) -> str:
    """Bytes by formula beside those of the program."""
    near, far = step.near, step.far
    rows = [f"a GPU sends {mb(near)} on NVLink and {mb(far)} across hosts a step; {step.asynchronous:.0%} of gathers' and scatters' bytes"]
    rows[0] += " while something is computed"
    if (formula := step.formula) is None:
        return rows[0] + "; there is no formula for context and tensor\n"
    rows += [f"  {what}: {mb(size)}" for what, size in formula.items() if size]
    total = sum(formula.values())
    rows.append(f"  by formula {mb(total)}" + (f", in the program {(near + far) / total:.2f} times as many" if total else ""))
    return "\n".join(rows) + "\n"


def prediction(step: Scaled, config: Config, peak: float, bandwidth: int, devices: int) -> str:
    """A roofline of the step's time, and what it is made from."""
    roof = roofline(step, peak, bandwidth)
    total, alone = roof.scheduled * config.steps, roof.computing / roof.scheduled
    products, attention, memory = plan.PRODUCTS_REACHED, plan.ATTENTION_REACHED, plan.BANDWIDTH_REACHED
    return (
        f"prediction, not a measurement: {ms(roof.scheduled)} a step as it is scheduled, {ms(roof.least)} if all overlapped, "
        f"{ms(roof.most)} if nothing did: computing {ms(roof.computing)}, NVLink {ms(roof.near)}, network {ms(roof.far)}\n"
        f"  {config.batch_tokens / roof.scheduled:,.0f} tokens/s, {alone:.0%} of what the GPUs would do without each other; "
        f"{config.steps:,} steps take {duration(total)}, {total * devices / 3600:,.1f} GPU hours\n"
        f"  from {peak / 1e12:,.0f} TFLOP/s, of which products reach {products:.0%} and attention {attention:.0%}, and memory at "
        f"{memory:.0%} of {bandwidth / 1e12:.2f} TB/s (measured on one H200);\n"
        f"  assumed: NVLink {NVLINK / 1e9:.0f} GB/s, network {NETWORK / 1e9:.0f} GB/s for each GPU; stragglers and congestion are not in it"
    )


def mb(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e6:,.1f} MB"


def ms(seconds: float) -> str:
    """Seconds in words."""
    return f"{1e3 * seconds:,.1f} ms"
