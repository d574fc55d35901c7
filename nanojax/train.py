"""A pretraining run, from the command line to summary.json: `python -m nanojax.train configs/tiny.py`."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from nanojax.checks import check_types, parse_window, require_positive
from nanojax.cli import FLAT, parse, split_preset, value_of
from nanojax.config import Config
from nanojax.errors import Interrupted, UserError, outlive_readers, run_main
from nanojax.faults import Faults
from nanojax.interrupts import Interrupts, Stop
from nanojax.progress import Progress, show_stacks_on_request
from nanojax.ranks import Ranks, connect, find

if TYPE_CHECKING:
    from nanojax.analysis.record import About
    from nanojax.checkpoint import Checkpoints
    from nanojax.data.loader import Loader
    from nanojax.data.packing import Plan
    from nanojax.data.shards import Prepared
    from nanojax.peers import Peers
    from nanojax.program import Program
    from nanojax.run_kind import RunKind
    from nanojax.runs import RunFolder
    from nanojax.step import TrainState

MANY_DROPPED = 0.5  # nanochat drops a third of FineWeb-Edu at T = 2048; more than half means documents longer than rows


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """A config, and how to run it this time."""

    out: str | None = None
    """Folder of the run. Derived: runs/ and the name of the preset."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder, as if never interrupted."""
    allow: Literal["precision"] | None = None
    """What --resume may change: precision, with what belongs to it (int4_group, fp4_*)."""
    stop_after: int | None = None
    """Save and exit 75 after this step; the schedule stays that of --steps."""
    profile: str | None = None
    """first:last, the steps to trace with XLA's profiler, into the run's folder."""
    tensorboard: bool = False
    """Also write scalars for TensorBoard (needs tensorboardX)."""
    peak_tflops: float | None = None
    """Peak of one device in dense bf16, for the MFU. Derived: from a table of devices."""
    deterministic: bool = False
    """On GPUs, use only what gives the same bits in every run. CPUs do anyway."""
    skip_spikes: bool = True
    """Leave out updates whose loss or gradient norm stands out among those of the last steps (spikes.py)."""
    print_config: bool = False
    """Print the config, flags applied and what follows from them filled in, and stop; what is None follows from the devices."""
    ranks: Annotated[Ranks, FLAT] = field(default_factory=Ranks)
    config: Annotated[Config, FLAT] = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """`nanojax train [PRESET.py] [flags]`. jax is imported only once everything that needs no device has been checked."""
    started = time.perf_counter()
    command, preset = read_command(argv)
    if command.print_config:
        print(derived(command.config).text(), end="")
        return
    faults, ranks = Faults.from_environment(resumed=command.resume), find(command.ranks)
    faults.require_ranks(ranks.num_processes or 1)

    from nanojax.runs import RunFolder

    folder = RunFolder(Path(command.out or f"runs/{preset}"))
    folder.require_cache_elsewhere(command.config)
    show_stacks_on_request()
    outlive_readers()
    with Interrupts() as interrupts, stop_told(interrupts):
        interrupts.peers = connect(ranks, interrupts.beside)
        with interrupts.peers, stop_told(interrupts):
            prepare_and_train(command, folder, interrupts, faults, started)


@contextlib.contextmanager
def stop_told(interrupts: Interrupts) -> Iterator[None]:
    """Turn a Stop before the first step into what the user is told."""
    try:
        yield
    except Stop:
        words = f"stopped on {interrupts.name} before a step of this process; nothing is lost, go on with the same command"
        raise Interrupted(words, abrupt=interrupts.abandoned) from None


def prepare_and_train(command: TrainCommand, folder: RunFolder, interrupts: Interrupts, faults: Faults, started: float) -> None:
    """Data and checks, and then the run. Of several processes, the first holds the folder and makes what is missing in the cache."""
    from nanojax.data.shards import prepare
    from nanojax.runs import RunFolder
    from nanojax.sizes import resolve

    peers = interrupts.peers
    with folder.open_for_training(command.resume) if peers.first else contextlib.nullcontext():
        # What devices may lack is said before minutes of tokenising, not after.
        asked = command.config.train
        if asked.attn_impl != "auto" or asked.mesh or (asked.fp8 and not command.resume):  # a run may be complete
            from nanojax.site import require_devices

            require_devices(command.config)
        with interrupts.waiting():
            data = peers.first_goes(lambda: prepare(command.config.data, command.config.model.vocab_size, peers.say))
        folder.require_seen()
        config = resolve(command.config, data.tokenizer.n_vocab)
        flags = ("resume", "allow", "stop_after", "profile", "deterministic", "skip_spikes")
        facts = {name: str(getattr(command, name)) for name in flags} | {"faults in the step": str(faults.in_step)}
        peers.require_same(facts | {"config": config.text(), "text": data.train.text_sha256, "tokenizer": data.tokenizer.sha256})
        with interrupts.waiting():
            if command.resume and not to_go_on(folder, config, data, command, peers):
                return
        if not command.resume and config.train.init_from is not None:
            RunFolder(Path(config.train.init_from)).check_weights_for(config, data)
        first = first_step(folder, command, peers)
        stop = command.stop_after
        last = stop if stop is not None and first <= stop < config.steps else config.steps
        if command.profile is not None and first <= last:
            require_window(command.profile, first, last)
        train(config, command, folder, data, interrupts, faults, started)


