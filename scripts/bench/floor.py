"""A step's matrix products and attention alone, for as long as a run would take them.   python scripts/bench/floor.py configs/d12.py

What a step would take if all else were free, or moved so many bytes: a GPU at its power limit multiplies slower than in a short benchmark.
"""

from __future__ import annotations

import functools
import itertools
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
    """Of each row; the first half is dropped."""
    moved: tuple[float, ...] = ()
    """GB that a step reads and writes beside its products and attention, by copies between them: a row for each."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds is a finite time above 0, given {self.seconds}; try 8")
        if not all(0 < gigabytes < float("inf") for gigabytes in self.moved):
            raise UserError(f"--moved are finite numbers of GB above 0, given {' '.join(map(str, self.moved))}; leave it out for none")


def main(argv: Sequence[str]) -> None:
    """Print milliseconds a step of products alone, of attention alone, of both in turns, and with --moved also with copies between them;
    with clock and power at their ends.
    """
    config, rest = split_preset(argv)
    bench = parse(Bench, rest, prog="floor.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))

    import jax

    from nanojax.site import choose_site
    from nanojax.sizes import resolve

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"this asks what a GPU reaches at its power limit, and the device is a {device.platform}; run this where one is")
    config = resolve(bench.config, bench.config.model.vocab_size)
    site = choose_site(config, [device])
    products, attention = product_calls(config, site), attention_calls(config, site)
    print(f"{device.device_kind}, {site.accumulation} x {site.rows} rows, attention {site.attention}, block products in {site.precision}")
    rows = {"products": products, "attention": attention, "both in turns": products + attention}
    for gigabytes in bench.moved:
        copies, moved = copy_calls(config, site.rows, 1e9 * gigabytes / site.accumulation)
        rows[f"and {moved * site.accumulation / 1e9:.4g} GB moved"] = products + attention + copies
    for name, calls in rows.items():
        milliseconds, said = sustained(calls, bench.seconds)
        print(f"{name:<20}{milliseconds * site.accumulation:9.2f} ms a step; {said}", flush=True)


Calls = list[tuple[Callable[[], Any], int]]
"""What is called, and how many times a microbatch."""


def product_calls(config: Config, site: Any) -> Calls:
    """Forward, gradient of the input, gradient of the matrix, as the step has them; those of the blocks in its precision."""
    import jax
    import jax.numpy as jnp

    from nanojax.ops.fp8_dot import E4M3, E5M2
    from nanojax.run_kind import USUAL

    c, tokens = config.model, site.rows * config.model.seq_len
    heads, keys = c.n_head * c.head_dim, c.kv_heads * c.head_dim
    up = (2 if c.ffn == "swiglu" else 1) * c.hidden
    forward = [(c.width, heads), (c.width, keys), (c.width, keys), (heads, c.width), (c.width, up), (c.hidden, c.width)]
    backward = [(c.width, heads + 2 * keys), (heads, c.width), (c.width, up), (c.hidden, c.width)]

    options = USUAL.options(site.platform)
    one = jnp.float32(1)

    @functools.cache
    def normal(shape: tuple[int, int], dtype: Any) -> Any:
        return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.bfloat16).astype(dtype)

    def calls(n: int, i: int, o: int, passes: Sequence[int], kinds: tuple[Any, Any]) -> list[Callable]:
        sizes, (values, gradients) = dict(n=n, i=i, o=o), kinds
        types = (values, values), (gradients, values), (values, gradients)
        # Tensor cores of 8 bits read both operands along what is summed over, and get them as the step makes them.
        ways = ("ni,io->no", "no,io->ni", "ni,no->io") if values == jnp.bfloat16 else ("ni,oi->no", "no,io->ni", "in,on->io")
        made = []
        for p in passes:
            terms = ways[p].split("->")[0].split(",")
            x, w = (normal(tuple(sizes[letter] for letter in term), dtype) for term, dtype in zip(terms, types[p], strict=True))
            multiply = jax.jit(functools.partial(multiplied, ways[p]), compiler_options=options)
            made.append(functools.partial(multiply, x, w, one))
        return made

    blocks = config.train.loss_blocks
    plain = jnp.bfloat16, jnp.bfloat16
    kinds = (E4M3, E5M2) if site.precision == "fp8" else plain
    made = [(call, c.depth) for i, o in forward for call in calls(tokens, i, o, [0], kinds)]
    made += [(call, c.depth) for i, o in backward for call in calls(tokens, i, o, [1, 2], kinds)]
    kinds = kinds if config.train.fp8_head else plain
    return made + [(call, blocks) for call in calls(tokens // blocks, c.width, c.vocab_size, [0, 1, 2], kinds)]


def multiplied(subscripts: str, a: Any, b: Any, scale: Any) -> Any:
    """An einsum in bfloat16; of two in 8 bits, both times the scale, by a product of 8 bits."""
    import jax.numpy as jnp

    from nanojax.ops.fp8_dot import Scaled, product

    if a.dtype == jnp.bfloat16:
        return jnp.einsum(subscripts, a, b)
    return product(subscripts, Scaled(a, scale), Scaled(b, scale), jnp.bfloat16)


def copy_calls(config: Config, rows: int, moved: float) -> tuple[Calls, int]:
    """(copies of a microbatch's stream, one or more, that read and write so many bytes, to the nearest; bytes that they do).

    Of several in turns, past every cache.
    """
    import jax
    import jax.numpy as jnp

    streams = [jnp.full((rows * config.model.seq_len, config.model.width), i, jnp.bfloat16) for i in range(6)]
    copy, turns = jax.jit(lambda x: x + 1), itertools.cycle(streams)
    times = max(1, round(moved / (2 * streams[0].nbytes)))
    return [(lambda: copy(next(turns)), times)], times * 2 * streams[0].nbytes


def attention_calls(config: Config, site: Any) -> Calls:
    """Attention with its gradient, for each window."""
    import jax
    import jax.numpy as jnp

    from nanojax.site import attention_of

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


def sustained(calls: Calls, seconds: float) -> tuple[float, str]:
    """(milliseconds of a microbatch, clock and power), the first half of the time dropped. Calls are spread over the microbatch evenly."""
    import jax

    turns = sorted(((turn + 0.5) / times, i) for i, (_, times) in enumerate(calls) for turn in range(times))

    def microbatch() -> Any:
        last = None
        for _, i in turns:
            last = calls[i][0]()
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
