"""Faults on demand: NANOJAX_FAULT names what shall go wrong in a run, and when, so that what notices it can be tried out.

    NANOJAX_FAULT="nan_grad@step=7"                  one step
    NANOJAX_FAULT="spike_grad@batch=200..205,x=1e3"  the 200th to the 205th batch of the data, gradients a thousand times as large
    NANOJAX_FAULT="slow@rank=1,x=3; crash@step=50.." several; from step 50 on

`step` counts from 1, `batch` the batches of the data from 1: after a roll-back, steps come again and batches do not. With neither, all are
meant. What strikes the host strikes each number once in a process. `resumed=0` means processes that did not start with --resume, 1 those
that did.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanojax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "NANOJAX_FAULT"
# Kind -> (what it does, its x where none is given; None: it takes none).
KINDS: dict[str, tuple[str, float | None]] = {
    "nan_loss": ("the loss of the step is NaN", None),
    "spike_loss": ("the loss that the step sees is x times as large", 10.0),
    "nan_grad": ("the gradient is NaN", None),
    "inf_grad": ("the gradient is infinite", None),
    "spike_grad": ("the gradient is x times as large", 1e4),
    "inf_param": ("one value of a parameter becomes infinite before the step", None),
    "bitflip_param": ("one bit of a parameter flips before the step, on one of the devices that hold a copy", None),
    "stall": ("the process sleeps before the step, for x seconds", math.inf),
    "slow": ("the process takes x times as long from step to step", 2.0),
    "slow_data": ("the batch comes x seconds late", 1.0),
    "data_error": ("reading the batch fails", None),
    "slow_save": ("the save of the step takes x seconds longer", 1.0),
    "io_error": ("the save of the step fails", None),
    "sigterm": ("the process gets SIGTERM before the step", None),
    "crash": ("the process kills itself before the step, with SIGKILL", None),
}
IN_STEP = ("nan_loss", "spike_loss", "nan_grad", "inf_grad", "spike_grad")
FORM = "kind@step=7,rank=1,x=2"


@dataclass(frozen=True)
class Fault:
    """One entry of NANOJAX_FAULT."""

    kind: str
    first: int = 1
    last: float = math.inf
    """Numbers, from first to last, of what it counts."""
    counts: str = "step"
    """step or batch."""
    rank: int | None = None
    """The process that it strikes, None for all."""
    x: float | None = None
    resumed: bool | None = None
    """Whether processes that go on with a run are meant, or those that begin one; None for both."""

    def __str__(self) -> str:
        last = "" if self.last == self.first else f"..{'' if self.last == math.inf else int(self.last)}"
        words = f"{self.kind}@{self.counts}={self.first}{last}"
        words += f",rank={self.rank}" if self.rank is not None else ""
        words += f",x={self.x:g}" if self.x not in (None, math.inf) else ""
        return words + (f",resumed={int(self.resumed)}" if self.resumed is not None else "")


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults of a specification, entries separated by semicolons. Raises UserError on one that is not understood."""
    return tuple(parse_fault(entry.strip()) for entry in text.split(";") if entry.strip())


def parse_fault(entry: str) -> Fault:
    """`kind`, or `kind@key=value,...`."""
    kind, at, rest = (part.strip() for part in entry.partition("@"))
    if kind not in KINDS:
        raise UserError(f"{VARIABLE} takes entries like {FORM}, of the kinds {', '.join(KINDS)}; given {entry!r:.60}, choose one of these")
    given: dict[str, str] = {}
    for pair in rest.split(",") if at else ():
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in ("step", "batch", "rank", "x", "resumed") or key in given or not value:
            raise refusal(entry, "step= or batch=, rank=, x= and resumed=, each at most once and with a value", FORM.replace("kind", kind))
        given[key] = value
    if "step" in given and "batch" in given:
        raise refusal(entry, "step= or batch=, and not both", f"{kind}@step=7")
    if "rank" in given and kind in IN_STEP:
        raise refusal(entry, f"no rank= for {kind}, because loss and gradient are those of all processes together", f"{kind}@step=7")
    if "x" in given and KINDS[kind][1] is None:
        raise refusal(entry, f"no x= for {kind}: {KINDS[kind][0]}", f"{kind}@step=7")
    counts = "batch" if "batch" in given else "step"
    first, last = parse_range(entry, given.get(counts, "1.."))
    return Fault(
        kind,
        first,
        last,
        counts,
        rank=whole(entry, "rank", given["rank"]) if "rank" in given else None,
        x=positive(entry, given["x"]) if "x" in given else KINDS[kind][1],
        resumed={"0": False, "1": True}[choice(entry, given["resumed"])] if "resumed" in given else None,
    )


