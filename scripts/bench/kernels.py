"""Kernels of training beside what XLA makes of their references.   python scripts/bench/kernels.py configs/d12.py"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config
from nanojax.errors import UserError, run_main

TURNS = 20


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    config: Annotated[Config, FLAT] = field(default_factory=Config)


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel, what it replaces, and what both are given."""

    name: str
    kernel: Callable
    reference: Callable
    arguments: tuple[Any, ...]
    bytes: int
    """That it must read and write, forward and backward."""
    passes: Literal["both", "forward", "in place"] = "both"
    """forward: it has no backward pass. in place: nor that, and its last result takes the place of its argument."""


def main(argv: Sequence[str]) -> None:
    """Print milliseconds of each, forward alone and with the backward pass, by the profiler, at the microbatch of a preset."""
    config, rest = split_preset(argv)
    bench = parse(Bench, rest, prog="kernels.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))

    import jax

    from nanojax.sizes import micro_batch, resolve

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"these kernels run on NVIDIA GPUs, and the device is a {device.platform}; run this where one is")
    base = resolve(bench.config, bench.config.model.vocab_size)
    print(f"{device.device_kind}\n| kernel | pass | reference, ms | kernel, ms | ratio | GB/s |\n|---|---|---|---|---|---|")
    for case in cases(base, micro_batch(base, 1)):
        ways = {
            "both": {"forward": jax.jit, "forward and backward": both},
            "forward": {"forward": jax.jit},
            "in place": {"in place": in_place},
        }
        for name, wrap in ways[case.passes].items():
            before, after = (milliseconds(wrap(f), case.arguments) for f in (case.reference, case.kernel))
            rate = "" if name == "forward" and case.passes == "both" else f"{case.bytes / after / 1e6:,.0f}"
            print(f"| {case.name} | {name} | {before:.3f} | {after:.3f} | {before / after:.2f} | {rate} |", flush=True)


def milliseconds(f: Callable, arguments: tuple[Any, ...]) -> float:
    """That the device is busy with one call."""
    from matvec import traced

    from nanojax.analysis.trace import own_times

    return sum(own_times(traced(lambda: [f(*arguments) for _ in range(TURNS)]))) / TURNS / 1e6


def in_place(f: Callable) -> Callable:
    """Every call takes what the one before it made last, and may write over it."""
    import jax
    import jax.numpy as jnp

    step, state = jax.jit(f, donate_argnums=0), []

    def run(x: Any) -> Any:
        made = step(state.pop() if state else jnp.copy(x))
        state.append(made[-1])
        return made[0]

    return run


def both(f: Callable) -> Callable:
    """Value and gradients, with the value as its own cotangent."""
    import jax

    def run(*arguments: Any) -> Any:
        y, vjp = jax.vjp(f, *arguments)
        return y, vjp(y)

    return jax.jit(run)


