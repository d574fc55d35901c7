"""Speed of generation with random weights, beside what memory allows.   python scripts/bench/decode.py configs/d12.py"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config, ModelConfig
from nanojax.errors import UserError, run_main

if TYPE_CHECKING:
    import jax

    from nanojax.infer.load import Model

MOST = 4096  # rows, and rounds; more is a slip of the hand
COPIED = {"cpu": 2**26, "gpu": 2**28}  # bytes; beyond any cache, and little beside a model, whose peak memory is looked at


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    formats: tuple[Literal["bf16", "int4", "nvfp4", "mxfp4"], ...] = ("bf16",)
    """Of the matrices of the blocks. The head is in bf16."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Rows at once."""
    prompt: int = 128
    """Tokens of each prompt."""
    tokens: int = 512
    """Tokens that each row adds."""
    rounds: int = 3
    """Times that each is run, after a first that is dropped; the median counts."""
    plain: bool = False
    """Without the kernels of infer/fused.py."""
    hlo: bool = False
    """Say what the kernels in the compiled loop read."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """Print time to the first token, tokens a second after it, and their share of what reading weights and cache allows."""
    config, rest = split_preset(argv)
    config = replace(config, train=replace(config.train, compute_dtype="bf16", precision="bf16"))
    bench = parse(Bench, rest, prog="decode.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))
    check(bench)

    import jax

    from nanojax.program import out_of_memory_told

    device = jax.devices()[0]
    require_served(bench, device)
    copied = bandwidth(COPIED[device.platform])
    print(f"{device.device_kind}; copies run at {copied / 1e9:.1f} GB/s; prompts of {bench.prompt} tokens, {bench.tokens} more")
    print("| weights | batch | first token, ms | tokens/s | a row's | ms a step | bound, tokens/s | share | peak memory, MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with out_of_memory_told("try fewer rows in --batches, or a shorter --prompt"):
        notes = [note for format in bench.formats for note in measure(bench, format, copied)]
    print("\n".join(notes))


def check(bench: Bench) -> None:
    """Raise UserError on what cannot be timed on any device."""
    from nanojax.tokenizer import N_BYTES, SPECIAL_TOKENS

    c, train, least = bench.config.model, bench.config.train, N_BYTES + len(SPECIAL_TOKENS)
    if not bench.formats or not bench.batches or not all(1 <= n <= MOST for n in (*bench.batches, bench.rounds)):
        raise UserError(
            f"a bench takes a format, and batches and rounds from 1 to {MOST}, given {list(bench.formats)}, {list(bench.batches)!s:.40} "
            f"and {bench.rounds}; leave them out for the defaults"
        )
    if bench.prompt < 1 or bench.tokens < 2 or bench.prompt + bench.tokens > c.seq_len:
        raise UserError(
            f"a bench takes prompts of 1 token or more and adds 2 or more, together within seq_len={c.seq_len}, "
            f"given {bench.prompt} and {bench.tokens}; try --prompt {c.seq_len // 4} --tokens {c.seq_len // 2}"
        )
    if c.vocab_size < least:
        raise UserError(f"vocab_size={c.vocab_size} must be at least {least}, bytes and special tokens; leave it out for the preset's")
    if (train.compute_dtype, train.precision) != ("bf16", "bf16"):
        raise UserError(
            f"activations are bf16 here and matrices as --formats says, given compute_dtype={train.compute_dtype} and "
            f"precision={train.precision}; drop --compute-dtype and --precision"
        )


def require_served(bench: Bench, device: jax.Device) -> None:
    """Raise UserError on a config that does not fit the device, and on formats that it or the sizes of the model do not allow."""
    from nanojax.infer.fused import refusal
    from nanojax.site import choose_site
    from nanojax.sizes import resolve

    config = bench.config
    request = choose_site(resolve(config, config.model.vocab_size), [device]).request
    reason = "it was switched off" if bench.plain else refusal(request)
    for format in bench.formats:
        if format != "bf16" and reason:
            raise UserError(f"packed weights are for the kernels of infer/fused.py, and {reason}; choose --formats bf16 alone")
        replace(config, train=replace(config.train, precision=format))  # refuses blocks that do not divide


def measure(bench: Bench, format: str, copied: float) -> list[str]:
    """Print a format's rows; returns what is to be said below the table."""
    import jax
    import numpy as np

    from nanojax.infer.decode import plain_path
    from nanojax.infer.engine import Engine
    from nanojax.infer.params import SamplingParams
    from nanojax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

    c = bench.config.model
    first_special = c.vocab_size - len(SPECIAL_TOKENS)  # the whole vocabulary is in use
    specials = {name: first_special + i for i, name in enumerate(SPECIAL_TOKENS)}
    model = random_model(bench.config, format)
    sizes = {name: w.nbytes for name, w in model.weights.items()}
    path = plain_path(model.program.graph, model.weights, "XLA's products") if bench.plain else None
    engine = Engine(model, Tokenizer("bytes", SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, specials), path=path)
    del model, path  # so that only the engine holds weights
    params = SamplingParams(temperature=0, tokens=bench.tokens)
    weights = sum(sizes.values()) - sizes["embedding"]  # of which one row is read
    for batch in bench.batches:
        prompts = np.random.default_rng(0).integers(0, 256, (batch, bench.prompt)).tolist()
        first, step = timed(lambda prompts=prompts: engine.steps(prompts, params, stops=()), bench.tokens, bench.rounds)
        kv = sum(batch * kv_bytes(c, bench.prompt + n) for n in range(1, bench.tokens)) / max(1, bench.tokens - 1)
        bound = batch * copied / (weights + kv)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        print(
            f"| {format} | {batch} | {1e3 * first:.1f} | {batch / step:,.0f} | {1 / step:,.0f} | {1e3 * step:.3f} | {bound:,.0f} "
            f"| {100 * batch / step / bound:.0f} % | {peak / 1e6:,.0f} |",
            flush=True,
        )
    note = f"{engine.path.words}: {weights / 1e6:.1f} MB are read a token, {sum(sizes.values()) / 1e6:.1f} MB with the embedding"
    return [note] + ([f"the loop's kernels read {what_kernels_read(engine, bench.prompt)}"] if bench.hlo else [])