def derived(config: Config) -> Config:
    """The config as a run would resolve it; as it is where the vocabulary is one that would first be downloaded."""
    from nanojax.sizes import resolve

    if config.data.tokenizer is None:
        return resolve(config, config.model.vocab_size)
    if not config.data.tokenizer.endswith(".json"):
        return config
    from nanojax.tokenizer import Tokenizer

    return resolve(config, Tokenizer.load(config.data.tokenizer).n_vocab)


def require_window(profile: str, first: int, last: int) -> None:
    """Raise UserError where steps to trace begin outside of those that a run has left."""
    if not first <= parse_window(profile)[0] <= last:
        raise UserError(f"--profile must begin at a step from {first} to {last}, given {profile}; try {first}:{first}")


def first_step(folder: RunFolder, command: TrainCommand, peers: Peers) -> int:
    """The number of the first step of this life. Process 0 looks: what others see of a network's folder may be older."""
    return peers.share(lambda: folder.steps[-1] + 1 if command.resume else 1)


def to_go_on(folder: RunFolder, config: Config, data: Prepared, command: TrainCommand, peers: Peers) -> bool:
    """Whether a run has steps left; says so where it has none. Raises UserError where it cannot go on like this."""
    folder.check_resume(config, data, allow=command.allow)
    finished = peers.share(lambda: folder.finished(config))
    if finished and command.allow:
        raise UserError(f"{folder.path} is complete, and has no step left to train otherwise; start anew with --init-from {folder.path}")
    if finished:
        peers.say(f"{folder.path} is complete: {config.steps} steps; see {folder.path / 'summary.json'}")
    return not finished


def read_command(argv: Sequence[str]) -> tuple[TrainCommand, str]:
    """(command, name of the preset). A run that is resumed without a preset takes its own saved config."""
    words = dict(prog="nanojax train [PRESET.py]", description=main.__doc__ or "")
    config, rest = split_preset(argv)
    preset = Path(argv[0]).stem if len(rest) < len(argv) else None
    if preset is None and "--resume" in rest and (out := value_of("--out", rest)):
        config = saved_config(Path(out))  # before anything is parsed: flags are checked beside the fields that they go with
    command = parse(TrainCommand, rest, default=TrainCommand(config=config), **words)
    check_types(command)
    if command.peak_tflops is not None:
        require_positive("peak_tflops", command.peak_tflops)
    warmup, steps = command.config.optim.warmup_steps, command.config.train.steps
    if value_of("--optim.warmup-steps", rest) is not None and steps is not None and warmup > steps:
        raise UserError(f"optim.warmup_steps={warmup} must not exceed steps={steps}; try --optim.warmup-steps {steps // 10}")
    if command.allow is not None and not command.resume:
        raise UserError(f"--allow {command.allow} is for a run that goes on; add --resume, or start from its weights with --init-from")
    if command.stop_after is not None and command.stop_after < 1:
        raise UserError(f"--stop-after takes a step from 1 on, given {command.stop_after}; try 1")
    if command.profile is not None:
        first = parse_window(command.profile)[0]
        if not command.resume:  # where a run that goes on begins is known later, and where one ends if the corpus says
            require_window(command.profile, 1, min(steps or first, command.stop_after or first))
    return command, preset or "default"


