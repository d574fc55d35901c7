"""A step's matrix products and attention alone, for as long as a run would take them.   python scripts/bench/floor.py configs/d12.py

What a step would take if all else were free: a GPU at its power limit multiplies slower than in a short benchmark.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config
from nanojax.errors import UserError, run_main


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    seconds: float = 8.0
    """Of each of the three; the first half is dropped."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds is a finite time above 0, given {self.seconds}; try 8")


def main(argv: Sequence[str]) -> None:
    """Print milliseconds a step of products alone, of attention alone, and of both in turns, with clock and power at their ends."""
    config, rest = split_preset(argv)
    bench = parse(Bench, rest, prog="floor.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))

    import jax

    from nanojax.program import choose_site
    from nanojax.sizes import resolve

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"this asks what a GPU reaches at its power limit, and the device is a {device.platform}; run this where one is")
    config = resolve(bench.config, bench.config.model.vocab_size)
    site = choose_site(config, [device])
    products, attention = product_calls(config, site.rows), attention_calls(config, site)
    print(f"{device.device_kind}, {site.accumulation} x {site.rows} rows, attention {site.attention}")
    for name, calls in {"products": products, "attention": attention, "both in turns": products + attention}.items():
        milliseconds, said = sustained(calls, bench.seconds)
        print(f"{name:<14}{milliseconds * site.accumulation:9.2f} ms a step; {said}", flush=True)


def product_calls(config: Config, rows: int) -> list[tuple[Callable, int]]:
    """(what calls a product, times a microbatch): forward, gradient of the input, gradient of the matrix, as the step has them."""
    import jax
    import jax.numpy as jnp

    c, tokens = config.model, rows * config.model.seq_len
    heads, keys = c.n_head * c.head_dim, c.kv_heads * c.head_dim
    up = (2 if c.ffn == "swiglu" else 1) * c.hidden
    forward = [(c.width, heads), (c.width, keys), (c.width, keys), (heads, c.width), (c.width, up), (c.hidden, c.width)]
    backward = [(c.width, heads + 2 * keys), (heads, c.width), (c.width, up), (c.hidden, c.width)]
    drawn: dict[tuple[int, ...], Any] = {}

    def normal(*shape: int) -> Any:
        if shape not in drawn:
            drawn[shape] = jax.random.normal(jax.random.key(len(drawn)), shape, jnp.bfloat16)
        return drawn[shape]

    ways = [jax.jit(lambda x, w, how=how: jnp.einsum(how, x, w)) for how in ("ni,io->no", "no,io->ni", "ni,no->io")]

    def calls(n: int, i: int, o: int, passes: Sequence[int]) -> list[Callable]:
        arguments = (normal(n, i), normal(i, o)), (normal(n, o), normal(i, o)), (normal(n, i), normal(n, o))
        return [lambda p=p: ways[p](*arguments[p]) for p in passes]

    made = [(call, c.depth) for i, o in forward for call in calls(tokens, i, o, [0])]
    made += [(call, c.depth) for i, o in backward for call in calls(tokens, i, o, [1, 2])]
    blocks = config.train.loss_blocks
    return made + [(call, blocks) for call in calls(tokens // blocks, c.width, c.vocab_size, [0, 1, 2])]


def attention_calls(config: Config, site: Any) -> list[tuple[Callable, int]]:
    """(what calls attention with its gradient, times a microbatch), for each window."""
    import jax
    import jax.numpy as jnp

    from nanojax.program import attention_of

    c = config.model
    attend = attention_of(site)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (site.rows, c.seq_len, n, c.head_dim), jnp.bfloat16)
        for i, n in enumerate((c.n_head, c.kv_heads, c.kv_heads))
    )

    def call(window: int | None) -> Callable:
        @jax.jit
        def both(q, k, v):
            y, vjp = jax.vjp(functools.partial(attend, window=window), q, k, v)
            return vjp(y)

        return lambda: both(q, k, v)

    return [(call(window), count) for window, count in Counter(c.windows).items()]


def sustained(calls: list[tuple[Callable, int]], seconds: float) -> tuple[float, str]:
    """(milliseconds of a microbatch, clock and power), the first half of the time dropped."""
    import jax

    def microbatch() -> Any:
        last = None
        for call, times in calls:
            for _ in range(times):
                last = call()
        return last

    before, began, stamps = jax.block_until_ready(microbatch()), time.perf_counter(), []
    while time.perf_counter() - began < seconds or len(stamps) < 4:
        now = microbatch()  # one is always on its way
        jax.block_until_ready(before)
        stamps.append(time.perf_counter())
        before = now
    jax.block_until_ready(before)
    half = stamps[len(stamps) // 2 :]
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        said = "nvidia-smi says nothing"
    return 1e3 * (half[-1] - half[0]) / (len(half) - 1), said


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
