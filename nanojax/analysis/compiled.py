"""What a config's step is once compiled, without running it: FLOPs, bytes, memory, collectives, kernels, recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanojax.analysis.hlo import Op, loops_without_a_count, read_program
from nanojax.program import Program
from nanojax.sizes import flops_per_token
from nanojax.telemetry import gib


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device while a step runs."""

    state: int
    """Arguments: parameters, moments, the batch."""
    temporary: int
    results: int
    """That take no argument's place."""

    @property
    def peak(self) -> int:
        return self.state + self.temporary + self.results

    @classmethod
    def of(cls, compiled: Any) -> Memory:
        stats = compiled.memory_analysis()
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return cls(stats.argument_size_in_bytes, stats.temp_size_in_bytes, max(0, results))


def facts(program: Program, compiled: Any) -> dict[str, str]:
    """Lines about a program's compiled step, on one of its devices."""
    text, memory, costs = compiled.as_text() or "", Memory.of(compiled), compiled.cost_analysis() or {}
    ops, uncounted = read_program(text), loops_without_a_count(text)
    config, devices = program.config, program.mesh.size
    flops = sum(op.flops * op.times for op in ops)
    formula = flops_per_token(config.model) * config.batch_tokens / devices
    recomputed = [op for op in ops if op.recomputed]
    share = sum(op.flops * op.times for op in recomputed) / flops if flops else 0.0
    first = program.mesh.devices.flat[0]
    return {
        "compiled for": f"{devices} x {first.device_kind} ({first.platform}), {program.facts['mesh']}",
        "step": program.facts["batch"] + f", attention {program.attention}, " + program.facts["precision"],
        "FLOPs": f"{formula:.4g} by formula (attention to all keys), {flops:.4g} in the program (attention kernels: to those before)"
        + (f", {costs['flops']:.4g} by XLA (a loop's body once)" if costs.get("flops") else ""),
        "bytes": f"{sum(op.bytes * op.times for op in ops):.4g} if every operand came from memory"
        + (f", {costs['bytes accessed']:.4g} by XLA (a loop's body once)" if costs.get("bytes accessed") else ""),
        "memory": f"{gib(memory.peak)} at the peak: state and batch {gib(memory.state)}, temporaries {gib(memory.temporary)}, "
        f"results {gib(memory.results)}",
        "kernels": f"{sum(op.times for op in ops):,.0f} operations, {len(ops):,} of them different"
        + (f"; {uncounted} loops of unknown length are counted as one turn" if uncounted else ""),
        "custom calls": custom_calls(ops),
        "collectives": collectives(ops),
        "recomputed": f"{len(recomputed):,} operations, {share:.1%} of the FLOPs" if recomputed else "nothing",
    }


def custom_calls(ops: list[Op]) -> str:
    """Targets with executions a step."""
    targets = dict.fromkeys(op.target for op in ops if op.target)
    counts = {target: sum(op.times for op in ops if op.target == target) for target in targets}
    return ", ".join(f"{target} x {count:,.0f}" for target, count in counts.items()) or "none"


def collectives(ops: list[Op]) -> str:
    """Kinds with executions and bytes (operands and results) a step."""
    kinds: dict[str, list[float]] = {}
    for op in ops:
        if op.collective and not op.opcode.endswith("-done"):
            sums = kinds.setdefault(op.opcode.removesuffix("-start"), [0.0, 0.0])
            sums[0] += op.times
            sums[1] += op.bytes * op.times
    return ", ".join(f"{kind} x {count:,.0f} ({gib(size)})" for kind, (count, size) in sorted(kinds.items())) or "none"
