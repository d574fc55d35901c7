"""The metrics of a run: read a step behind, timed, and passed on."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from nanojax.errors import NonFiniteError
from nanojax.program import Program
from nanojax.replicas import EVERY
from nanojax.runs import RunFolder
from nanojax.sizes import flops_per_token
from nanojax.telemetry import JsonLines, ProgressLine, Sink, TensorBoard

WARMUP_STEPS = 3  # left out of tokens/s: compilation, autotuning and first touches of memory
MAX_IN_A_ROW = 20  # updates that are left out, before the run goes back


@dataclasses.dataclass
class Meter:
    """Reads the metrics of a step while the next one runs, times it, and passes them on."""

    sinks: Sequence[Sink]
    progress: ProgressLine
    tokens_per_step: int
    flops_per_token: int
    peak_flops: float | None
    bytes_per_token: float
    steps: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    loss: float = math.nan
    in_a_row: int = 0
    """Updates left out since the last one that was made, as of the step that was read last."""
    hosts: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=EVERY))
    """Seconds of the last steps that this process did not wait for devices."""
    _held: tuple[int, Any] | None = None
    _since: float | None = None
    _read: int = 0
    _waited: float = 0.0

    @classmethod
    def of(cls, program: Program, peak: float | None, bytes_per_token: float, folder: RunFolder, *, tensorboard: bool, done: int) -> Meter:
        """The meter of a run that is at step `done`, writing into its folder; only the first process writes."""
        config = program.config
        sinks: list[Sink] = []
        loss = math.nan
        if jax.process_index() == 0:
            lines = JsonLines(folder.metrics, done)
            loss = lines.last_loss
            sinks.append(lines)
            if tensorboard:
                sinks.append(TensorBoard(folder.path / "tensorboard"))
        return cls(
            sinks=sinks,
            progress=ProgressLine(config.steps, done, quiet=jax.process_index() != 0),
            tokens_per_step=config.batch_tokens,
            flops_per_token=flops_per_token(config.model),
            peak_flops=peak,
            bytes_per_token=bytes_per_token,
            steps=config.steps,
            loss=loss,
        )

    def close(self) -> None:
        self.progress.close()
        for sink in self.sinks:
            sink.close()

    def push(self, step: int, metrics: Any) -> None:
        """Step `step` was just started; read the one before."""
        self.flush()
        self._held = (step, metrics)

    def flush(self) -> None:
        """Wait for the step that is held and write its record."""
        if self._held is None:
            return
        (step, metrics), self._held = self._held, None
        with self.waiting():
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, since, self._since = time.perf_counter(), self._since, time.perf_counter()
        self._read += 1
        took = None if since is None or self._read <= WARMUP_STEPS else now - since
        if took is not None:
            self.seconds.append(took)
            self.hosts.append(took - self._waited)
        self._waited = 0.0
        self.loss, self.in_a_row = values["loss"], int(values["in_a_row"])
        record: dict[str, Any] = {"step": step, "tokens": step * self.tokens_per_step, **values, "bpb": self._bpb(self.loss)}
        if took is not None:
            record |= {"tokens_per_second": self.tokens_per_step / took, "seconds": took}
        self.write(record)
        self.progress.update(step, self._text(values, took), None if took is None else (self.steps - step) * took)
        if self.in_a_row > MAX_IN_A_ROW:
            raise NonFiniteError(f"{self.in_a_row} updates in a row, up to step {step}, were not finite or spikes, and were left out")

    def pause(self) -> None:
        """Finish what runs, without timing it: the host came here early, and what follows belongs to no step."""
        self._since = None
        self.flush()
        self._since = None

    @property
    def busy(self) -> float:
        """Seconds of a step that this process takes without waiting for devices, the median of the last; NaN before there is one."""
        return statistics.median(self.hosts) if self.hosts else math.nan

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for devices."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def rewind(self, step: int) -> None:
        """Forget what came after a step; a step that is held was of it."""
        self._held = self._since = None
        self.in_a_row = 0
        for sink in self.sinks:
            sink.rewind(step)

    def write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    @property
    def tokens_per_second(self) -> float | None:
        """From the median step, warm-up left out; None before there is one."""
        return self.tokens_per_step / statistics.median(self.seconds) if self.seconds else None

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Share of the devices' peak that the model's FLOPs take."""
        if tokens_per_second is None or self.peak_flops is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak_flops

    def _bpb(self, loss: float) -> float:
        """Training loss in bits per byte, at the corpus' mean bytes per token."""
        return loss / math.log(2) / self.bytes_per_token

    def _text(self, values: dict[str, float], took: float | None) -> str:
        text = f"loss {values['loss']:.4f}  bpb {self._bpb(values['loss']):.3f}"
        if took is not None:
            rate = self.tokens_per_step / took
            mfu = self.mfu(rate)
            text += f"  {rate:,.0f} tok/s" + (f"  {mfu:.1%} MFU" if mfu is not None else "")
        return text + "".join(f"  {int(values[name])} {name}" for name in ("skipped", "spikes") if values[name])