def saved_config(path: Path) -> Config:
    """That of a run to go on with, its own tokenizer named, and what follows from other fields left to follow."""
    from nanojax.runs import RunFolder
    from nanojax.sizes import skipped_last

    folder = RunFolder(path)
    folder.require_resumable()
    saved, _ = folder.read()
    if saved.train.fp4_skip_last == skipped_last(saved.model, saved.train.fp4_recipe):
        saved = replace(saved, train=replace(saved.train, fp4_skip_last=None))
    # Its vocabulary is the padded one, for which the corpus would give another tokenizer.
    return replace(saved, data=replace(saved.data, tokenizer=str(folder.path / "tokenizer.json")))


def train(
    config: Config, command: TrainCommand, folder: RunFolder, data: Prepared, interrupts: Interrupts, faults: Faults, started: float
) -> None:
    """The run itself: program, data, state, loop, summary."""
    import jax

    from nanojax import telemetry
    from nanojax.data.packing import load_or_make
    from nanojax.evals.bpb import validator
    from nanojax.loop import Loop
    from nanojax.meter import Meter
    from nanojax.program import keep_compiled_programs, make_program, out_of_memory_told

    peers = interrupts.peers
    profile = telemetry.ProfileWindow(command.profile if peers.first else None, folder.path / "profile")
    progress = Progress(folder.progress(peers.process))
    keep_compiled_programs(config.data.cache)
    jax.devices()  # on all processes at once: they wait for one another here, and process 0 alone looks at checkpoints next
    checkpoints = open_checkpoints(config, command, folder, interrupts, faults)
    program, faults.rank = make_program(config, run=kind_of(command, faults)), peers.process
    checkpoints.require_space(program.shapes)
    peak = telemetry.peak_flops(jax.devices(), command.peak_tflops)
    cap = config.data.documents
    with interrupts.waiting():
        plan = load_or_make(
            data.train, seq_len=config.model.seq_len, packing=config.data.packing, seed=config.train.seed, max_documents=cap
        )
    here = {"folder": str(folder.path)} | ({"processes": str(peers.processes)} if peers.several else {})
    facts = program.facts | program.run.facts | data_facts(data, plan) | here | faults.facts
    peers.say(telemetry.header(config, facts, peak), flush=True)
    if program.platform == "gpu":
        peers.say(interrupts.beside(program.self_test), flush=True)
    prepare_step(program, command, folder, interrupts, peak)
    interrupts.beside(lambda: peers.barrier("compiled"))  # gloo and NCCL wait for the slowest compiler for seconds only
    loader = loader_of(program, data, plan)
    with jax.set_mesh(program.mesh), out_of_memory_told():
        state, saved = begin(program, command, folder, data, checkpoints, interrupts)
        loader.set_state(saved.get("data", loader.get_state()))
        meter = Meter.of(program, peak, data.bytes_per_token, folder, tensorboard=command.tensorboard, done=int(state.step))
        loop = Loop(
            program,
            loader,
            meter,
            profile,
            checkpoints,
            evaluate=validator(program, data, lambda: interrupts.point() or progress.note()),
            tokenizer_sha256=data.tokenizer.sha256,
            stop_after=command.stop_after,
            interrupts=interrupts,
            faults=faults,
            progress=progress,
        )
        if command.resume:  # what the saved config says must be true of the newest checkpoint, whenever this process ends
            # Together: did process 0 alone wait, the others' next step would wait for it on their GPUs, and their part of the save too.
            loop.on_first_save = functools.partial(folder.write, config, data) if peers.first else lambda: None
        with loop:
            state, outcome = loop.run(state, saved, started)
    if peers.first:
        conclude(folder, outcome)


def conclude(folder: RunFolder, outcome: dict[str, Any]) -> None:
    """Write the summary, draw the losses."""
    from nanojax.telemetry import draw_loss

    folder.write_json("summary.json", outcome)
    picture = draw_loss(folder.metrics, folder.path / "loss.png")
    print(f"validation {outcome['val_bpb_initial']:.4f} -> {outcome['val_bpb']:.4f} bits per byte; {picture}")


def kind_of(command: TrainCommand, faults: Faults) -> RunKind:
    """How the program of a run is built."""
    from nanojax.run_kind import RunKind

    return RunKind(
        profiled=command.profile is not None,
        deterministic=command.deterministic,
        spikes=command.skip_spikes,
        factors=faults.in_step,
    )


