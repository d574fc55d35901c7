"""What a run tells: header, progress, metrics.jsonl, TensorBoard, the profile window, the loss curve."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanojax.checks import parse_window
from nanojax.config import Config
from nanojax.errors import StorageError, UserError
from nanojax.sizes import count_parameters, flops_per_token, state_bytes, step_bytes
from nanojax.tokenizer import write_atomically

# Dense bf16 TFLOP/s of one device, by what its `device_kind` contains; NVIDIA's datasheets. First match wins.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("5090", 209.5),
    ("4090", 165.2),
    ("3090", 71.0),
)
EXPECTED_MFU = 0.45  # for the header's guess only; an H200 reaches a little more (README)
SMOOTHING = 0.9  # of the drawn training curve: a running mean of some ten steps
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def peak_flops(devices: list[jax.Device], override_tflops: float | None) -> float | None:
    """FLOP/s of all devices together, None where the table has no entry."""
    if override_tflops is not None:
        return override_tflops * 1e12 * len(devices)
    found = next((tflops for name, tflops in PEAK_TFLOPS if name in devices[0].device_kind), None)
    return None if found is None else found * 1e12 * len(devices)


def peak_memory_bytes(devices: list[jax.Device]) -> int:
    """Most bytes in use so far on the fullest device; where devices do not say (CPU), of this process."""
    stats = [device.memory_stats() or {} for device in devices]
    peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def header(config: Config, facts: dict[str, str], peak: float | None) -> str:
    """What is about to run: versions, `facts` (devices, mesh, attention, data), counts by formula, expected time."""
    model = config.model
    counts, flops = count_parameters(model), flops_per_token(model)
    tokens = config.steps * config.batch_tokens
    expected = "known after the first steps"
    if peak is not None:
        expected = f"{duration(flops * tokens / (peak * EXPECTED_MFU))} at {EXPECTED_MFU:.0%} MFU"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    rows = {
        "versions": f"python {sys.version.split()[0]}, {versions}",
        **facts,
        "model": f"{model.depth} layers, width {model.width}, {model.n_head} heads ({model.kv_heads} kv) of {model.head_dim}, "
        f"{model.ffn} {model.hidden}, vocabulary {model.vocab_size:,}, rows of {model.seq_len}",
        "parameters": f"{counts.total:,} (embedding {counts.embedding:,}, head {counts.head:,}, "
        f"matrices {counts.matrices:,}, gains {counts.gains:,})",
        "per token": f"{flops:,} FLOPs forward and backward",
        "memory": f"{gib(state_bytes(model))} of parameters and moments, {gib(step_bytes(model))} of gradients and casts, over the mesh",
        "run": f"{config.steps:,} steps of {config.batch_tokens:,} tokens, {tokens:,} in all",
        "expected": expected,
    }
    return "\n".join(f"{name:>12}  {text}" for name, text in rows.items())


def gib(n: float) -> str:
    """Bytes as text, in GiB."""
    return f"{n / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """90 -> '1 min 30 s'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{int(minutes)} min {int(seconds % 60)} s" if minutes < 60 else f"{int(hours)} h {int(minutes % 60)} min"


class Sink(Protocol):
    """Where a record of metrics goes."""

    def write(self, record: dict[str, Any]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, appended; lines of steps after `done`, of an earlier life of the run, are dropped."""

    def __init__(self, path: Path, done: int):
        self.path = path
        self._open(done)

    def _open(self, done: int) -> None:
        path = self.path
        try:
            records = read_lines(path) if path.exists() else []
            kept = [record for record in records if record["step"] <= done]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
            self.last_loss = next((record["loss"] for record in reversed(kept) if "loss" in record), math.nan)
            """Training loss of step `done`, NaN at the start."""
            self._file = path.open("ab", buffering=0)  # what could not be written must not be tried again as it closes
        except StorageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StorageError(f"cannot continue {path} ({error}); move it away") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append at once, so that a reader or a crash sees whole lines."""
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):  # the disk was full after a part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}; free space there and start again with --resume") from error

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps: they come again."""
        self.close()
        self._open(step)

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a crash cut short is dropped, any other that does not parse raises."""
    lines = path.read_text().splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return [json.loads(line) for line in lines[:-1]]


class TensorBoard:
    """Scalars for TensorBoard, through tensorboardX. Raises UserError when that is not installed."""

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs tensorboardX, which is not installed; pip install 'nanojax[viz]'") from None
        self._writer = SummaryWriter(str(folder))

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def rewind(self, step: int) -> None:
        """Nothing: what is written stays, and the same steps are drawn over it."""

    def close(self) -> None:
        self._writer.close()


class ProgressLine:
    """A bar on a terminal, a line now and then elsewhere; both on stderr."""

    def __init__(self, steps: int, done: int, *, quiet: bool = False):
        self._console = Console(stderr=True, quiet=quiet)
        self._steps, self._last = steps, 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal:
            bar = Progress(
                TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
                console=self._console,
            )  # fmt: skip
            self._task = bar.add_task("", total=steps, completed=done)
            bar.start()
            self._bar = bar

    def update(self, step: int, text: str, seconds_left: float | None) -> None:
        """Show step `step` as done; None where the time left is not known yet."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last > 10 or step == self._steps:
            self._last = time.monotonic()
            left = "" if seconds_left is None else f"  {duration(seconds_left)} left"
            self.say(f"step {step}/{self._steps}  {text}{left}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class ProfileWindow:
    """An XLA trace of steps first..last of a run, into `folder`; opens in xprof, TensorBoard and Perfetto."""

    def __init__(self, window: str | None, folder: Path):
        self.folder, self._open = folder, False
        self.first, self.last = parse_window(window) if window else (-1, -1)

    def before(self, step: int, state: Any) -> None:
        """Begin the trace, if it is due, after the device has made `state`: the step before may still be on its way."""
        if step == self.first and not self._open:  # a run that goes back comes to it again
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._open = True

    def after(self, step: int, outputs: Any) -> None:
        if step == self.last:
            self.close(outputs)

    def close(self, outputs: Any = None) -> None:
        """End the trace, after the device is done with `outputs`."""
        if self._open:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._open = False


def draw_loss(metrics: Path, target: Path) -> str:
    """Draw metrics.jsonl as a picture. Returns where it is, or what is missing when there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return "no loss curve: matplotlib is not installed; pip install 'nanojax[viz]'"
    matplotlib.use("agg")
    from matplotlib import pyplot

    records = read_lines(metrics)
    train = [(r["step"], r["bpb"]) for r in records if "bpb" in r and math.isfinite(r["bpb"])]
    validation = [(r["step"], r["val_bpb"]) for r in records if "val_bpb" in r and math.isfinite(r["val_bpb"])]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        mean = [losses[0]]
        for loss in losses[1:]:
            mean.append(SMOOTHING * mean[-1] + (1 - SMOOTHING) * loss)
        axes.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.35, label="training")
        axes.plot(steps, mean, color="tab:blue", linewidth=1.8, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:red", marker="o", markersize=5, label="validation")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    write_atomically(target, picture.getvalue())
    return str(target)
