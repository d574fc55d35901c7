"""Does 4-bit training work? Bits per byte of every format against bf16, by seed.   python scripts/bench/fp4_study.py --out DIR

Same data, same steps, same seeds; post-training quantisation of the bf16 runs beside them; and a control of 3 bits, whose gap must
stand out, or the study is too small to see any. Without --text it takes the source of the Python packages that are installed, split
by package. A study that was stopped goes on where it was; with --share i/n, n processes on n devices do it together.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from study import Study, carry_out, new_figure, spread, trained

from nanojax.cli import parse
from nanojax.config import Config
from nanojax.errors import run_main
from nanojax.sizes import resolve

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


def main(argv: Sequence[str]) -> None:
    """Run what is not done yet, then write table and picture."""
    began = time.monotonic()
    study = parse(Study, argv, prog="fp4_study.py", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    if found := carry_out(study, "fp4_study", list(VARIANTS), runner(study.base), began):
        out = Path(study.out)
        (out / "table.md").write_text(table(found))
        print(table(found))
        draw(found, out / "fp4_study.png")


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

    from nanojax.data.shards import prepare
    from nanojax.evals.bpb import validator
    from nanojax.program import keep_compiled_programs, make_program
    from nanojax.site import DTYPES, formats

    keep_compiled_programs(base.data.cache)
    data = prepare(base.data, base.model.vocab_size, print)
    compute, _ = formats(base, jax.default_backend())

    @functools.cache
    def variant(name: str) -> Any:
        config = resolve(replace(base, train=replace(base.train, **VARIANTS[name])), data.tokenizer.n_vocab)
        control = functools.partial(three_bits, dtype=DTYPES[compute]) if name == CONTROL else None
        return make_program(config, jax.devices()[:1], prepare=control)

    for name in VARIANTS:  # what does not fit is told before anything is trained
        variant(name)

    def run(name: str, seed: int) -> dict[str, Any]:
        program, post = variant(name), {}
        with jax.set_mesh(program.mesh):
            state, facts = trained(program, data, seed)
            validate = validator(program, data)
            final = validate(program.phases[0].prepare(state.params))
            if name == "bf16":
                others = [other for other in VARIANTS if other != name]
                post = {other: validate(variant(other).phases[0].prepare(state.params)).bpb for other in others}
        return {"variant": name, "seed": seed, "bpb": final.bpb, "post_training": post} | facts

    return run


def gaps(found: list[dict[str, Any]], name: str, post: bool) -> list[float]:
    """Percent by which a variant is worse than the bf16 run of the same seed, by seed."""
    base = {record["seed"]: record for record in found if record["variant"] == "bf16"}
    if post:
        return [100 * (r["post_training"][name] / r["bpb"] - 1) for r in base.values() if name in r["post_training"]]
    return [100 * (r["bpb"] / base[r["seed"]]["bpb"] - 1) for r in found if r["variant"] == name and r["seed"] in base]


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
    names = [name for name in VARIANTS if name != "bf16" and gaps(found, name, False)]
    if not names or not (figure := new_figure(target, 9, 4.5)):
        return
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
