"""Runs of many variants on the same data, by seed: what fp4_study.py and ablate.py have in common.

A study that was stopped goes on where it was; with --share i/n, n processes on n devices do it together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanojax.checks import require_positive
from nanojax.config import Config, DataConfig, ModelConfig, TrainConfig
from nanojax.data.corpus import COLUMN, MANIFEST
from nanojax.errors import UserError
from nanojax.sizes import count_parameters

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

    def __post_init__(self) -> None:
        if not (found := re.fullmatch(r"(\d+)/(\d+)", self.share)) or not int(found[1]) < int(found[2]):
            raise UserError(f"share={self.share} must be i/n with i below n; for one process leave it out")
        for name in ("batch_tokens", "eval_tokens", "seeds"):
            require_positive(name, getattr(self, name))
        if self.tokens < self.batch_tokens * TIMED_STEPS:
            least = self.batch_tokens * TIMED_STEPS
            raise UserError(f"tokens={self.tokens} must be {TIMED_STEPS} steps or more, which are timed together; give --tokens {least}")

    @property
    def base(self) -> Config:
        """What every variant changes something of."""
        text = self.text or str(gather(Path(self.cache).expanduser() / "packages"))
        steps = round(self.tokens / self.batch_tokens)
        return Config(
            model=ModelConfig(depth=self.depth, d_model=self.d_model, seq_len=self.seq_len, vocab_size=self.vocab_size),
            train=TrainConfig(steps=steps, batch_tokens=self.batch_tokens, eval_tokens=self.eval_tokens),
            data=DataConfig(path=text, tokenizer=self.tokenizer, cache=self.cache, packing="concat"),
        )


def carry_out(
    study: Study, kind: str, names: Sequence[str], run: Callable[[str, int], dict[str, Any]], began: float
) -> list[dict[str, Any]]:
    """Records of every run that is done, after those that were not and that the time allows. `kind` is the script."""
    out = Path(study.out)
    out.mkdir(parents=True, exist_ok=True)
    keep = require_same(study, kind, out)
    share, of = map(int, study.share.split("/"))
    todo = [(name, seed) for seed in range(study.seeds) for name in names][share::of]
    done = {(record["variant"], record["seed"]) for record in records(out)}
    own, longest = out / f"results-{share}.jsonl", 0.0
    torn = own.is_file() and not own.read_text().endswith("\n")  # it was killed while it wrote
    for name, seed in todo:
        left = study.minutes * 60 - (time.monotonic() - began)
        if (name, seed) in done or left < 1.3 * longest or study.minutes == 0:
            continue
        at = time.monotonic()
        record = run(name, seed)
        longest = max(longest, time.monotonic() - at)
        keep()
        with own.open("a") as lines:
            lines.write("\n" * torn + json.dumps(record) + "\n")
        torn = False
        print(f"{name}, seed {seed}: {record['bpb']:.4f} bits per byte, {record['step_ms']:.1f} ms a step", flush=True)
    return list(records(out))


def require_same(study: Study, kind: str, out: Path) -> Callable[[], None]:
    """Raise UserError where a folder holds runs of another study. The function made, for the first run, writes down which one this is."""
    own: dict[str, Any] = {"script": kind} | dataclasses.asdict(study)
    own = {name: value for name, value in own.items() if name not in ("out", "cache", "seeds", "share", "minutes")}
    file = out / "study.json"
    kept = json.loads(file.read_text()) if file.is_file() else {} if any(out.glob("results-*.jsonl")) else own
    if changed := [f"{name} {kept.get(name)} -> {value}" for name, value in own.items() if kept.get(name) != value]:
        raise UserError(f"{out} holds the runs of another study, changed are {', '.join(changed)}; give another --out")

    def keep() -> None:
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(own))
        new.replace(file)

    return keep


def trained(program: Any, data: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    """(last state, what there is to say of it) of a program's run over prepared data."""
    import jax

    from nanojax.data.loader import Loader
    from nanojax.data.packing import load_or_make
    from nanojax.mesh import batch_sharding

    seq_len = program.config.model.seq_len
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
    state, seconds = train(program, loader, program.init(jax.random.key(seed)))
    loader.close()
    facts = {"step_ms": 1e3 * seconds, "skipped": int(state.skipped), "device": jax.devices()[0].device_kind}
    return state, facts | sizes_of(program.config, plan.rows * seq_len)


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
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                print(f"left out: a line of {file} that was cut off")


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
    return state, statistics.median(stretches[DROPPED:] or stretches)


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, in words."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def new_figure(target: Path, width: float, height: float) -> Any:
    """An empty figure, or None where there is no matplotlib, which is said."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no picture: {target.name} needs matplotlib; pip install 'nanojax[viz]'")
        return None
    return Figure(figsize=(width, height), layout="constrained")
