"""What each choice of the model is worth: bits per byte against the base, by seed.   python scripts/bench/ablate.py --out DIR

One thing is changed at a time, on the same data, tokens and seeds: groups of int4, key and value heads, the base of RoPE, the activation,
norms on queries and keys, the attention backend, fp8. All are also evaluated on rows of twice the trained length. Without --text it takes
the source of the Python packages that are installed. A study that was stopped goes on where it was; with --share i/n, n processes on n
devices do it together.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from study import Study, carry_out, new_figure, spread, trained

from nanojax.cli import parse
from nanojax.config import Config
from nanojax.errors import UserError, run_main
from nanojax.sizes import resolve

BASE = "base"


def main(argv: Sequence[str]) -> None:
    """Run what is not done yet, then write table and picture."""
    began = time.monotonic()
    study = parse(Study, argv, prog="ablate.py", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    base = study.base
    names = []
    for name, config in variants(base).items():
        if reason := refusal(config):
            print(f"left out: {name}: {reason}")
        else:
            names.append(name)
    if found := carry_out(study, "ablate", names, runner(base), began):
        out = Path(study.out)
        (out / "table.md").write_text(table(found))
        print(table(found))
        draw(found, out / "ablate.png")


def variants(base: Config) -> dict[str, Config | UserError]:
    """Name -> the base with one thing changed, or why its sizes do not allow that."""
    heads = base.model.n_head
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {BASE: ({}, {})}
    changes |= {f"{heads} heads, {n} kv": (dict(n_kv_head=n), {}) for n in range(heads - 1, 0, -1) if heads % n == 0}
    changes |= {f"rope_base {name}": (dict(rope_base=value), {}) for name, value in (("10k", 1e4), ("1M", 1e6))}
    changes |= {"relu2": (dict(ffn="relu2"), {}), "no QK-norm": (dict(qk_norm=False), {})}
    changes |= {f"int4 g{n}": ({}, dict(precision="int4", int4_group=n)) for n in (64, 128, 256)}
    changes |= {name: ({}, dict(attn_impl=name)) for name in ("te", "cudnn")}
    changes |= {name: ({}, dict(precision=name)) for name in ("fp8", "fp8_head")}
    found: dict[str, Config | UserError] = {}
    for name, (model, train) in changes.items():
        try:
            found[name] = dataclasses.replace(
                base, model=dataclasses.replace(base.model, **model), train=dataclasses.replace(base.train, **train)
            )
        except UserError as error:
            found[name] = error
    return found


def refusal(config: Config | UserError) -> str | None:
    """Why a variant cannot be trained on this device, or None."""
    import jax

    from nanojax.program import make_program

    if isinstance(config, UserError):
        return str(config)
    try:
        for times in (1, 2):
            make_program(resolve(lengthened(config, times), config.model.vocab_size), jax.devices()[:1]).require_trainable()
    except UserError as error:
        return str(error)
    return None


def lengthened(config: Config, times: int) -> Config:
    """For as many rows, so many times as long."""
    model = dataclasses.replace(config.model, seq_len=times * config.model.seq_len)
    train = dataclasses.replace(config.train, batch_tokens=times * (config.train.batch_tokens or 0) or None)
    return dataclasses.replace(config, model=model, train=train)


def runner(base: Config) -> Callable[[str, int], dict[str, Any]]:
    """(variant, seed) -> the record of one run, programs compiled once a variant."""
    import jax

    from nanojax.data.shards import prepare
    from nanojax.evals.bpb import validator
    from nanojax.program import keep_compiled_programs, make_program

    keep_compiled_programs(base.data.cache)
    data = prepare(base.data, base.model.vocab_size, print)

    @functools.cache
    def program_of(name: str, times: int = 1) -> Any:
        """Of a variant, for rows of so many times the trained length."""
        config = variants(base)[name]
        assert isinstance(config, Config), "refused variants are left out"
        return make_program(resolve(lengthened(config, times), data.tokenizer.n_vocab), jax.devices()[:1])

    def run(name: str, seed: int) -> dict[str, Any]:
        program, longer = program_of(name), program_of(name, 2)
        with jax.set_mesh(program.mesh):
            state, facts = trained(program, data, seed)
            weights = program.phases[0].prepare(state.params)
            one, two = (validator(each, data)(weights).bpb for each in (program, longer))
        return {"variant": name, "seed": seed, "bpb": one, "bpb_at_twice": two, "attention": program.attention} | facts

    return run


def gaps(found: list[dict[str, Any]], name: str) -> list[float]:
    """Percent by which a variant is worse than the base of the same seed, by seed."""
    base = {record["seed"]: record["bpb"] for record in found if record["variant"] == BASE}
    return [100 * (r["bpb"] / base[r["seed"]] - 1) for r in found if r["variant"] == name and r["seed"] in base]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a line a variant; ± is the standard deviation over seeds."""
    one = found[0]
    lines = [
        f"{one['device']}, {one['steps']} steps, {one['tokens']:,} tokens a run, {one['epochs']:.2f} epochs",
        "",
        "| variant | parameters | runs | bits per byte | gap to the base, % | at twice the length | attention | step, ms | step / base |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(record["variant"] for record in found))
    times = {name: statistics.median(r["step_ms"] for r in found if r["variant"] == name) for name in names}
    for name in names:
        own = [r for r in found if r["variant"] == name]
        gap = spread(gaps(found, name), 2) if name != BASE else ""
        ratio = f"{times[name] / times[BASE]:.3f}" if BASE in times else "-"
        lines.append(
            f"| {name} | {own[0]['parameters'] / 1e6:.2f} M | {len(own)} | {spread([r['bpb'] for r in own], 4)} | {gap} "
            f"| {spread([r['bpb_at_twice'] for r in own], 4)} | {own[0]['attention']} | {times[name]:.2f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], target: Path) -> None:
    """Gaps to the base, every seed a point, their mean a bar; the base's own spread over seeds a band."""
    names = [name for name in dict.fromkeys(r["variant"] for r in found) if name != BASE and gaps(found, name)]
    if not names or not (figure := new_figure(target, 9, 1.2 + 0.4 * len(names))):
        return
    axes = figure.add_subplot()
    for at, name in enumerate(names):
        values = gaps(found, name)
        axes.barh(at, statistics.mean(values), 0.6, color="tab:blue", alpha=0.5)
        axes.plot(values, [at] * len(values), "k.", markersize=5)
    own = [r["bpb"] for r in found if r["variant"] == BASE]
    if len(own) > 1:
        deviation = 100 * statistics.stdev(own) / statistics.mean(own)
        axes.axvspan(-deviation, deviation, color="grey", alpha=0.2, label="the base's standard deviation over seeds")
        axes.legend()
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("bits per byte above the base, %")
    axes.set_title(f"One change at a time, same seed and data; a dot is a seed ({found[0]['tokens']:,} tokens a run)", fontsize=10)
    figure.savefig(target, dpi=130)
    print(f"picture: {target}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