def parse_range(entry: str, text: str) -> tuple[int, float]:
    """'7' -> (7, 7), '7..' -> (7, inf), '7..12' -> (7, 12)."""
    found = re.fullmatch(r"([0-9]{1,9})(\.\.([0-9]{1,9})?)?", text)
    if not found or not 1 <= int(found[1]) <= (last := math.inf if found[2] == ".." else int(found[3] or found[1])):
        raise refusal(entry, "a number from 1 on, or a range, as 7, 7..12 or 7..", f"{entry.partition('@')[0]}@step=7..12")
    return int(found[1]), last


def whole(entry: str, key: str, text: str) -> int:
    """A whole number from 0 on."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise refusal(entry, f"a whole number from 0 on as {key}=", f"{entry.partition('@')[0]}@{key}=1")
    return int(text)


def positive(entry: str, text: str) -> float:
    """A finite number above 0."""
    if not re.fullmatch(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", text) or not 0 < float(text) < math.inf:
        raise refusal(entry, "a finite number above 0 as x=", f"{entry.partition('@')[0]}@x=2")
    return float(text)


def choice(entry: str, text: str) -> str:
    """0 or 1."""
    if text not in ("0", "1"):
        raise refusal(entry, "0 or 1 as resumed=", f"{entry.partition('@')[0]}@resumed=0")
    return text


def refusal(entry: str, rule: str, example: str) -> UserError:
    """What is wrong with an entry, in a line."""
    return UserError(f"{VARIABLE} takes {rule}; given {entry!r:.80}, try {example}")


@dataclass
class Faults:
    """The faults of a process. Every method does nothing where no fault is meant."""

    entries: tuple[Fault, ...] = ()
    rank: int = 0
    _struck: set[tuple[Fault, int]] = field(default_factory=set)
    _since: float | None = None

    @classmethod
    def from_environment(cls, *, resumed: bool, environment: Mapping[str, str] = os.environ) -> Faults:
        """Those that NANOJAX_FAULT names. Raises UserError, and imports no jax."""
        entries = parse_faults(environment.get(VARIABLE, ""))
        return cls(tuple(entry for entry in entries if entry.resumed in (None, resumed)))

    def require_ranks(self, processes: int) -> None:
        """Raise UserError on a fault that is meant for a process which there is not."""
        for entry in self.entries:
            if entry.rank is not None and entry.rank >= processes:
                raise UserError(f"{VARIABLE} takes ranks from 0 to {processes - 1} in this run, given {entry}; name one of these, or none")

    @property
    def facts(self) -> dict[str, str]:
        """A line for the header where there are any."""
        return {"FAULTS": f"on purpose, by {VARIABLE}: {'; '.join(map(str, self.entries))}"} if self.entries else {}

    @property
    def in_step(self) -> bool:
        """Whether the step takes factors."""
        return any(entry.kind in IN_STEP for entry in self.entries)

    def meant(self, kind: str, step: int, batch: int) -> Fault | None:
        """The first fault of a kind that is meant for this step or batch, and for this process."""
        for entry in self.entries:
            number = step if entry.counts == "step" else batch
            if entry.kind == kind and entry.first <= number <= entry.last and entry.rank in (None, self.rank):
                return entry
        return None

    def strikes(self, kind: str, step: int, batch: int) -> Fault | None:
        """As `meant`, once for each number."""
        entry = self.meant(kind, step, batch)
        if entry is None or (entry, number := step if entry.counts == "step" else batch) in self._struck:
            return None
        self._struck.add((entry, number))
        return entry

    def factors(self, step: int, batch: int) -> tuple[np.ndarray, ...]:
        """The further argument of a step that takes factors: float32 [2], of its loss and of its gradient; nothing where none does."""
        if not self.in_step:
            return ()
        import numpy as np

        loss = grad = 1.0
        for kind in IN_STEP:
            if entry := self.meant(kind, step, batch):
                factor = {"nan": math.nan, "inf": math.inf, "spi": entry.x or 1.0}[kind[:3]]
                loss, grad = (loss * factor, grad) if kind.endswith("loss") else (loss, grad * factor)
        return (np.array([loss, grad], np.float32),)

    def before_batch(self, step: int, batch: int) -> None:
        """What happens to the data. Raises OSError."""
        if entry := self.strikes("slow_data", step, batch):
            time.sleep(entry.x or 0)
        if self.strikes("data_error", step, batch):
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"the data, by {VARIABLE}")

    def before_step(self, step: int, batch: int, params: dict[str, Any]) -> dict[str, Any]:
        """What happens to the process; the parameters, with what happens to them."""
        if not self.entries:
            return params
        if self.strikes("crash", step, batch):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.strikes("sigterm", step, batch):
            os.kill(os.getpid(), signal.SIGTERM)
        if entry := self.strikes("stall", step, batch):
            deadline = time.monotonic() + (entry.x or 0)
            while time.monotonic() < deadline:
                time.sleep(0.1)
        if self.strikes("inf_param", step, batch):
            name = min(params, key=lambda name: (params[name].ndim, name))
            params = params | {name: spoiled(params[name])}
        if self.meant("bitflip_param", step, batch):
            params = self._flip(step, batch, params)
        self._dawdle(step, batch)
        return params

    def _flip(self, step: int, batch: int, params: dict[str, Any]) -> dict[str, Any]:
        copied = [name for name, w in sorted(params.items()) if any(shard.replica_id for shard in w.global_shards)]
        if not copied:
            raise UserError(
                f"{VARIABLE}=bitflip_param needs a parameter that several devices have a copy of, and this mesh has none; try --mesh data=2"
            )
        return params | {copied[0]: flipped(params[copied[0]])} if self.strikes("bitflip_param", step, batch) else params

    def _dawdle(self, step: int, batch: int) -> None:
        since, entry = self._since, self.strikes("slow", step, batch)
        if entry and since is not None:
            time.sleep(max(0.0, (entry.x or 1) - 1) * (time.monotonic() - since))
        self._since = time.monotonic()

    def in_save(self, step: int) -> None:
        """What happens to a save in the background. Raises OSError."""
        if entry := self.strikes("slow_save", step, step):
            time.sleep(entry.x or 0)
        if self.strikes("io_error", step, step):
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}, by {VARIABLE}")


def spoiled(w: Any) -> Any:
    """An array with its first value infinite."""
    import jax

    return jax.jit(lambda w: w.at[(0,) * w.ndim].set(math.inf), out_shardings=w.sharding)(w)


def flipped(w: Any) -> Any:
    """An array of float32 with the lowest bit of the first value flipped in the last copy that this process holds."""
    import jax
    import numpy as np

    *others, last = w.addressable_shards
    bits = np.array(last.data).view(np.uint32)
    bits.flat[0] ^= 1
    copy = jax.device_put(bits.view(np.float32), last.device)
    return jax.make_array_from_single_device_arrays(w.shape, w.sharding, [*(shard.data for shard in others), copy])
