"""Training speed beside a PyTorch program on one GPU.   python scripts/bench/throughput.py configs/d12.py --reference torch_reference.py

The reference is a Python file with GPT(depth, tokens, vocabulary, kv heads, hidden, softcap), Muon(matrices, rate) and a switch
Linear.int4; it is run. Each side is a process of its own with the GPU to itself for its turn, and both take the same tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config, Precision
from nanojax.errors import NanoJaxError, UserError, run_main

WARM_UP = 20  # steps of each side, dropped, after which it says its loss
TORCH = "torch"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    reference: str | None = None
    """The PyTorch program."""
    precisions: tuple[str, ...] = ("bf16",)
    """Of --precision."""
    rounds: int = 4
    """Turns of each side, alternating; the first is dropped."""
    steps_a_round: int = 5
    """Steps a turn, timed as one."""
    side: str | None = None
    """Be one side, and do as the parent process says: torch, or a precision."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.steps_a_round < 1:
            given = f"{self.rounds} and {self.steps_a_round}"
            raise UserError(f"a bench takes 2 rounds or more and a step or more, given {given}; leave them out for the defaults")
        known = get_args(Precision)
        if not self.precisions or len(set(self.precisions)) < len(self.precisions) or set(self.precisions) - set(known):
            given = " ".join(self.precisions) or "none"
            raise UserError(f"--precisions are one or more of {', '.join(known)}, each once, given {given}; name others")
        if self.reference is not None and not Path(self.reference).is_file():
            raise UserError(f"--reference is the PyTorch program to compare with, and {self.reference!r} is no file; name one")


