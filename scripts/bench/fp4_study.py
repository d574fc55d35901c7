"""Does 4-bit training work? Bits per byte of every format against bf16, by seed.   python scripts/bench/fp4_study.py --out DIR

Same data, same steps, same seeds; post-training quantisation of the bf16 runs beside them; and a control of 3 bits, whose gap must
stand out, or the study is too small to see any. Without --text it takes the source of the Python packages that are installed, split
by package. A study that was stopped goes on where it was; with --share i/n, n processes on n devices do it together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanojax.cli import parse
from nanojax.config import Config, DataConfig, ModelConfig, TrainConfig
from nanojax.data.corpus import COLUMN, MANIFEST
from nanojax.errors import UserError, run_main
from nanojax.sizes import count_parameters, resolve

CONTROL = "3 bits, groups of 128"
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nvfp4": dict(precision="nvfp4"),
    "nvfp4_2d": dict(precision="nvfp4_2d"),
    "mxfp4": dict(precision="mxfp4"),
    "int4 g64": dict(precision="int4", int4_group=64),
    "int4 g128": dict(precision="int4", int4_group=128),
    "int4 g256": dict(precision="int4", int4_group=256),
    CONTROL: {},
}
HELD_OUT = 16  # one package in so many validates
LARGEST_FILE = 2**20  # bytes; beyond it lie tables
TIMED_STEPS = 50  # between two looks at the clock
DROPPED = 2  # of those stretches, the first


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to train, how often, and where."""

    out: str
    """Folder of the results, the table and the picture."""
    text: str | None = None
    """Folder of .jsonl files; None: the installed packages, gathered into a folder below the cache."""
    tokenizer: str | None = None
    """None: one is trained on the text."""
    cache: str = "~/.cache/nanojax"
    """As --data.cache of nanojax train."""
    depth: int = 8
    """Layers."""
    d_model: int | None = None
    """Width, a multiple of 256 for groups of 256."""
    seq_len: int = 512
    """Tokens in a row."""
    vocab_size: int = 8192
    """Of the tokenizer that is trained."""
    batch_tokens: int = 2**16
    """Tokens a step."""
    tokens: int = 50_000_000
    """Tokens a run."""
    eval_tokens: int = 2**21
    """Validation tokens."""
    seeds: int = 3
    """Runs of each variant."""
    share: str = "0/1"
    """i/n: this process takes every n-th run, from the i-th on."""
    minutes: float = 1e9
    """Start no run that would not end within this time; 0 only prepares the data."""