def open_checkpoints(config: Config, command: TrainCommand, folder: RunFolder, interrupts: Interrupts, faults: Faults) -> Checkpoints:
    """Those of the run. What it goes on from, or begins with, is found to be whole before anything is compiled."""
    from nanojax.checkpoint import PARAMS, Checkpoints
    from nanojax.runs import RunFolder
    from nanojax.sizes import count_parameters, state_bytes

    checkpoints = Checkpoints(folder.checkpoints, config.train.keep, interrupts.peers, fault=faults.in_save)
    with interrupts.waiting():
        if command.resume:
            checkpoints.verify(state_bytes(config.model))
        elif config.train.init_from is not None:
            source = Checkpoints(RunFolder(Path(config.train.init_from)).checkpoints, peers=interrupts.peers)
            source.verify(4 * count_parameters(config.model).total, PARAMS)
            source.close()
    return checkpoints


def begin(
    program: Program, command: TrainCommand, folder: RunFolder, data: Prepared, checkpoints: Checkpoints, interrupts: Interrupts
) -> tuple[TrainState, dict[str, Any]]:
    """(state, meta of the checkpoint that it is from, empty for a run that begins)."""
    with interrupts.waiting():
        if not command.resume:
            state = start(program, interrupts.peers)
        else:
            state, saved = checkpoints.restore(program.shapes, program.shardings)
            folder.check_checkpoint(saved, data)
            if saved.get("deterministic") and not command.deterministic:
                interrupts.peers.say("determinism: on until the checkpoint, off from here; add --deterministic to keep it")
            return state, saved
    if interrupts.peers.first:
        folder.metrics.unlink(missing_ok=True)  # of a life that ended before its first checkpoint
        folder.write(program.config, data)
    return state, {}


def loader_of(program: Program, data: Prepared, plan: Plan) -> Loader:
    """The training batches of a program."""
    from nanojax.data.loader import Loader
    from nanojax.mesh import batch_sharding

    return Loader(
        data.train,
        plan,
        rows_per_step=program.rows * program.accumulation,
        accum=program.accumulation,
        sharding=batch_sharding(program.mesh),
        seed=program.config.train.seed,
        n_vocab=data.tokenizer.n_vocab,
    )


def prepare_step(program: Program, command: TrainCommand, folder: RunFolder, interrupts: Interrupts, peak: float | None) -> None:
    """Compile the first step and look at it, before anything is allocated. Raises UserError where it cannot fit or lacks its kernels."""
    from nanojax.analysis.plan import require_fit
    from nanojax.analysis.record import write_record

    peers = interrupts.peers
    first = first_step(folder, command, peers)
    compiled = interrupts.beside(lambda: program.compile_step(first))
    interrupts.beside(lambda: require_fit(program, compiled, peers.say))
    peers.say(program.check_step(compiled), flush=True)
    if command.profile is not None and peers.first:
        write_record(folder.path / "profile", about(program, compiled, command.profile, peak), compiled.as_text() or "")


def about(program: Program, compiled: Any, window: str, peak: float | None) -> About:
    """What `nanojax inspect` is to know of the steps that are traced."""
    from nanojax.analysis.record import about_step
    from nanojax.sizes import flops_per_token

    (first, last), config = parse_window(window), program.config
    return about_step(
        compiled,
        device=program.mesh.devices.flat[0].device_kind,
        devices=program.mesh.size,
        steps=min(last, config.steps) - first + 1,
        tokens=config.batch_tokens,
        flops=float(flops_per_token(config.model) * config.batch_tokens),
        peak_flops=peak,
    )


def start(program: Program, peers: Peers) -> TrainState:
    """The state before the first step: drawn, or with the weights of the run that train.init_from names."""
    import jax

    from nanojax.checkpoint import Checkpoints
    from nanojax.runs import RunFolder

    train = program.config.train
    state = program.init(jax.random.key(train.seed))
    if train.init_from is None:
        return state
    checkpoints = Checkpoints(RunFolder(Path(train.init_from)).checkpoints, peers=peers)
    params = checkpoints.finite_params(program.shapes.params, program.shardings.params)
    peers.say(f"weights of step {checkpoints.latest} of {train.init_from}")
    checkpoints.close()
    return replace(state, params=params)


def data_facts(data: Prepared, plan: Plan) -> dict[str, str]:
    """Lines for the header."""
    advice = "; --data.packing concat would keep them" if plan.dropped > MANY_DROPPED and plan.packing == "best_fit" else ""
    return {
        "tokenizer": f"{data.tokenizer.n_vocab:,} tokens, {data.bytes_per_token:.2f} bytes each, SHA-256 {data.tokenizer.sha256[:16]}",
        "rows": f"{plan.rows:,} an epoch, {plan.packing}, {plan.dropped:.0%} of the tokens in none{advice}",
    }


if __name__ == "__main__":
    run_main(main)
