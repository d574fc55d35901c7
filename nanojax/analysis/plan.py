"""How a config fits into memory, by compiling alone: the largest microbatch, with as little computed twice as can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanojax.analysis.compiled import Memory
from nanojax.analysis.hlo import OWN_PRODUCTS, Op, read_program
from nanojax.analysis.profile import ATTENTION, group_of
from nanojax.config import Config
from nanojax.errors import UserError
from nanojax.program import Program, make_program
from nanojax.telemetry import gib

LARGEST_MICRO_BATCH = 2**17  # tokens; d20 on an H200 gained 2 % from 2**15 to 2**16 (scripts/bench/LOG.md), larger ones are not measured
# What an H100 reached of its dense bf16 rate and of its memory's bandwidth in a step at d12 with our kernels, by the profile in
# scripts/bench/LOG.md: 692 and 364 of 989 TFLOP/s, 2,912 of 3,350 GB/s.
PRODUCTS_REACHED, ATTENTION_REACHED, BANDWIDTH_REACHED = 0.70, 0.37, 0.87


@dataclasses.dataclass(frozen=True)
class Trial:
    """A step that was compiled."""

    micro_batch: int
    remat: bool
    accumulation: int
    memory: Memory
    ops: tuple[Op, ...]

    @property
    def words(self) -> str:
        """As flags."""
        return f"--micro-batch {self.micro_batch}" + (" --remat" if self.remat else " --no-remat")


def trial(config: Config, devices: list[Any], micro_batch: int, remat: bool) -> Trial:
    """Compile the step of a resolved config with another microbatch and rematerialisation."""
    train = dataclasses.replace(config.train, micro_batch=micro_batch, remat=remat)
    program = make_program(dataclasses.replace(config, train=train), devices)
    compiled = program.compile_step()
    return Trial(micro_batch, remat, program.accumulation, Memory.of(compiled), tuple(read_program(compiled.as_text() or "")))


def micro_batches(config: Config, replicas: int) -> list[int]:
    """Those that divide the rows of a device and step, smallest first."""
    share = config.batch_tokens // config.model.seq_len // replicas
    return [n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * config.model.seq_len <= LARGEST_MICRO_BATCH)]


def search(run: Callable[[int, bool], Trial], sizes: list[int], limit: int, say: Callable[[Trial], None]) -> Trial | None:
    """The trial to take: of those within `limit` bytes the largest microbatch, without rematerialisation if any fits so. None: none does.

    Memory grows by nearly the same with every row: of two small sizes follows which is the largest to try.
    """
    for remat in (False, True):
        with ThreadPoolExecutor(2) as pool:
            first = list(pool.map(run, sizes[:2], [remat] * 2))
        found = {t.micro_batch: t for t in first}
        for t in first:
            say(t)
        if min(t.memory.peak for t in first) > limit:
            continue
        for size in _downward(found, sizes, limit):
            if size not in found:
                found[size] = run(size, remat)
                say(found[size])
            if found[size].memory.peak <= limit:
                return found[size]
    return None


def _downward(found: dict[int, Trial], sizes: list[int], limit: int) -> Iterator[int]:
    """Sizes to try, largest first; `found` has one or two."""
    small, large = min(found), max(found)
    low, high = found[small].memory.peak, found[large].memory.peak
    row = max((high - low) / max(1, large - small), limit / 1000)  # one row alone may need more than two
    most = large + (limit - high) / row
    yield from reversed([n for n in sizes if n <= most * 1.02 or n in found])  # the line is a guess: one a little beyond may fit


def allocatable(devices: Sequence[Any]) -> int | None:
    """Bytes that jax may still allocate on the fullest device; None where devices do not say, as CPUs."""
    stats = [device.memory_stats() or {} for device in devices]
    free = [s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats if "bytes_limit" in s]
    return min(free, default=None)


def require_fit(program: Program, compiled: Any, say: Callable[[str], None]) -> None:
    """Raise UserError, with what would fit, where a compiled step needs more memory than its devices have."""
    devices, config = list(program.mesh.devices.flat), program.config
    limit, need = allocatable(program.mesh.local_devices), Memory.of(compiled).peak
    if limit is None or need <= limit:
        return
    lacking = f"a step must fit into the {gib(limit)} that jax may allocate on a device, and needs {gib(need)}"
    say(f"{lacking}: compiling others to see what does (nanojax plan)")
    sizes = micro_batches(config, program.mesh.shape["data"] * program.mesh.shape["fsdp"])
    found = search(lambda n, remat: trial(config, devices, n, remat), sizes, limit, lambda _: None)
    remedy = f"try {found.words}" if found else "not even one row with --remat does; shard it over more devices, as --mesh fsdp=8"
    raise UserError(f"{lacking}; {remedy}")


def expected_seconds(ops: tuple[Op, ...], peak_flops: float, bandwidth: float) -> float:
    """A step's time on one device: products and attention at what they reach of the peak, the rest at what it reaches of the bandwidth."""
    return sum(seconds_of(op, peak_flops, bandwidth) for op in ops)


def seconds_of(op: Op, peak_flops: float, bandwidth: float) -> float:
    """Of all executions of an operation in a step."""
    moving = op.times * op.bytes / (bandwidth * BANDWIDTH_REACHED)
    if op.flops:
        reached = ATTENTION_REACHED if group_of(op) == ATTENTION else PRODUCTS_REACHED
        peak = 2 * peak_flops if op.target.endswith("$f8") else peak_flops  # 8 bits are multiplied twice as fast
        multiplying = op.times * op.flops / (peak * reached)
        # Where a kernel does what follows too, half of the shorter of the two shows (scripts/bench/LOG.md).
        return max(multiplying, moving) + min(multiplying, moving) / 2 if op.target.startswith(OWN_PRODUCTS) else multiplying
    return moving
