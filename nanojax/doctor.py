"""What this machine has, and whether every attention backend that it can run agrees with the reference: `nanojax doctor`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanojax.cli import parse
from nanojax.errors import NanoJaxError

if TYPE_CHECKING:
    import jax

    from nanojax.ops.attention_request import Request

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformer-engine")
HEADS = {"MHA": (4, 4), "GQA 4:1": (8, 2), "MQA": (4, 1)}  # query heads, key and value heads
DOCUMENTS = (None, 7)
# Head size, tokens, window: each value of one with each of another, in half of the combinations.
SHAPES = ((64, 77, None), (64, 96, 17), (128, 96, None), (128, 77, 17))


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Nothing to choose: it checks what there is."""


@dataclass(frozen=True)
class Finding:
    """A group of cases on one backend."""

    refusals: tuple[str, ...]
    """Of the cases that it does not serve, why, each reason once."""
    served: int
    """Cases that it does."""
    share: float
    """Largest deviation from the reference among those, as a share of what is tolerated."""
    errors: tuple[str, ...]
    """What it raised."""
    seconds: float
    """Compilation included."""

    @property
    def good(self) -> bool:
        return not self.errors and self.share <= 1

    def __str__(self) -> str:
        if self.errors:
            return f"FAILED: {'; '.join(self.errors)}"
        if not self.served:
            return f"not run: {'; '.join(self.refusals)}"
        words = f"{'ok' if self.good else 'WRONG'}: {self.served} cases, at most {self.share:.2f} of the tolerance, {self.seconds:.1f} s"
        return words + "".join(f"; not run: {reason}" for reason in self.refusals)


def main(argv: Sequence[str]) -> None:
    """Say what this machine has, and hold every attention backend that runs here to the reference; exit code 1 where one is wrong."""
    parse(DoctorCommand, argv, prog="nanojax doctor", description=main.__doc__ or "")
    import jax

    print("\n".join(f"{name:>12}  {text}" for name, text in machine(jax.devices()).items()), flush=True)
    bad = [name for name, found in check_attention(jax.devices()[0], print) if not found.good]
    if bad:
        raise NanoJaxError(
            f"attention backends must agree with the reference, and these do not: {'; '.join(bad)}; choose another --attn-impl"
        )


def machine(devices: list[jax.Device]) -> dict[str, str]:
    """Lines about devices, driver and versions."""
    first = devices[0]
    capability, memory = getattr(first, "compute_capability", None), (first.memory_stats() or {}).get("bytes_limit")
    facts = [first.device_kind, f"compute capability {capability}" if capability else "", f"{memory / 2**30:.0f} GiB" if memory else ""]
    return {
        "devices": f"{len(devices)} x {', '.join(filter(None, facts))} ({first.platform})",
        "platform": " ".join(first.client.platform_version.split()),
        "versions": ", ".join([f"python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in LIBRARIES)]),
    }


def version(library: str) -> str:
    """Of an installed distribution, or words."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_attention(device: jax.Device, say: Callable[[str], None]) -> Iterator[tuple[str, Finding]]:
    """(backend and group, finding) of every backend but the reference and every group of cases, said as they come."""
    import jax.numpy as jnp

    from nanojax.ops.attention import REFUSALS
    from nanojax.ops.attention_check import TOLERANCES

    dtype = jnp.bfloat16 if device.platform == "gpu" else jnp.float32
    say(f"{'attention':>12}  {dtype.__name__}, output and gradients; tolerated: {TOLERANCES[dtype.__name__]:g} of the largest value")
    for name in (name for name in REFUSALS if name != "reference"):
        reasons = {REFUSALS[name](case) for cases in groups(device, dtype).values() for case in cases}
        if len(reasons) == 1 and (reason := reasons.pop()):
            say(f"{name:>12}  not run: {reason}")
            continue
        for group, cases in groups(device, dtype).items():
            found = examine(name, cases)
            say(f"{name:>12}  {group}: {found}")
            yield f"{name}, {group}", found


def groups(device: jax.Device, dtype) -> dict[str, list[Request]]:
    """Name -> cases: heads by documents, and in each head sizes, lengths and windows."""
    from nanojax.ops.attention_request import Request

    found = {}
    for (name, (heads, kv_heads)), documents in itertools.product(HEADS.items(), DOCUMENTS):
        base = Request(
            platform=device.platform, capability=getattr(device, "compute_capability", None), dtype=dtype,
            rows=2, tokens=0, heads=heads, kv_heads=kv_heads, head_dim=0, documents=documents,
        )  # fmt: skip
        found[f"{name}, {'one document' if documents is None else f'{documents} documents a row'}"] = [
            dataclasses.replace(base, head_dim=size, tokens=tokens, windows=(window,)) for size, tokens, window in SHAPES
        ]
    return found


def examine(name: str, cases: Sequence[Request]) -> Finding:
    """Run the cases that the backend does not refuse."""
    from nanojax.ops.attention import REFUSALS
    from nanojax.ops.attention_check import prepared_all, share

    started = time.perf_counter()
    reasons = [REFUSALS[name](case) for case in cases]
    served = [case for case, reason in zip(cases, reasons, strict=True) if reason is None]
    shares, errors = [0.0], []
    for measure in prepared_all([(name, case) for case in served]):
        try:
            shares.append(share(measure()))
        except Exception as error:  # whatever a kernel raises is the finding
            errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}")
    refusals = tuple(dict.fromkeys(filter(None, reasons)))
    return Finding(refusals, len(served), max(shares), tuple(dict.fromkeys(errors)), time.perf_counter() - started)