def what_kernels_read(engine: Any, tokens: int) -> str:
    """Types of the matrices that kernels take in the compiled loop for one row, and how often."""
    import collections
    import re

    import jax

    from nanojax.infer.params import SamplingParams

    state = engine._prefill([[1] * tokens], [2], 0)
    asked = engine._asked([SamplingParams(temperature=0)], [2], 0, set())
    with jax.set_mesh(engine.mesh):
        text = engine._add.lower(engine.path.weights, state, asked, count=engine.stride, drawn="likeliest").compile().as_text()
    calls = re.findall(r"custom-call\(([^)]*)\), custom_call_target=\"__gpu\$xla\.gpu\.triton", text)
    types = dict(re.findall(r"(%[\w.-]+) = (\w+\[[\d,]*\])", text))
    taken = collections.Counter(types.get(name, "?") for call in calls for name in dict.fromkeys(re.findall(r"%[\w.-]+", call)))
    return ", ".join(f"{n} x {kind}" for kind, n in taken.most_common() if re.search(r",\d{2,}\]", kind))


def random_model(config: Config, format: str) -> Model:
    """The config's model as products read it, its weights drawn: matrices of the blocks in `format`."""
    import jax
    import jax.numpy as jnp
    from matvec import random_matrix

    from nanojax.infer.load import Model
    from nanojax.program import make_program
    from nanojax.sizes import resolve

    program = make_program(resolve(config, config.model.vocab_size), jax.devices()[:1])
    shapes = jax.eval_shape(program.phases[0].prepare, program.shapes.params)

    def drawn(key: Any, like: Any) -> Any:
        """Row by row, since the memory that drawing takes would be the peak."""
        return jax.lax.map(lambda k: (0.02 * jax.random.normal(k, like.shape[1:])).astype(like.dtype), jax.random.split(key, like.shape[0]))

    draw = jax.jit(drawn, static_argnums=1)
    coded = jax.jit(random_matrix, static_argnums=(0, 1, 2))
    weights: dict[str, Any] = {}
    for i, (name, s) in enumerate(shapes.items()):
        in_bits = format != "bf16" and name.startswith("blocks.") and name.endswith(".w")
        like = jax.ShapeDtypeStruct(s.shape, jnp.bfloat16 if name == "embedding" else s.dtype)  # as an export holds it
        weights[name] = coded(s.shape[1], s.shape[0], format, i) if in_bits else draw(jax.random.key(i), like)
    return Model(program, weights, 0, f"{format}, random")


def bandwidth(size: int) -> float:
    """Bytes a second, read and written, of copies of `size` bytes: the median of ten, of XLA's copy or its loop, whichever is faster."""
    import jax
    import jax.numpy as jnp

    x, best, turns = jnp.zeros(size // 4, jnp.float32), 0.0, 16
    for copy in (jax.jit(jnp.copy), jax.jit(lambda x: x + 1)):
        y = copy(x).block_until_ready()
        times = []
        for _ in range(10):
            began = time.perf_counter()
            for _ in range(turns):  # many on their way: the host's share is not the memory's
                y = copy(x)
            y.block_until_ready()
            times.append((time.perf_counter() - began) / turns)
        best = max(best, 2 * size / statistics.median(times))
    return best


def kv_bytes(c: ModelConfig, tokens: int) -> int:
    """What a row of so many tokens has in its caches, in bf16: what its next token has to read."""
    return sum(min(window or tokens, tokens) for window in c.windows) * 2 * c.kv_heads * c.head_dim * 2


def timed(steps: Callable[[], Any], tokens: int, rounds: int) -> tuple[float, float]:
    """(seconds to the first token, seconds for each token after it)."""
    firsts, rests = [], []
    for turn in range(rounds + 1):
        began, pieces = time.perf_counter(), steps()
        next(pieces)
        first = time.perf_counter()
        for _ in pieces:
            pass
        if turn:
            firsts.append(first - began)
            rests.append((time.perf_counter() - first) / (tokens - 1))
    return statistics.median(firsts), statistics.median(rests)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
