"""Speed of the products of decoding at a preset's sizes, by cut.   python scripts/bench/matvec.py configs/d32.py"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config, ModelConfig
from nanojax.errors import UserError, run_main

if TYPE_CHECKING:
    from nanojax.analysis.trace import Kernel
    from nanojax.ops.kernels.matvec import Cut

READ = 2**27  # bytes of different matrices in turn: beyond any cache


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    formats: tuple[str, ...] = ("bf16", "nvfp4")
    """bf16, int4, nvfp4 or mxfp4."""
    outputs: tuple[int, ...] = (4, 8, 16)
    """Outputs of an instance of the kernel."""
    lanes: tuple[int, ...] = (64, 128, 512)
    """Inputs, or spans of a packed matrix, that it reads at a time."""
    warps: tuple[int, ...] = (4,)
    rows: int = 1
    """Of the batch."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """Print, for each product and format, what the cut that is in use takes, and the fastest others, by the profiler's kernel times."""
    config, rest = split_preset(argv)
    bench = parse(Bench, rest, prog="matvec.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))

    import jax

    from nanojax.ops.kernels.matvec import Cut

    if jax.devices()[0].platform != "gpu":
        raise UserError(f"these kernels run on NVIDIA GPUs, and the device is a {jax.devices()[0].platform}; run this where one is")
    print(f"{jax.devices()[0].device_kind}, {bench.rows} rows\n| product | format | cut | us | GB/s |\n|---|---|---|---|---|")
    cuts = [None, *(Cut(*cut) for cut in itertools.product(bench.outputs, bench.lanes, bench.warps))]
    for (name, (outputs, inputs, ffn)), format in itertools.product(products(bench.config.model).items(), bench.formats):
        found = timed(outputs, inputs, ffn, format, bench.rows, cuts)
        for cut, seconds, size in found[:1] + sorted(found[1:], key=lambda row: row[1])[:3]:
            words = f"{cut.outputs} x {cut.lanes}, {cut.warps} warps" if cut else "in use"
            print(f"| {name} {outputs} x {inputs} | {format} | {words} | {1e6 * seconds:.2f} | {size / seconds / 1e9:.0f} |", flush=True)


def products(c: ModelConfig) -> dict[str, tuple[int, int, str | None]]:
    """Name -> outputs, inputs, activation."""
    queries, keys = c.n_head * c.head_dim, c.kv_heads * c.head_dim
    gated = c.ffn == "swiglu"
    return {
        "qkv": (queries + 2 * keys, c.width, None),
        "o": (c.width, queries, None),
        "up": ((1 + gated) * c.hidden, c.width, c.ffn),
        "down": (c.width, c.hidden, None),
        "head": (c.vocab_size, c.width, None),
    }


def random_matrix(outputs: int, inputs: int, format: str, seed: int) -> Any:
    """A matrix of random bits of that format, which stand for finite numbers."""
    import jax
    import jax.numpy as jnp

    from nanojax.formats import FORMATS
    from nanojax.ops.packed import PackedMatrix

    key, other = jax.random.split(jax.random.key(seed))
    if format == "bf16":
        return 0.02 * jax.random.normal(key, (outputs, inputs), jnp.bfloat16)
    words = jax.random.bits(key, (outputs, inputs // 8), jnp.uint32).astype(jnp.int32)
    shape = (outputs, inputs // FORMATS[format].block)
    if format == "int4":
        return PackedMatrix(words | 0x11111111, jax.random.uniform(other, shape, maxval=0.01), None, format)
    low, high = (32, 104) if format == "nvfp4" else (115, 121)
    scales = jax.random.randint(other, shape, low, high).astype(jnp.uint8)
    return PackedMatrix(words, scales, jnp.float32(1000) if format == "nvfp4" else None, format)


def timed(
    outputs: int, inputs: int, ffn: str | None, format: str, rows: int, cuts: Sequence[Cut | None]
) -> list[tuple[Cut | None, float, int]]:
    """(cut, median seconds of its kernel over many matrices, bytes of one) of every cut that serves."""
    import jax
    import jax.numpy as jnp

    from nanojax.ops.kernels.matvec import Around, feed_of, matvec

    make = jax.jit(random_matrix, static_argnums=(0, 1, 2))
    first = make(outputs, inputs, format, 0)
    matrices = [first, *(make(outputs, inputs, format, i) for i in range(1, max(2, READ // first.nbytes)))]
    x, stream = feed_of(first).of(jnp.ones((rows, inputs)), jnp.bfloat16), jnp.zeros((rows, inputs))

    def compiled(cut: Cut | None) -> Any:
        return jax.jit(lambda x, w: matvec(x, w, Around(rms_of_BI=stream, ffn=ffn), cut=cut)).lower(x, first).compile()

    made = outputs // 2 if ffn == "swiglu" else outputs
    serving = [cut for cut in cuts if cut is None or made % cut.outputs == 0]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(compiled, serving))
    return [
        (cut, kernel_seconds(lambda program=program: [program(x, w) for w in matrices]), first.nbytes)
        for cut, program in zip(serving, programs, strict=True)
    ]


def kernel_seconds(run: Callable[[], Any]) -> float:
    """Median time of the kernels named matvec that a call starts, as the profiler has it: the host's share is larger than theirs."""
    return statistics.median(kernel.end - kernel.start for kernel in traced(run) if kernel.name.startswith("matvec")) / 1e9


def traced(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels that a call starts, in its second turn."""
    import jax

    from nanojax.analysis.trace import read_trace

    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        return read_trace(Path(folder))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
