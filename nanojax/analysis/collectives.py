"""What devices say to each other in a compiled program: kinds, bytes, who with whom, and what is computed meanwhile."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nanojax.analysis.hlo import Op, Shape, size_of

NUMBERS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program's, on one device. Bytes are those that the device sends, by the algorithms that NCCL takes for large arrays."""

    kind: str
    """all-gather, all-reduce, ..."""
    scope: str
    """op_name: the jax functions and named scopes that it comes from."""
    times: float
    """Executions of it in one of the program."""
    results: tuple[Shape, ...]
    group: int
    """Devices that take part."""
    hosts: int
    """Of those devices."""
    near: float
    """Bytes to devices of the same host, of one execution."""
    far: float
    """Bytes to those of other hosts."""
    start: int
    """Index of the operation that begins it."""
    done: int | None
    """Of the one that waits for it; None where the device does nothing else meanwhile."""

    @property
    def sent(self) -> float:
        """Bytes a step."""
        return self.times * (self.near + self.far)


def read_collectives(ops: Sequence[Op], hosts: Sequence[int]) -> list[Collective]:
    """Those of a program's operations. `hosts`: that of each device of the mesh, in order. Raises ValueError as `groups_of` does."""
    ends = {op.operands[0]: i for i, op in enumerate(ops) if op.opcode.endswith("-done") and op.operands}
    found = []
    for i, op in enumerate(ops):
        if not op.collective or op.opcode.endswith("-done"):
            continue
        kind, end = op.opcode.removesuffix("-start"), ends.get(op.name)
        # What is begun has its operands before its results.
        results = op.shapes if kind == op.opcode else op.shapes[len(op.shapes) // 2 :] if end is None else ops[end].shapes
        meanwhile = ops[i + 1 : end] if end is not None and '"is_sync":true' not in op.attributes else []
        computing = any(other.bytes and not other.collective for other in meanwhile)
        group = max(groups_of(op.attributes, len(hosts)), key=lambda group: len({hosts[n] for n in group}))
        near, far = sent(kind, sum(map(size_of, results)), [hosts[n] for n in group])
        members = len(group), len({hosts[n] for n in group})
        found.append(Collective(kind, op.scope, op.times, results, *members, near, far, i, end if computing else None))
    return found


def sent(kind: str, size: int, hosts: Sequence[int]) -> tuple[float, float]:
    """(bytes to the own host, bytes to others) that a device sends, of a collective whose results have `size` bytes on it.

    A ring moves (n - 1) / n of what is gathered or scattered, twice that of what is reduced to all (Patarasuk & Yuan 2009, section 2),
    and visits hosts one after another: of k devices of a host one sends to the next host, and in k rings each does so with its share.
    """
    n, k = len(hosts), min(Counter(hosts).values())
    if kind == "collective-permute":
        return (size, 0.0) if k == n else (0.0, size)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * (k - 1) / n, size * (n - k) / n
    whole = {"reduce-scatter": n, "all-reduce": 2}.get(kind, 1) * size * (n - 1) / n
    return (whole, 0.0) if k == n else (whole * (k - 1) / k, whole / k)


def groups_of(attributes: str, devices: int) -> list[list[int]]:
    """Groups of devices of a collective, in each of XLA's notations. Raises ValueError on another.

    {{0,1},{2,3}}; [4,2]<=[2,2,2]T(0,2,1), an iota; mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, a mesh and the axes spanned.
    """
    if re.search(r"replica_groups=\{\}", attributes):
        return [list(range(devices))]
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        return [numbers(part) for part in re.findall(r"\{([\d, ]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return iota(match[2]).reshape(numbers(match[1])).tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[.*?)\))? \{('[^:}]*')\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        spanned = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", match[3])]
        ids = iota(match[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
        last = np.moveaxis(ids, spanned, range(-len(spanned), 0))
        return last.reshape(-1, math.prod(ids.shape[n] for n in spanned)).tolist()
    raise ValueError(f"a notation of device groups that is not known: {attributes.strip()[:300]}")


def iota(text: str) -> np.ndarray:
    """'[4,2]T(1,0)' -> 0 .. 7 as [4, 2], transposed."""
    dims, _, order = text.partition("T")
    ids = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    return ids.transpose(numbers(order)) if order else ids


def numbers(text: str) -> list[int]:
    """Every whole number in a text."""
    return [int(n) for n in NUMBERS.findall(text)]


def arrays(collectives: Sequence[Collective]) -> dict[str, int]:
    """Kind -> arrays that its collectives move a step: XLA joins small ones into one, and splits none."""
    by_kind = itertools.groupby(sorted(collectives, key=lambda c: c.kind), key=lambda c: c.kind)
    return {kind: round(sum(c.times * len(c.results) for c in members)) for kind, members in by_kind}