def product_cases(c: Any, stream: Any, targets: Any) -> Iterator[Case]:
    """What is done where a product ends, beside a kernel of its own after cuBLAS's product, all other products included in both."""
    import jax
    import jax.numpy as jnp

    from nanojax.ops.kernels import feed_forward, head
    from nanojax.ops.kernels.cross_entropy import cross_entropy
    from nanojax.ops.kernels.swiglu import swiglu
    from nanojax.ops.xent import total_nats

    def normal(key: int, *shape: int) -> Any:
        return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16) / 32

    hopper = jax.devices()[0].compute_capability == "9.0"
    column = stream.nbytes // c.width  # bytes of one
    if hopper and feed_forward.serves(stream.size // c.width, c.width, c.hidden):
        ws = normal(5, c.width, c.hidden), normal(6, c.width, c.hidden), normal(7, c.hidden, c.width)
        # By the two kernels: gates and ups are written, read and written over by their gradients, what SwiGLU makes is written.
        moved = column * (7 * c.hidden + 2 * c.width)

        def apart(x: Any, gate: Any, up: Any, down: Any) -> Any:
            return swiglu(x @ jnp.concatenate([gate, up], axis=1)) @ down

        yield Case(f"feed_forward {list(stream.shape)} {c.hidden}", feed_forward.feed_forward, apart, (stream, *ws), moved)
    else:
        print("feed_forward is left out: it takes compute capability 9.0, tokens and hidden size in 128s, and the width in 64s")
    x, targets, w = stream.reshape(-1, c.width)[: targets.size][None], targets[None], normal(8, c.width, c.vocab_size)
    if hopper and head.serves(targets.size, c.width, c.vocab_size, c.softcap):

        def nats(logits: Any, targets: Any, softcap: float) -> Any:
            return jax.tree.map(lambda y: y[None], cross_entropy(logits[0], targets[0], softcap))

        def loss(x: Any, w: Any, **how: Any) -> Any:
            return total_nats(x, w, targets, c.softcap, 1, **how)

        ended, after = functools.partial(loss, head=head.loss_head(c.softcap)), functools.partial(loss, of_logits=nats)
        yield Case(f"head {list(x.shape[1:])} {c.vocab_size}", ended, after, (x, w), 2 * targets.size * c.vocab_size)
    else:
        print(
            "head is left out: it takes compute capability 9.0, --softcap, tokens of a block and vocabulary in 128s, and the width in 64s"
        )


def rounding(way: Callable, work: Any, dtype: Any, *xs: Any) -> Any:
    """`both_ways` or its reference, of tensors that come last."""
    return way(work, xs, dtype)


def rounding_cases(x: Any, both: Any) -> Iterator[Case]:
    """To 8 bits, of gates and ups side by side and what SwiGLU makes of them, of a norm, and of gradients of queries, keys and values."""
    import jax.numpy as jnp

    from nanojax.ops.fp8_dot import E4M3, E5M2, SWIGLU, SWIGLU_BACKWARD
    from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
    from nanojax.ops.kernels.turn_back import TURN_BACK
    from nanojax.ops.kernels.work import GIVEN, NORMED
    from nanojax.ops.rope import rope_table

    half = both[..., : both.shape[-1] // 2]
    b, t, n, h = x.shape
    heads = (x, x, x, x, x, jnp.ones(h), jnp.ones(h), *rope_table(jnp.arange(t), h, 1e4))
    stream = x.reshape(b, t, n * h)
    for name, work, xs, dtype in (
        ("", GIVEN, (both,), E4M3),
        ("", GIVEN, (both,), E5M2),
        (" of swiglu", SWIGLU, (both,), E4M3),
        (" of its gradient", SWIGLU_BACKWARD, (both, half), E5M2),
        (" of a norm", NORMED, (stream, jnp.ones((b, t)), jnp.ones(n * h)), E4M3),
        (" of gradients turned back", TURN_BACK, heads, E5M2),
    ):
        made = {SWIGLU: half.size, NORMED: x.size, TURN_BACK: 3 * x.size}.get(work, both.size)  # numbers, each written twice
        yield Case(
            f"both_ways{name} {list(xs[0].shape)} {dtype.__name__}",
            functools.partial(rounding, both_ways, work, dtype),
            functools.partial(rounding, both_ways_reference, work, dtype),
            xs,
            sum(x.nbytes for x in xs) + 2 * made,
            passes="forward",
        )


def cases(config: Config, rows: int) -> Iterator[Case]:
    """At the sizes of a microbatch of one device."""
    import jax
    import jax.numpy as jnp

    from nanojax.ops.kernels.cross_entropy import cross_entropy
    from nanojax.ops.kernels.norm import add_and_norm, add_and_norm_later, add_and_norm_reference
    from nanojax.ops.kernels.norm_rope import norm_rope, norm_rope_reference
    from nanojax.ops.kernels.swiglu import swiglu, swiglu_reference
    from nanojax.ops.rope import rope_table
    from nanojax.ops.xent import nats_and_gradient

    c = config.model
    rope = rope_table(jnp.arange(c.seq_len), c.head_dim, c.rope_base)
    x = jax.random.normal(jax.random.key(0), (rows, c.seq_len, c.n_head, c.head_dim), jnp.bfloat16)
    gain, stream = jnp.ones(c.width), jax.random.normal(jax.random.key(1), (rows, c.seq_len, c.width), jnp.bfloat16)
    yield Case(f"norm {list(stream.shape)}", add_and_norm, add_and_norm_reference, (stream, stream, gain), 8 * stream.nbytes)
    moved = 3 * stream.nbytes  # what it makes beside the sum is small, and its way back is that of the norm above
    yield Case(f"norm_later {list(stream.shape)}", add_and_norm_later, add_and_norm_reference, (stream, stream, gain), moved, "forward")
    both = jax.random.normal(jax.random.key(4), (rows, c.seq_len, 2 * c.hidden), jnp.bfloat16)
    yield Case(f"swiglu {list(both.shape)}", swiglu, swiglu_reference, (both,), 4 * both.nbytes)
    tokens = rows * c.seq_len // config.train.loss_blocks
    logits = jax.random.normal(jax.random.key(2), (tokens, c.vocab_size), jnp.bfloat16)
    targets = jax.random.randint(jax.random.key(3), (tokens,), 0, c.vocab_size)
    yield Case(
        f"cross_entropy {list(logits.shape)}",
        lambda logits: cross_entropy(logits, targets, c.softcap),
        lambda logits: jax.tree.map(lambda y: y[0], nats_and_gradient(logits[None], targets[None], c.softcap)),
        (logits,),
        2 * logits.nbytes,
        passes="in place",
    )
    yield from product_cases(c, stream, targets)
    yield from rounding_cases(x, both)
    yield Case(
        f"norm_rope {list(x.shape)}",
        lambda x, gain: norm_rope(x, gain, rope),
        lambda x, gain: norm_rope_reference(x, gain, rope),
        (x, jnp.ones(c.head_dim)),
        5 * x.nbytes,
    )


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
