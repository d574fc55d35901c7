"""What every training run shares: the order of step, metrics, save and evaluation, and how a run is interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from nanojax.checkpoint import Checkpoints, state_sha256
from nanojax.data.loader import Loader
from nanojax.errors import Interrupted, NonFiniteError, StorageError
from nanojax.evals.bpb import Validation
from nanojax.interrupts import Interrupts, Stop
from nanojax.program import Phase, Program
from nanojax.progress import Progress
from nanojax.runs import RunFolder
from nanojax.sizes import flops_per_token
from nanojax.step import TrainState
from nanojax.telemetry import JsonLines, ProfileWindow, ProgressLine, Sink, TensorBoard, peak_memory_bytes

WARMUP_STEPS = 3  # left out of tokens/s: compilation, autotuning and first touches of memory
MAX_SKIPPED_IN_A_ROW = 20


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
    _held: tuple[int, Any] | None = None
    _since: float | None = None
    _read: int = 0
    _skipped: tuple[float, int] = (0.0, 0)

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
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, since, self._since = time.perf_counter(), self._since, time.perf_counter()
        self._read += 1
        took = None if since is None or self._read <= WARMUP_STEPS else now - since
        if took is not None:
            self.seconds.append(took)
        self.loss = values["loss"]
        self._count_skipped(step, values["skipped"])
        record: dict[str, Any] = {"step": step, "tokens": step * self.tokens_per_step, **values, "bpb": self._bpb(self.loss)}
        if took is not None:
            record |= {"tokens_per_second": self.tokens_per_step / took, "seconds": took}
        self.write(record)
        self.progress.update(step, self._text(values, took), None if took is None else (self.steps - step) * took)

    def pause(self) -> None:
        """Finish what runs, without timing it: the host came here early, and what follows belongs to no step."""
        self._since = None
        self.flush()
        self._since = None

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
        return text + (f"  {int(values['skipped'])} skipped" if values["skipped"] else "")

    def _count_skipped(self, step: int, skipped: float) -> None:
        before, row = self._skipped
        self._skipped = (skipped, row + 1 if skipped > before else 0)
        if self._skipped[1] > MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{self._skipped[1]} updates in a row, up to step {step}, were not finite and were skipped; "
                f"lower --optim.matrix-lr and --optim.embedding-lr and start again with --resume"
            )


@dataclasses.dataclass
class Loop:
    """A run in progress; use it as a context, so that files, threads and the last save are finished however it ends."""

    program: Program
    loader: Loader
    meter: Meter
    profile: ProfileWindow
    checkpoints: Checkpoints
    evaluate: Callable[[dict[str, jax.Array]], Validation]
    """Of prepared weights."""
    tokenizer_sha256: str
    stop_after: int | None
    interrupts: Interrupts
    progress: Progress
    on_first_save: Callable[[], None] | None = None
    """Called once, when the first checkpoint of this process is on disk."""
    evaluated: bool = False
    """Whether this process has evaluated: its first evaluation compiles."""
    initial: float | None = None
    """Validation bits per byte before the first step."""

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.profile.close()
        self.meter.close()
        self.loader.close()
        # Where the run is failing already, a save that fails as well must not hide why.
        with contextlib.suppress(StorageError) if kind else contextlib.nullcontext():
            self.checkpoints.close()

    def run(self, state: TrainState, saved: dict[str, Any], started: float) -> tuple[TrainState, dict[str, Any]]:
        """(last state, summary) after all steps. `saved` is the meta of the checkpoint that `state` came from, empty at first;
        `started` is the perf_counter that first_step_s counts from.
        """
        config, done = self.program.config, int(state.step)
        self.interrupts.leave_together()
        self.initial = saved.get("val_bpb_initial")
        if self.initial is None:
            self.initial = self.validate(state, done).bpb
        state, first_step_s = self.fit(state, done, started)
        self.progress.note(slow=True)
        self.checkpoints.wait()
        final = self.validate(state, config.steps)
        self.progress.note(slow=True)
        rate = self.meter.tokens_per_second
        return state, {
            "steps": config.steps,
            "tokens": config.steps * config.batch_tokens,
            "params": self.program.parameters,
            "flops_per_token": self.meter.flops_per_token,
            "train_loss": self.meter.loss,
            "val_bpb_initial": self.initial,
            "val_bpb": final.bpb,
            "val_tokens": final.targets,
            "tokens_per_second": rate,
            "mfu": self.meter.mfu(rate),
            "peak_memory_bytes": peak_memory_bytes(jax.local_devices()),
            "first_step_s": first_step_s,
            "attention": self.program.attention,
            "precision": self.program.phase(config.steps).precision,
            "mesh": dict(self.program.mesh.shape),
            "skipped": int(state.skipped),
            "state_sha256": state_sha256(state, self.loader.get_state()),
        }

    def fit(self, state: TrainState, done: int, started: float) -> tuple[TrainState, float | None]:
        """(state after steps done + 1 .. steps, seconds to the first). Raises Interrupted, with the state saved, when told to stop."""
        train, first_step_s = self.program.config.train, None
        steps = self.program.config.steps
        # Virtual CPU devices deadlock in their rendezvous when steps queue up.
        wait_each = self.program.platform == "cpu" and self.program.mesh.size > 1
        ran: Phase | None = None
        for number in range(done + 1, steps + 1):
            if done < number - 1 == self.stop_after:  # not where a resumed run begins
                self.leave(state, f"as --stop-after {self.stop_after} asks")
            self.checkpoints.check()
            self.profile.before(number)
            phase = self.program.phase(number)
            batch = self.next_batch(state)
            self.progress.note(number, slow=phase is not ran)  # its first step compiles
            state, metrics = phase.train_step(state, batch)
            ran = phase
            if wait_each or first_step_s is None:
                jax.block_until_ready(metrics)
                first_step_s = first_step_s or time.perf_counter() - started
            self.meter.push(number, metrics)
            self.profile.after(number, metrics)
            # Saved before it is evaluated: an evaluation that fails must not cost the run.
            if due(number, train.save_every) or number == steps:
                self.save(state)
            if due(number, train.eval_every) and number != steps:
                self.validate(state, number)
        self.meter.flush()
        return state, first_step_s

    def next_batch(self, state: TrainState) -> Any:
        """Of the data, which may be slow."""
        position = self.loader.get_state()
        try:
            self.interrupts.point()
            with self.interrupts.waiting():
                return next(self.loader)
        except Stop:
            self.leave(state, f"on {self.interrupts.name}", position)  # that before: the batch may have been taken, and was not used

    def save(self, state: TrainState, position: dict[str, int] | None = None) -> None:
        """Start saving, with the position in the data: that of the loader, if no other."""
        self.meter.pause()
        self.progress.note(slow=True)
        config = self.program.config
        own = {"config": config.to_dict(), "tokenizer_sha256": self.tokenizer_sha256, "val_bpb_initial": self.initial}
        self.checkpoints.save(state, own | {"data": position or self.loader.get_state()})
        if self.on_first_save:
            self.checkpoints.wait()
            self.on_first_save()
            self.on_first_save = None

    def validate(self, state: TrainState, number: int) -> Validation:
        """Evaluate and report, outside the timing of the steps."""
        self.meter.pause()
        self.progress.note(slow=not self.evaluated)
        try:
            with self.interrupts.waiting():
                result = self.evaluate(self.program.phase(number).prepare(state.params))
        except Stop:
            self.leave(state, f"on {self.interrupts.name}")
        self.evaluated = True
        self.meter.write({"step": number, "val_bpb": result.bpb, "val_loss": result.loss})
        self.meter.progress.say(f"step {number}  validation {result.bpb:.4f} bits per byte ({result.targets:,} tokens)")
        return result

    def leave(self, state: TrainState, why: str, position: dict[str, int] | None = None) -> NoReturn:
        """Save and stop."""
        self.save(state, position)
        self.checkpoints.wait()
        raise Interrupted(f"stopped {why}, step {int(state.step)} saved; go on with the same command and --resume")


def due(number: int, every: int) -> bool:
    """Whether something done every `every` steps, 0 meaning never, is due after step `number`."""
    return every > 0 and number % every == 0
