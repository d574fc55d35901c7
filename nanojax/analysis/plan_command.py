"""`nanojax plan PRESET.py`: what to run a config with on so many devices of so much memory, found by compiling."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from nanojax.checks import check_types, parse_mesh
from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config
from nanojax.errors import UserError

if TYPE_CHECKING:
    from nanojax.analysis.plan import Trial

MOST_DEVICES = 16_384  # beyond what was ever compiled for here
UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What `nanojax plan` takes."""

    memory: str | None = None
    """Of a device, as 80GiB. Derived: what jax may allocate on it."""
    devices: int | None = None
    """How many. Derived: those there are, or one of a target; on a CPU that many are made up."""
    target: Literal["here", "h100", "h200"] = "here"
    """Devices to compile for: those of this machine, or GPUs that are not there (needs jax's CUDA plugin)."""
    topology: str | None = None
    """slices x hosts of a slice x devices of a host, as 64x1x8: compile the step as it is for so many of a target, and say what its
    devices send each other, what that takes, and what is wrong. Without --mesh, data goes across hosts and fsdp within one."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)

    def __post_init__(self) -> None:
        check_types(self)
        if self.devices is not None and not 1 <= self.devices <= MOST_DEVICES:
            raise UserError(f"--devices takes 1 to {MOST_DEVICES}, given {self.devices}; leave it out for those there are")
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.topology is not None:
            parse_topology(self.topology)
            if self.target == "here":
                raise UserError(f"--topology {self.topology} is of GPUs that are not there; add --target h200, or h100")
            if self.devices is not None or self.memory is not None:
                raise UserError(f"--topology {self.topology} says how many of which memory; drop --devices and --memory")
        parse_mesh(self.config.train.mesh)


def parse_bytes(text: str) -> int:
    """'80GiB' -> bytes. Raises UserError on anything else."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?(GiB|GB|MiB|MB)", text)
    if found is None or (size := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise UserError(f"--memory takes a number with GiB, GB, MiB or MB, given {text!r}; try --memory 80GiB")
    return size


def parse_topology(text: str) -> tuple[int, int]:
    """'64x1x8' -> (hosts, devices of a host). Raises UserError on anything else."""
    found = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})x([1-9][0-9]?)", text)
    slices, hosts, devices = map(int, found.groups()) if found else (0, 0, 0)
    if not 1 <= slices * hosts * devices <= MOST_DEVICES:
        raise UserError(
            f"--topology takes slices x hosts x devices of a host, of {MOST_DEVICES} devices at most, given {text!r:.40}; "
            "try 64x1x8: 64 hosts of 8"
        )
    return slices * hosts, devices


def main(argv: Sequence[str]) -> None:
    """Find the largest microbatch and the least rematerialisation that fit, by compiling alone."""
    config, rest = split_preset(argv)
    command = parse(PlanCommand, rest, prog="nanojax plan [PRESET.py]", description=main.__doc__ or "", default=PlanCommand(config=config))

    if command.topology is not None:
        from nanojax.analysis.scale_report import plan_topology

        plan_topology(command.config, command.target, command.topology, *parse_topology(command.topology))
        return

    import jax

    from nanojax.analysis import plan
    from nanojax.mesh import make_mesh
    from nanojax.program import keep_compiled_programs
    from nanojax.site import choose_site
    from nanojax.sizes import count_parameters, resolve
    from nanojax.telemetry import gib

    devices = devices_of(command)
    limit = parse_bytes(command.memory) if command.memory else limit_of(command, devices)
    if command.target is None:  # of GPUs that are not there, jax keeps programs that it cannot read again
        keep_compiled_programs(command.config.data.cache)
    resolved = resolve(command.config, command.config.model.vocab_size)
    mesh = make_mesh(parse_mesh(resolved.train.mesh), devices)
    sizes = plan.micro_batches(resolved, mesh.shape["data"] * mesh.shape["fsdp"])
    if not sizes:
        rows = resolved.batch_tokens // resolved.model.seq_len
        raise UserError(f"a step must have a row for each of {len(devices)} devices, and has {rows}; raise --batch-tokens")
    train = dataclasses.replace(resolved.train, micro_batch=sizes[0])
    choose_site(dataclasses.replace(resolved, train=train), devices).require_trainable()
    where = f"{len(devices)} x {devices[0].device_kind}{'' if command.target == 'here' else ', which are not here'}"
    print(f"{count_parameters(resolved.model).total:,} parameters; compiled on this machine's {jax.default_backend()} for {where}")
    print(f"{gib(limit)} of each may be allocated\n")
    print("| micro-batch | remat | microbatches a step | peak | of it temporaries | fits |\n|---|---|---|---|---|---|")

    def say(t: Trial) -> None:
        words = (t.micro_batch, "yes" if t.remat else "no", t.accumulation, gib(t.memory.peak), gib(t.memory.temporary))
        print(f"| {' | '.join(map(str, words))} | {'yes' if t.memory.peak <= limit else 'no'} |", flush=True)

    found = plan.search(lambda n, remat: plan.trial(resolved, devices, n, remat), sizes, limit, say)
    if found is None:
        raise UserError(
            f"one row at a time, with rematerialisation, does not fit into {gib(limit)} a device; "
            "try more devices with --devices and --mesh fsdp=N, a smaller --seq-len, or a smaller --depth"
        )
    print(f"\ntake {found.words}: {resolved.batch_tokens:,} tokens a step, in microbatches: {found.accumulation}")
    print(cost(resolved, found, command, devices))


def devices_of(command: PlanCommand) -> list[Any]:
    """Those to compile for."""
    import jax

    from nanojax.analysis.targets import target_devices

    if command.target != "here":
        return target_devices(command.target, f"1x1x{command.devices or 1}")
    if command.devices is not None:
        jax.config.update("jax_num_cpu_devices", command.devices)  # without effect on GPUs
    here = jax.devices()
    if command.devices is not None and len(here) < command.devices:
        raise UserError(
            f"--devices {command.devices} are more than the {len(here)} x {here[0].device_kind} here; name others, as --target h200"
        )
    return here[: command.devices]


def limit_of(command: PlanCommand, devices: list[Any]) -> int:
    """Bytes that jax may allocate on each."""
    from nanojax.analysis.plan import allocatable
    from nanojax.analysis.targets import ALLOCATED, GPUS

    if command.target != "here":
        return int(ALLOCATED * GPUS[command.target].memory)
    limit = allocatable(devices)
    if limit is None:
        raise UserError(f"a {devices[0].platform} does not say what jax may allocate on it; say it, as --memory 80GiB")
    return limit


def cost(config: Config, found: Trial, command: PlanCommand, devices: list[Any]) -> str:
    """Expected time and GPU hours, in words."""
    from nanojax.analysis.plan import expected_seconds
    from nanojax.analysis.targets import GPUS
    from nanojax.telemetry import duration, peak_flops

    gpu = next((gpu for name, gpu in GPUS.items() if name.upper() in devices[0].device_kind), None)
    peak = peak_flops(devices[:1], None)
    if gpu is None or peak is None:
        return f"how long a step takes on a {devices[0].device_kind} is not known"
    seconds = expected_seconds(found.ops, peak, gpu.bandwidth)
    total = seconds * config.steps
    return (
        f"expected, without what communication adds: {1e3 * seconds:,.0f} ms a step, {config.batch_tokens / seconds:,.0f} tokens/s; "
        f"{config.steps:,} steps take {duration(total)}, {total * len(devices) / 3600:,.1f} GPU hours"
    )
