"""What every training run shares: the order of step, metrics, save and evaluation, and how a run is interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from nanojax.checkpoint import Checkpoints, state_sha256
from nanojax.data.loader import Loader
from nanojax.errors import DriftError, Interrupted, NanoJaxError, NonFiniteError, StorageError
from nanojax.evals.bpb import Validation
from nanojax.faults import Faults
from nanojax.interrupts import Interrupts, Stop
from nanojax.meter import Meter
from nanojax.program import Phase, Program
from nanojax.progress import Progress
from nanojax.replicas import EVERY, Watch
from nanojax.step import TrainState
from nanojax.telemetry import ProfileWindow, peak_memory_bytes


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
    faults: Faults
    progress: Progress
    on_first_save: Callable[[], None] | None = None
    """Called once, when the first checkpoint of this process is on disk."""
    evaluated: bool = False
    """Whether this process has evaluated: its first evaluation compiles."""
    initial: float | None = None
    """Validation bits per byte before the first step."""
    left_out: list[list[int]] = dataclasses.field(default_factory=list)
    """[first, last] of the batches that were left out when the run went back to a checkpoint, counted from 1."""
    watch: Watch = dataclasses.field(init=False)
    _ran: Phase | None = None
    """That of the last step: the first of each compiles."""
    _went_back: dict[type, int] = dataclasses.field(default_factory=dict)
    """Why the run went back -> the step that it last went back to."""

    def __post_init__(self) -> None:
        self.watch = Watch(self.program.mesh, self.program.shardings)

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
        self.initial, self.left_out = saved.get("val_bpb_initial"), list(saved.get("left_out", []))
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
            "spikes": int(state.spikes),
            "left_out": self.left_out,
            "state_sha256": state_sha256(state, self.loader.get_state()),
        }

    def fit(self, state: TrainState, done: int, started: float) -> tuple[TrainState, float | None]:
        """(state after steps done + 1 .. steps, seconds to the first). Raises Interrupted, with the state saved, when told to stop."""
        number, first_step_s = done + 1, None
        while number <= self.program.config.steps:
            bad: NanoJaxError | None = None
            try:
                if done < number - 1 == self.stop_after:  # not where a resumed run begins
                    self.leave(state, f"as --stop-after {self.stop_after} asks")
                state = self.advance(number, state, wait=first_step_s is None)
                first_step_s = first_step_s or time.perf_counter() - started
                number += 1
            except (NonFiniteError, DriftError) as error:
                bad = error.with_traceback(None)  # which would hold the state
            if bad is not None:
                del state  # there may be no room for two
                state = self.go_back(bad)
                number = int(state.step) + 1
        return state, first_step_s

    def advance(self, number: int, state: TrainState, *, wait: bool) -> TrainState:
        """The state after step `number`, saved and evaluated if due. Raises NonFiniteError and DriftError, also those of earlier steps."""
        config, nth = self.program.config, self.loader.get_state()["next_step"] + 1
        self.checkpoints.check()
        self.profile.before(number, state)
        batch, phase = self.next_batch(state, number, nth), self.program.phase(number)
        self.progress.note(number, slow=phase is not self._ran)
        state = dataclasses.replace(state, params=self.faults.before_step(number, nth, state.params))
        with self.meter.waiting():
            state, metrics = phase.train_step(state, batch, *self.faults.factors(number, nth))
            self._ran = phase
            # Virtual CPU devices deadlock in their rendezvous when steps queue up.
            if wait or (self.program.platform == "cpu" and self.program.mesh.size > 1):
                jax.block_until_ready(metrics)
        self.meter.push(number, metrics)
        self.profile.after(number, metrics)
        self.compare()
        # Saved before it is evaluated: an evaluation that fails must not cost the run.
        if due(number, config.train.save_every) or number == config.steps:
            self.save_if_sound(state, number)
        elif due(number, EVERY) and self.program.mesh.size > 1:
            self.look(state, number)
        if due(number, config.train.eval_every) and number != config.steps:
            self.validate(state, number)
        return state

    def look(self, state: TrainState, number: int) -> None:
        """Begin to look at the state; `compare` hears of it."""
        with self.meter.waiting():
            self.watch.start(number, state, self.meter.busy)

    def compare(self, *, finite: bool = False) -> None:
        """What was seen at the last look. Raises DriftError where copies differ and, if `finite` is asked for, NonFiniteError."""
        with self.meter.waiting():
            seen = self.watch.read()
        if seen is None:
            return
        step, found = seen
        self.watch.require_equal(found, step)
        if finite:
            self.watch.require_finite(found, step)
        for words in self.watch.slow(found, statistics.median(self.meter.seconds or [math.inf])):
            self.meter.progress.say(f"step {step}  {words}")

    def go_back(self, bad: NanoJaxError) -> TrainState:
        """The state of the last checkpoint. After bad numbers the data goes on behind what was read since; after a drift it is read again.

        All processes see the same numbers, so all of them come here at the same step. Raises `bad` with what to do where there is no
        checkpoint, or where the run went back to this one already.
        """
        self.progress.note(slow=True)
        self.checkpoints.wait()
        self.watch.read()  # a look at the state that is given up
        step, drift = self.interrupts.peers.share(lambda: self.checkpoints.latest), isinstance(bad, DriftError)
        if step is None or (DriftError in self._went_back if drift else step == self._went_back.get(NonFiniteError)):
            why = "there is no checkpoint to go back to" if step is None else f"going back to step {step} was no help"
            remedy = "look at the data, or start anew with lower --optim.matrix-lr and --optim.embedding-lr"
            raise type(bad)(f"{bad}; {why}; {'go on without that device' if drift else remedy}")
        read = self.loader.get_state()["next_step"]
        state, saved = self.checkpoints.restore(self.program.shapes, self.program.shardings)
        step, first = int(state.step), saved["data"]["next_step"]
        self._went_back[type(bad)] = step
        self.meter.rewind(step)
        self.left_out, words = list(saved.get("left_out", [])), f"{bad}; back to step {step}"
        if drift:
            self._went_back.pop(NonFiniteError, None)  # what was left out since is met again
            self.loader.set_state(saved["data"])
        else:
            self.loader.set_state({"next_step": read})
            self.left_out.append([first + 1, read])
            self.meter.write({"step": step, "left_out": [first + 1, read]})
            words += f", and on with batch {read + 1}: those from {first + 1} are left out"
        self.meter.progress.say(words)
        return state

    def next_batch(self, state: TrainState, number: int, nth: int) -> Any:
        """For step `number`, the nth of the data, which may be slow."""
        position = self.loader.get_state()
        try:
            self.interrupts.point()
            with self.interrupts.waiting():
                self.faults.before_batch(number, nth)
                return next(self.loader)
        except Stop:
            self.leave(state, f"on {self.interrupts.name}", position)  # that before: the batch may have been taken, and was not used

    def save_if_sound(self, state: TrainState, number: int) -> None:
        """Save, unless updates are being left out just now: the run may have to go back to before it came to that."""
        self.meter.pause()
        if self.meter.in_a_row and number != self.program.config.steps:
            self.meter.progress.say(f"step {number} is not saved: the last {self.meter.in_a_row} updates were left out")
        else:
            self.save(state)

    def save(self, state: TrainState, position: dict[str, int] | None = None) -> None:
        """Start saving, with the position in the data: that of the loader, if no other.

        Raises DriftError and NonFiniteError instead of saving copies that differ or parameters that are not finite.
        """
        self.meter.pause()
        self.progress.note(slow=True)
        config = self.program.config
        self.look(state, int(state.step))
        self.compare(finite=True)
        own = {"config": config.to_dict(), "tokenizer_sha256": self.tokenizer_sha256, "val_bpb_initial": self.initial}
        own |= {"data": position or self.loader.get_state(), "left_out": self.left_out}
        own |= {"deterministic": self.program.run.deterministic}
        self.checkpoints.save(state, own)
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