def main(argv: Sequence[str]) -> None:
    """Print tokens/s of each side, by the median turn, and ratios."""
    config, rest = split_preset(argv)
    bench = parse(Bench, rest, prog="throughput.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))
    if bench.side in (None, TORCH) and bench.reference is None:
        raise UserError("this compares with a PyTorch program; name it by --reference, or compare our own by precisions.py")
    if bench.side in (None, TORCH) and importlib.util.find_spec("torch") is None:
        raise UserError("--reference needs PyTorch, which is not installed; pip install torch")
    if bench.side is not None:
        serve(*(torch_side(bench) if bench.side == TORCH else our_side(bench, bench.side)))
        return
    for precision in bench.precisions:
        config_in(bench, precision)
    names = [TORCH, *bench.precisions]
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(child(argv, name, len(names))) for name in names}
        facts = {name: heard(side, name) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(bench.rounds):
            for name, side in sides.items():
                seconds = asked(side, name)["seconds"]
                if turn:
                    times[name].append(seconds / bench.steps_a_round)
        last = {name: asked(side, name, "end") for name, side in sides.items()}
    device = next(iter(facts.values()))["device"]
    print(f"{device}; {bench.rounds - 1} turns of {bench.steps_a_round} steps count, {WARM_UP} steps and a turn dropped")
    print(f"| side | tokens/s | ms a step | turns, ms | of {names[0]} | parameters | FLOPs a token | loss after {WARM_UP} | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, values in times.items():
        took, said = statistics.median(values), facts[name]
        turns = ", ".join(f"{1e3 * value:.1f}" for value in values)
        print(
            f"| {name} | {said['tokens'] / took:,.0f} | {1e3 * took:.1f} | {turns} | {statistics.median(times[names[0]]) / took:.3f} "
            f"| {said['parameters']:,} | {said['flops']:.5g} | {said['loss']:.4f} | {last[name]['peak'] / 2**30:.1f} |"
        )


@contextlib.contextmanager
def child(argv: Sequence[str], name: str, sides: int) -> Iterator[subprocess.Popen]:
    """This program as one of so many sides, which share the GPU's memory. What the environment says of that goes first."""
    command = [sys.executable, __file__, *argv, "--side", name]
    memory = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name of the next, beside which XLA refuses it
        memory["XLA_CLIENT_MEM_FRACTION"] = f"{0.98 / sides:.2f}"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=memory | os.environ) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(side: subprocess.Popen, name: str) -> dict[str, Any]:
    """The next line of a side. Raises NanoJaxError where it ends instead."""
    for line in side.stdout or ():
        if line.startswith("{"):
            return json.loads(line)
    raise NanoJaxError(f"the side {name} ended with {side.wait()} before it was done; what it said is above")


def asked(side: subprocess.Popen, name: str, word: str = "go") -> dict[str, Any]:
    """What a side answers to a word."""
    assert side.stdin is not None
    side.stdin.write(word + "\n")
    side.stdin.flush()
    return heard(side, name)


def serve(facts: dict[str, Any], steps: Callable[[], None], peak: Callable[[], int]) -> None:
    """Be a side: say facts, run a turn at every word, say the peak of memory at the last."""
    print(json.dumps(facts), flush=True)
    for word in sys.stdin:
        if word.strip() == "end":
            print(json.dumps({"peak": peak()}), flush=True)
            return
        began = time.perf_counter()
        steps()
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def tokens_of(config: Config, rows: int) -> Any:
    """(inputs, targets) of a microbatch [B, T], the same for all sides and every microbatch of a step."""
    import numpy as np

    return np.random.default_rng(0).integers(0, config.model.vocab_size, (2, rows, config.model.seq_len), np.int32)


def config_in(bench: Bench, precision: str) -> Config:
    """The config of one of our sides. Raises UserError where the precision does not go with it."""
    return dataclasses.replace(bench.config, train=dataclasses.replace(bench.config.train, precision=precision))


def our_side(bench: Bench, precision: str) -> tuple[dict[str, Any], Callable[[], None], Callable[[], int]]:
    """(facts, a turn, the peak of memory in bytes) of this library."""
    import jax
    import numpy as np

    from nanojax.data.loader import Batch
    from nanojax.mesh import batch_sharding
    from nanojax.program import keep_compiled_programs, make_program
    from nanojax.sizes import flops_per_token, resolve
    from nanojax.telemetry import peak_memory_bytes

    base = resolve(config_in(bench, precision), bench.config.model.vocab_size)
    keep_compiled_programs(base.data.cache)
    program = make_program(base, jax.devices()[:1])
    program.require_trainable()
    drawn = tokens_of(base, program.rows)
    whole = [np.broadcast_to(part, (program.accumulation, *part.shape)) for part in (*drawn, np.ones_like(drawn[0]))]
    tokens = Batch(*jax.device_put(tuple(whole), batch_sharding(program.mesh)))
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
    metrics: dict[str, Any] = {}

    def run(count: int) -> None:
        nonlocal state, metrics
        with jax.set_mesh(program.mesh):
            for _ in range(count):
                state, metrics = program.phase(1).train_step(state, tokens)
        jax.block_until_ready(state)

    run(WARM_UP)
    facts = dict(
        device=jax.devices()[0].device_kind, tokens=base.batch_tokens, parameters=program.parameters,
        flops=flops_per_token(base.model), loss=float(metrics["loss"]),
    )  # fmt: skip
    return facts, lambda: run(bench.steps_a_round), lambda: peak_memory_bytes(jax.devices()[:1])


def torch_side(bench: Bench) -> tuple[dict[str, Any], Callable[[], None], Callable[[], int]]:
    """The same of the reference: its step is that of its own main, on the tokens that ours takes."""
    import torch  # pyright: ignore[reportMissingImports]  # of the reference: not among our dependencies

    from nanojax.sizes import micro_batch, resolve

    config = resolve(bench.config, bench.config.model.vocab_size)
    c, rows = config.model, micro_batch(config, 1)
    spec = importlib.util.spec_from_file_location("reference", str(bench.reference))
    assert spec is not None
    assert spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    torch.manual_seed(0)
    theirs.Linear.int4 = False
    kv = None if c.kv_heads == c.n_head else c.kv_heads
    model = theirs.GPT(c.depth, c.seq_len, c.vocab_size, kv, c.hidden, c.softcap or 0).cuda()
    compiled = torch.compile(model, dynamic=False)
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = theirs.Muon(matrices, 0.02)
    adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    x, y = (torch.from_numpy(part).long().cuda() for part in tokens_of(config, rows))
    accumulation = config.batch_tokens // (rows * c.seq_len)
    loss: Any = None

    def run(count: int) -> None:
        nonlocal loss
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            for _ in range(count):
                for _ in range(accumulation):
                    loss = compiled(x, y)
                    (loss / accumulation).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                muon.step()
                adam.step()
                model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    run(WARM_UP)
    facts = dict(
        device=torch.cuda.get_device_name(), tokens=config.batch_tokens, parameters=sum(p.numel() for p in model.parameters()),
        flops=model.flops_per_token(), loss=float(loss),
    )  # fmt: skip
    return facts, lambda: run(bench.steps_a_round), torch.cuda.max_memory_allocated


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
