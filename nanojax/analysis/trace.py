"""A folder that XLA's profiler wrote -> the kernels that a device ran, and what part of the time each had to itself."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanojax.errors import UserError
from nanojax.files import read_regular

LARGEST_TRACE = 2**33  # bytes
COMPUTE, COPY, COMMUNICATION = 2, 1, 0  # which of the kernels that run at once the time is put down to; the others are hidden

AROUND = re.compile(r"(while|call|conditional)([._\d]|$)")  # on CPUs: what the time of other operations lies within; alone, nothing runs


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One event on a device. Times are in ns from any zero."""

    name: str
    op: str
    """The instruction of the program that it belongs to; empty where the profiler does not say."""
    module: str
    """The program."""
    start: float
    end: float

    @property
    def kind(self) -> int:
        """COMPUTE, COPY or COMMUNICATION."""
        if "nccl" in self.name.lower():
            return COMMUNICATION
        return COPY if re.match(r"Memcpy(H2D|D2H|P2P)", self.name) else COMPUTE


def trace_file(folder: Path) -> Path:
    """The newest trace below a folder. Raises UserError where there is none."""
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.lstat().st_mtime) if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder} holds no trace (*.xplane.pb); make one with nanojax train ... --profile 20:23")
    return found[-1]


def read_trace(folder: Path) -> list[Kernel]:
    """The kernels of the first device in the newest trace below a folder, by time.

    On a CPU they are the operations that XLA's threads ran. Raises UserError on a file that is no trace or holds no kernels.
    """
    from jax.profiler import ProfileData

    path = trace_file(folder)
    try:
        content = read_regular(path, LARGEST_TRACE)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; see to that and try again") from error
    try:
        planes = list(ProfileData.from_serialized_xspace(content).planes)
        device = next((plane for plane in sorted(planes, key=lambda p: p.name) if plane.name.startswith("/device:GPU")), None)
        if device is not None:
            kernels = [_kernel(event) for line in device.lines if "Stream" in line.name for event in line.events]
        else:
            host = (plane for plane in planes if plane.name == "/host:CPU")
            kernels = [k for plane in host for line in plane.lines for event in line.events if (k := _kernel(event)).op]
            kernels = [kernel for kernel in kernels if not kernel.name.startswith("end: ") and not AROUND.match(kernel.op)]
    except Exception as error:  # the parser of the profiler raises what it likes on bytes that are no trace
        raise UserError(f"{path} is no trace that can be read ({(str(error).splitlines() or [''])[0]:.100}); profile again") from error
    if not kernels:
        raise UserError(f"{path} holds no kernels of a device; profile steps that run, such as --profile 20:23")
    return sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))


def _kernel(event: Any) -> Kernel:
    stats = {key: value for key, value in event.stats if key in ("hlo_op", "hlo_module")}
    op = str(stats.get("hlo_op", ""))
    op = "" if op.startswith("command_buffer") else op  # which of its instructions a graph's kernel is, the profiler does not say
    return Kernel(event.name, op, str(stats.get("hlo_module", "")), event.start_ns, event.start_ns + event.duration_ns)


def main_module(kernels: Sequence[Kernel]) -> str:
    """The program that most of the time went to; a training step where there is one."""
    times: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        times[kernel.module] += kernel.end - kernel.start
    steps = [module for module in times if "train_step" in module]
    return max(steps or times, key=lambda module: times[module])


def own_times(kernels: Sequence[Kernel]) -> list[float]:
    """For each kernel, by time, the ns that are put down to it: their sum is the length of the union of all.

    Of kernels that run at once it is the one of the highest kind, and of those the one that began last: the innermost, where they nest.
    """
    boundaries = sorted({edge for kernel in kernels for edge in (kernel.start, kernel.end)})
    own, active, next_ = [0.0] * len(kernels), [], 0
    for begin, end in itertools.pairwise(boundaries):
        while next_ < len(kernels) and kernels[next_].start <= begin:
            kernel = kernels[next_]
            heapq.heappush(active, (-kernel.kind, -kernel.start, -next_, kernel.end, next_))
            next_ += 1
        while active and active[0][3] <= begin:
            heapq.heappop(active)
        if active:
            own[active[0][4]] += end - begin
    return own
