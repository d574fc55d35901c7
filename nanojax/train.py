"""A pretraining run, from the command line to summary.json: `python -m nanojax.train configs/tiny.py`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config
from nanojax.errors import UserError, run_main

if TYPE_CHECKING:
    from nanojax.data.shards import Prepared
    from nanojax.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """A config, and how to run it this time."""

    out: str | None = None
    """Folder of the run. Derived: runs/ and the name of the preset."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder, as if never interrupted."""
    stop_after: int | None = None
    """Save and exit 75 after this step; the schedule stays that of --steps."""
    profile: str | None = None
    """first:last, the steps to trace with XLA's profiler, into the run's folder."""
    tensorboard: bool = False
    """Also write scalars for TensorBoard (needs tensorboardX)."""
    peak_tflops: float | None = None
    """Peak of one device in dense bf16, for the MFU. Derived: from a table of devices."""
    print_config: bool = False
    """Print the config, flags applied, and stop."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """`nanojax train [PRESET.py] [flags]`. jax is imported only once everything that needs no device has been checked."""
    started = time.perf_counter()
    command, preset = read_command(argv)
    if command.print_config:
        print(command.config.text(), end="")
        return

    from nanojax.data.shards import prepare
    from nanojax.runs import RunFolder
    from nanojax.sizes import resolve

    folder = RunFolder(Path(command.out or f"runs/{preset}"))
    folder.open_for_training(command.resume)
    data = prepare(command.config.data, command.config.model.vocab_size, print)
    config = resolve(command.config, data.tokenizer.n_vocab)
    if command.resume:
        folder.check_resume(config, data)
        if folder.finished(config):
            print(f"{folder.path} is complete: {config.train.steps} steps; see {folder.path / 'summary.json'}")
            return
    train(config, command, folder, data, started)


def read_command(argv: Sequence[str]) -> tuple[TrainCommand, str]:
    """(command, name of the preset). A run that is resumed without a preset takes its own saved config."""
    words = dict(prog="nanojax train [PRESET.py]", description=main.__doc__ or "")
    config, rest = split_preset(argv)
    preset = Path(argv[0]).stem if len(rest) < len(argv) else None
    command = parse(TrainCommand, rest, default=TrainCommand(config=config), **words)
    if command.resume and preset is None and command.out:
        from nanojax.runs import RunFolder

        saved, _ = RunFolder(Path(command.out)).read()
        command = parse(TrainCommand, rest, default=TrainCommand(config=saved), **words)
    if command.stop_after is not None and command.stop_after < 1:
        raise UserError(f"--stop-after takes a step from 1 on, given {command.stop_after}; try 1")
    return command, preset or "default"


def train(config: Config, command: TrainCommand, folder: RunFolder, data: Prepared, started: float) -> None:
    """The run itself: mesh, program, state, loop, summary."""
    import jax

    from nanojax import telemetry
    from nanojax.checkpoint import Checkpoints, state_sha256
    from nanojax.data.loader import Loader, validation_batches
    from nanojax.data.packing import load_or_make
    from nanojax.evals.bpb import Validation, bytes_table, evaluate
    from nanojax.loop import Interrupts, Loop, Meter
    from nanojax.mesh import batch_sharding, replicated
    from nanojax.program import keep_compiled_programs, make_program
    from nanojax.sizes import flops_per_token
    from nanojax.step import TrainState

    profile = telemetry.ProfileWindow(command.profile, folder.path / "profile")
    keep_compiled_programs(config.data.cache)
    program, model = make_program(config), config.model
    mesh = program.mesh
    steps, batch_tokens = config.train.steps or 0, config.train.batch_tokens or 0
    peak = telemetry.peak_flops(jax.devices(), command.peak_tflops)
    facts = program.facts | {"tokenizer": f"{data.tokenizer.n_vocab:,} tokens, {data.bytes_per_token:.2f} bytes each, {data.tokenizer.sha256[:16]}"}
    print(telemetry.header(config, facts | {"folder": str(folder.path)}, peak), flush=True)

    train_plan = load_or_make(data.train, seq_len=model.seq_len, packing=config.data.packing, seed=config.train.seed)
    val_plan = load_or_make(data.val, seq_len=model.seq_len, packing=config.data.packing, seed=None)
    rows = batch_tokens // model.seq_len
    loader = Loader(
        data.train, train_plan, rows_per_step=rows, accum=program.accumulation, sharding=batch_sharding(mesh), seed=config.train.seed,
        n_vocab=data.tokenizer.n_vocab,
    )  # fmt: skip
    bytes_V = jax.device_put(bytes_table(data.tokenizer, model.vocab_size), replicated(mesh))

    def validate(state: TrainState) -> Validation:
        batches = validation_batches(
            data.val, val_plan, rows_per_batch=rows // program.accumulation, max_tokens=config.train.eval_tokens,
            sharding=batch_sharding(mesh), n_vocab=data.tokenizer.n_vocab,
        )  # fmt: skip
        return evaluate(program.eval_step, state.params, batches, bytes_V)

    checkpoints = Checkpoints(folder.checkpoints, config.train.keep)
    with jax.set_mesh(mesh), Interrupts() as interrupts:
        if command.resume:
            state, meta = checkpoints.restore(program.shapes, program.shardings)
            loader.set_state(meta["data"])
        else:
            state, meta = program.init(jax.random.key(config.train.seed)), {}
            folder.write(config, data)
        done = int(state.step)
        progress = telemetry.ProgressLine(steps, done)
        sinks: list[telemetry.Sink] = [telemetry.JsonLines(folder.path / "metrics.jsonl", done)]
        if command.tensorboard:
            sinks.append(telemetry.TensorBoard(folder.path / "tensorboard"))
        meter = Meter(sinks, progress, batch_tokens, flops_per_token(model), peak, data.bytes_per_token, steps)
        history = {"val_bpb_initial": meta.get("val_bpb_initial"), "first_step_s": None}

        def to_save() -> dict:
            own = {"config": config.to_dict(), "tokenizer_sha256": data.tokenizer.sha256, "val_bpb_initial": history["val_bpb_initial"]}
            return own | {"data": loader.get_state()}

        def first_step() -> None:
            history["first_step_s"] = time.perf_counter() - started

        loop = Loop(
            config.train, program.train_step, loader, meter, profile, checkpoints, to_save, validate, command.stop_after,
            wait_each_step=program.platform == "cpu" and mesh.size > 1,
        )  # fmt: skip
        try:
            if done == 0:
                history["val_bpb_initial"] = loop.validate(state, 0).bpb
            state = loop.fit(state, done, interrupts, first_step)
            checkpoints.wait()
            final = loop.validate(state, steps)
        finally:
            profile.close()
            progress.close()
            checkpoints.close()
            loader.close()
    rate = meter.tokens_per_second
    summary = {
        "steps": steps, "tokens": steps * batch_tokens, "params": program.parameters, "flops_per_token": flops_per_token(model),
        "train_loss": meter.loss, **history, "val_bpb": final.bpb, "val_tokens": final.targets, "tokens_per_second": rate,
        "mfu": meter.mfu(rate), "peak_memory_bytes": telemetry.peak_memory_bytes(jax.local_devices()), "attention": program.attention,
        "precision": program.precision, "mesh": dict(mesh.shape), "skipped": int(state.skipped),
        "state_sha256": state_sha256(state, loader.get_state()),
    }  # fmt: skip
    folder.write_json("summary.json", summary)
    records = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    missing = telemetry.draw_loss(records, folder.path / "loss.png")
    print(f"validation {history['val_bpb_initial']:.4f} -> {final.bpb:.4f} bits per byte; {missing or folder.path / 'loss.png'}")


if __name__ == "__main__":
    run_main(main)