def main(argv: Sequence[str]) -> None:
    """Run what is not done yet, then write table and picture."""
    began = time.monotonic()
    study = parse(Study, argv, prog="fp4_study.py", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    out = Path(study.out)
    out.mkdir(parents=True, exist_ok=True)
    text = study.text or str(gather(Path(study.cache).expanduser() / "packages"))
    base = Config(
        model=ModelConfig(depth=study.depth, d_model=study.d_model, seq_len=study.seq_len, vocab_size=study.vocab_size),
        train=TrainConfig(steps=round(study.tokens / study.batch_tokens), batch_tokens=study.batch_tokens, eval_tokens=study.eval_tokens),
        data=DataConfig(path=text, tokenizer=study.tokenizer, cache=study.cache, packing="concat"),
    )
    share, of = map(int, study.share.split("/"))
    todo = [(name, seed) for seed in range(study.seeds) for name in VARIANTS][share::of]
    done = {(record["variant"], record["seed"]) for record in records(out)}
    run = runner(base)
    longest = 0.0
    for name, seed in todo:
        left = study.minutes * 60 - (time.monotonic() - began)
        if (name, seed) in done or left < 1.3 * longest or study.minutes == 0:
            continue
        at = time.monotonic()
        record = run(name, seed)
        longest = max(longest, time.monotonic() - at)
        with (out / f"results-{share}.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        print(f"{name}, seed {seed}: {record['bpb']:.4f} bits per byte, {record['step_ms']:.1f} ms a step", flush=True)
    if found := list(records(out)):
        (out / "table.md").write_text(table(found))
        print(table(found))
        draw(found, out / "fp4_study.png")


def gather(folder: Path) -> Path:
    """The .py files of the installed packages as train.jsonl and val.jsonl, no file twice, no package in both."""
    if (folder / MANIFEST).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    root, seen = Path(sysconfig.get_path("purelib")), set()
    with (folder / "train.jsonl").open("w") as train, (folder / "val.jsonl").open("w") as val:
        for file in sorted(root.rglob("*.py")):
            if not file.is_file() or file.stat().st_size > LARGEST_FILE:
                continue
            content = file.read_bytes()
            if (mark := hashlib.sha256(content).digest()) in seen:
                continue
            seen.add(mark)
            package = file.relative_to(root).parts[0].removesuffix(".py")
            held_out = hashlib.sha256(package.encode()).digest()[0] % HELD_OUT == 0
            text = content.decode("utf-8", errors="replace").replace("\0", "")
            (val if held_out else train).write(json.dumps({COLUMN: text}) + "\n")
    (folder / MANIFEST).write_text(json.dumps({"files": ["train.jsonl", "val.jsonl"], "validation": "val.jsonl"}))
    return folder


def records(out: Path) -> Iterator[dict[str, Any]]:
    """Every run that is done, of all processes."""
    for file in sorted(out.glob("results-*.jsonl")):
        yield from map(json.loads, file.read_text().splitlines())


def three_bits(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The control: block matrices at -3..3 times a scale for each group of 128, the rest cast as ever."""
    import jax.numpy as jnp

    from nanojax.precision import Rounding, prepare_weights

    def rounded(w):
        groups = w.reshape(-1, 128, w.shape[1])
        scales = jnp.maximum(jnp.abs(groups).max(axis=1, keepdims=True), 1e-8) / 3
        return (jnp.clip(jnp.rint(groups / scales), -3, 3) * scales).reshape(w.shape)

    rounding = Rounding("fp32")
    return prepare_weights({k: rounded(w) if rounding.covers(k) else w for k, w in params.items()}, rounding=rounding, dtype=dtype)


def runner(base: Config) -> Callable[[str, int], dict[str, Any]]:
    """(variant, seed) -> the record of one run, programs compiled once a variant."""
    import jax

    from nanojax.data.loader import Loader
    from nanojax.data.packing import load_or_make
    from nanojax.data.shards import prepare
    from nanojax.evals.bpb import validator
    from nanojax.mesh import batch_sharding
    from nanojax.program import DTYPES, formats, keep_compiled_programs, make_program

    keep_compiled_programs(base.data.cache)
    data = prepare(base.data, base.model.vocab_size, print)
    compute, _ = formats(base, jax.default_backend())

    @functools.cache
    def variant(name: str) -> Any:
        config = resolve(replace(base, train=replace(base.train, **VARIANTS[name])), data.tokenizer.n_vocab)
        control = functools.partial(three_bits, dtype=DTYPES[compute]) if name == CONTROL else None
        return make_program(config, jax.devices()[:1], prepare=control)

    def run(name: str, seed: int) -> dict[str, Any]:
        program, seq_len = variant(name), base.model.seq_len
        plan = load_or_make(data.train, seq_len=seq_len, packing="concat", seed=seed)
        loader = Loader(
            data.train,
            plan,
            rows_per_step=program.rows * program.accumulation,
            accum=program.accumulation,
            sharding=batch_sharding(program.mesh),
            seed=seed,
            n_vocab=data.tokenizer.n_vocab,
        )
        with jax.set_mesh(program.mesh):
            state, seconds = train(program, loader, program.init(jax.random.key(seed)))
            loader.close()
            validate = validator(program, data)
            final = validate(program.phases[0].prepare(state.params))
            post = {}
            if name == "bf16":
                others = [other for other in VARIANTS if other != name]
                post = {other: validate(variant(other).phases[0].prepare(state.params)).bpb for other in others}
        seen = {"variant": name, "seed": seed, "bpb": final.bpb, "post_training": post, "step_ms": 1e3 * seconds}
        return (
            seen | {"skipped": int(state.skipped), "device": jax.devices()[0].device_kind} | sizes_of(program.config, plan.rows * seq_len)
        )

    return run


def sizes_of(config: Config, corpus_tokens: int) -> dict[str, Any]:
    """How long a run is, next to its model and its data."""
    size, tokens = count_parameters(config.model), config.steps * config.batch_tokens
    length = {"steps": config.steps, "tokens": tokens, "epochs": tokens / corpus_tokens}
    return length | {"parameters": size.total, "tokens_per_parameter": tokens / size.scaling}


def train(program: Any, loader: Any, state: Any) -> tuple[Any, float]:
    """(last state, median seconds a step); the clock is read every TIMED_STEPS, and the first stretches are dropped."""
    import jax

    stretches, at = [], time.perf_counter()
    for number in range(1, program.config.steps + 1):
        state, metrics = program.phases[0].train_step(state, next(loader))
        if number % TIMED_STEPS == 0:
            jax.block_until_ready(metrics)
            now, at = time.perf_counter() - at, time.perf_counter()
            stretches.append(now / TIMED_STEPS)
    jax.block_until_ready(state)
    if not stretches:
        raise UserError(f"a run of {program.config.steps} steps is too short to time; give --tokens for {TIMED_STEPS} steps or more")
    return state, statistics.median(stretches[DROPPED:] or stretches)


def gaps(found: list[dict[str, Any]], name: str, post: bool) -> list[float]:
    """Percent by which a variant is worse than the bf16 run of the same seed, by seed."""
    base = {record["seed"]: record for record in found if record["variant"] == "bf16"}
    if post:
        return [100 * (r["post_training"][name] / r["bpb"] - 1) for r in base.values() if name in r["post_training"]]
    return [100 * (r["bpb"] / base[r["seed"]]["bpb"] - 1) for r in found if r["variant"] == name and r["seed"] in base]


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, in words."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a line a variant; ± is the standard deviation over seeds."""
    one = found[0]
    lines = [
        f"{one['device']}, {one['parameters']:,} parameters, {one['steps']} steps, {one['tokens']:,} tokens a run, "
        f"{one['tokens_per_parameter']:.2f} tokens a parameter of blocks and head, {one['epochs']:.2f} epochs",
        "",
        "| block matrices | runs | bits per byte | gap to bf16, % | quantised after training, % | step, ms | step / bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    times = {name: statistics.median([r["step_ms"] for r in found if r["variant"] == name] or [0]) for name in VARIANTS}
    for name in VARIANTS:
        runs = [r["bpb"] for r in found if r["variant"] == name]
        if not runs:
            continue
        gap, post = (spread(gaps(found, name, p), 2) if name != "bf16" else "" for p in (False, True))
        ratio = f"{times[name] / times['bf16']:.3f}" if times["bf16"] else "-"
        lines.append(f"| {name} | {len(runs)} | {spread(runs, 4)} | {gap} | {post} | {times[name]:.2f} | {ratio} |")
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], target: Path) -> None:
    """Gaps by variant, every seed a point, their mean a bar; trained in the format beside quantised after training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no picture: {target.name} needs matplotlib; pip install 'nanojax[viz]'")
        return
    names = [name for name in VARIANTS if name != "bf16" and gaps(found, name, False)]
    if not names:
        return
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for post, colour, label in ((False, "tab:blue", "trained in the format"), (True, "tab:orange", "quantised after training in bf16")):
        for at, name in enumerate(names):
            values, x = gaps(found, name, post), at + (0.2 if post else -0.2)
            axes.bar(x, statistics.mean(values), 0.36, color=colour, alpha=0.5, label=label if at == 0 else None)
            axes.plot([x] * len(values), values, "k.", markersize=5)
    axes.set_xticks(range(len(names)), names, rotation=15)
    axes.set_yscale("symlog", linthresh=1)
    ticks = [-1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    all_gaps = [gap for name in names for post in (False, True) for gap in gaps(found, name, post)]
    axes.set_ylim(min(0, *all_gaps) - 0.05, 1.5 * max(1, *all_gaps))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylabel("bits per byte above bf16, %")
    axes.set_title(f"4-bit weights against bf16, same seed and data; a dot is a seed ({found[0]['tokens']:,} tokens a run)", fontsize=10)
    axes.legend()
    figure.savefig(target, dpi=130)
    print(f"picture: {target}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
