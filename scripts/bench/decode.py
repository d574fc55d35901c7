"""Speed of generation with random weights, beside what memory allows.   python scripts/bench/decode.py configs/d12.py"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config, ModelConfig
from nanojax.errors import run_main

if TYPE_CHECKING:
    from nanojax.infer.load import Model

COPIED = {"cpu": 2**26, "gpu": 2**32}  # bytes; far beyond any cache


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    batches: tuple[int, ...] = (1, 8, 64)
    """Rows at once."""
    prompt: int = 32
    """Tokens of each prompt."""
    tokens: int = 64
    """Tokens that each row adds."""
    rounds: int = 3
    """Times that each is run, after a first that is dropped; the median counts."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """Print time to the first token, tokens a second after it, and their share of what reading weights and cache allows."""
    config, rest = split_preset(argv)
    config = replace(config, train=replace(config.train, compute_dtype="bf16", precision="bf16"))
    bench = parse(Bench, rest, prog="decode.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))

    import jax
    import numpy as np

    from nanojax.infer.engine import Engine
    from nanojax.infer.params import SamplingParams
    from nanojax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

    model = random_model(bench.config)
    c = bench.config.model
    first_special = c.vocab_size - len(SPECIAL_TOKENS)  # the whole vocabulary is in use
    specials = {name: first_special + i for i, name in enumerate(SPECIAL_TOKENS)}
    engine = Engine(model, Tokenizer("bytes", SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, specials))
    params = SamplingParams(temperature=0, tokens=bench.tokens)
    copied = bandwidth(COPIED[model.program.platform])
    weights = sum(w.nbytes for name, w in model.weights.items() if name != "embedding")  # of which a token reads one row
    print(
        f"{jax.devices()[0].device_kind}, {model.program.parameters:,} parameters, {model.precision}; a token reads {weights / 1e6:.1f} MB "
        f"of weights; copies run at {copied / 1e9:.1f} GB/s; prompts of {bench.prompt} tokens, {bench.tokens} more"
    )
    print("| batch | first token, ms | tokens/s | a row's | ms a step | bound, tokens/s | share |\n|---|---|---|---|---|---|---|")
    for batch in bench.batches:
        prompts = np.random.default_rng(0).integers(0, 256, (batch, bench.prompt)).tolist()
        first, step = timed(lambda prompts=prompts: engine.steps(prompts, params, stops=()), bench.tokens, bench.rounds)
        kv = sum(batch * kv_bytes(c, bench.prompt + n) for n in range(1, bench.tokens)) / max(1, bench.tokens - 1)
        bound = batch * copied / (weights + kv)
        print(
            f"| {batch} | {1e3 * first:.1f} | {batch / step:,.0f} | {1 / step:,.0f} | {1e3 * step:.3f} | {bound:,.0f} "
            f"| {100 * batch / step / bound:.0f} % |"
        )


def random_model(config: Config) -> Model:
    """The config's model as products read it, its weights drawn."""
    import jax
    import jax.numpy as jnp

    from nanojax.infer.load import Model
    from nanojax.program import make_program
    from nanojax.sizes import resolve

    program = make_program(resolve(config, config.model.vocab_size), jax.devices()[:1])
    shapes = jax.eval_shape(program.phases[0].prepare, program.shapes.params)
    draw = jax.jit(lambda key, like: (0.02 * jax.random.normal(key, like.shape, jnp.float32)).astype(like.dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    weights = {name: draw(key, jax.ShapeDtypeStruct(s.shape, s.dtype)) for key, (name, s) in zip(keys, shapes.items(), strict=True)}
    return Model(program, jax.device_put(weights, program.shardings.params), 0, program.phases[0].precision)


def bandwidth(size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes: the median of ten."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    times = []
    for _ in range(10):
        began = time.perf_counter()
        copy(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size / statistics.median(times)


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
