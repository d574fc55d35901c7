"""Step time and memory of variants of a run, alternating in one process.   python scripts/bench/precisions.py configs/d12.py"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config
from nanojax.errors import UserError, run_main

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": dict(precision="bf16"),
    "nvfp4": dict(precision="nvfp4"),
    "nvfp4_2d": dict(precision="nvfp4_2d"),
    "mxfp4": dict(precision="mxfp4"),
    "int4": dict(precision="int4"),
    "full": dict(fp4_recipe="full"),
    "fp8": dict(precision="fp8"),
    "fp8_head": dict(precision="fp8_head"),
    "plain": dict(kernels="plain"),
    "te": dict(attn_impl="te"),
    "cudnn": dict(attn_impl="cudnn"),
    "xla": dict(attn_impl="xla", micro_batch=4),  # it keeps the T x T scores of each layer
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    names: tuple[str, ...] = ("bf16", "nvfp4", "nvfp4_2d", "mxfp4", "int4")
    """Of bf16, fp8, fp8_head, with the head in 8 bits too, nvfp4, nvfp4_2d, mxfp4, int4; full, the full recipe; plain, without kernels;
    te, cudnn, xla, the attention.
    """
    rounds: int = 4
    """Turns of each, alternating, every other time in reverse; the first is dropped."""
    steps_a_round: int = 5
    """Steps a turn, timed as one."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.steps_a_round < 1:
            raise UserError(f"a bench takes 2 rounds or more and a step or more, given {self.rounds} and {self.steps_a_round}; raise them")
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"--names are one or more, each once, given {' '.join(self.names) or 'none'}; name others")
        if unknown := [name for name in self.names if name not in VARIANTS]:
            raise UserError(f"--names are of {', '.join(VARIANTS)}, given {unknown[0]}; choose one of these")


def beside(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean ratio of turns that followed each other, and its standard error where there are several."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    error = f" ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.4f}" if len(ratios) > 1 else ""
    return f"{statistics.mean(ratios):.4f}{error}"


def main(argv: Sequence[str]) -> None:
    """Print milliseconds a step, by the median turn, and bytes that the compiled step needs beside its state."""
    config, rest = split_preset(argv)
    bench = parse(Bench, rest, prog="precisions.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))

    import jax
    import numpy as np

    from nanojax.data.loader import Batch
    from nanojax.mesh import batch_sharding
    from nanojax.ops.attention import compiled_kernels
    from nanojax.program import make_program
    from nanojax.sizes import resolve

    base = resolve(bench.config, bench.config.model.vocab_size)
    drawn = np.random.default_rng(0).integers(0, base.model.vocab_size, (2, base.batch_tokens), np.int32)
    states, times, facts = {}, {name: [] for name in bench.names}, {}

    def prepared(name: str) -> tuple[Any, Any, Any]:
        program = make_program(replace(base, train=replace(base.train, **VARIANTS[name])), jax.devices()[:1])
        program.require_trainable()
        shape = (program.accumulation, program.rows, base.model.seq_len)
        arrays = (*(part.reshape(shape) for part in drawn), np.ones(shape, np.int32))
        tokens = Batch(*jax.device_put(arrays, batch_sharding(program.mesh)))
        with jax.set_mesh(program.mesh):
            began, jitted = time.perf_counter(), cast(Any, program.phases[0].train_step)
            compiled = jitted.lower(program.shapes, tokens).compile()
        took, temporary = time.perf_counter() - began, compiled.memory_analysis().temp_size_in_bytes
        kernels = compiled_kernels(program.attention, compiled.as_text())
        facts[name] = (took, temporary, program.parameters, f"{program.accumulation} x {program.rows} rows, attention {kernels}")
        return program, tokens, compiled

    # One after the other: XLA times its choices on this device, and what it chose for one program it takes for the next.
    steps = {name: prepared(name) for name in bench.names}
    for name, (program, _, _) in steps.items():
        with jax.set_mesh(program.mesh):
            states[name] = program.init(jax.random.key(0))
    for turn in range(bench.rounds):
        for name in bench.names[:: 1 if turn % 2 else -1]:
            _, tokens, step = steps[name]
            began = time.perf_counter()
            for _ in range(bench.steps_a_round):
                states[name], _ = step(states[name], tokens)
            jax.block_until_ready(states[name])
            if turn:
                times[name].append((time.perf_counter() - began) / bench.steps_a_round)
    first = bench.names[0]
    print(f"{jax.devices()[0].device_kind}, {facts[first][2]:,} parameters, {base.batch_tokens:,} tokens a step")
    for name, values in times.items():
        took, (compiled, temporary, size, words) = statistics.median(values), facts[name]
        turns = ", ".join(f"{1e3 * value:.2f}" for value in values)
        print(
            f"{name:<10}{1e3 * took:9.2f} ms a step, {base.batch_tokens / took:,.0f} tok/s, {beside(values, times[first])} of {first}, "
            f"{(temporary - facts[first][1]) / size:+.3f} bytes a parameter, compiled in {compiled:.1f} s, turns {turns}; {words}"
        )


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
