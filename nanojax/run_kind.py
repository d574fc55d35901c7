"""How a program is built besides what its config says, and the flags that XLA is given with it, which no environment can forget."""

from __future__ import annotations

import dataclasses

COMPILER_OPTIONS: dict[str, dict[str, bool]] = {
    # cuBLAS beats XLA's Triton products at these shapes, and compiling takes half the time (scripts/bench/LOG.md).
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    "cpu": {},
}
# Gradients that a device scatters together, at most, on more than two devices. XLA's own limit, which stays on two, is on what a device
# keeps of them, 30 MiB: on eight all that d12 has, when the way back is over and little is left to hide them behind.
SCATTERED_TOGETHER = 64 << 20  # bytes
# Of a run that is profiled: the profiler does not say to which operations the kernels of a CUDA graph belong.
PROFILER_OPTIONS: dict[str, dict[str, str]] = {"gpu": {"xla_gpu_enable_command_buffer": ""}, "cpu": {}}
# Of a run that repeats bit for bit: sums in a fixed order in scatters, reductions and cuDNN's attention, and no kernel chosen by its time,
# which differs from process to process. The last has scatters sorted and scanned; without it they are loops of one row after the other.
DETERMINISTIC_OPTIONS: dict[str, dict[str, bool | int]] = {
    "gpu": {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0, "xla_gpu_enable_scatter_determinism_expander": True},
    "cpu": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunKind:
    """How a program is built besides what its config says."""

    profiled: bool = False
    """Kernels are launched one by one, so that a trace says what each belongs to."""
    deterministic: bool = False
    """The same bits from every run on the same devices and versions."""
    spikes: bool = True
    """Updates that stand out are left out (spikes.py)."""
    factors: bool = False
    """The step takes a third argument, float32 [2], that loss and gradient are multiplied by (faults.py)."""

    @property
    def facts(self) -> dict[str, str]:
        """A line for the header where the run is deterministic."""
        words = "the same bits from every run on the same devices, mesh and versions; what that costs is in scripts/bench/LOG.md"
        return {"determinism": words} if self.deterministic else {}

    def options(self, platform: str, fsdp: int = 1) -> dict[str, bool | int | str]:
        """XLA's flags, for a mesh with `fsdp` devices on that axis."""
        options: dict[str, bool | int | str] = dict(COMPILER_OPTIONS.get(platform, {}))
        if platform == "gpu" and fsdp > 2:
            options["xla_gpu_reduce_scatter_combine_threshold_bytes"] = SCATTERED_TOGETHER // fsdp
        options |= PROFILER_OPTIONS.get(platform, {}) if self.profiled else {}
        return options | (DETERMINISTIC_OPTIONS.get(platform, {}) if self.deterministic else {})


USUAL = RunKind()
