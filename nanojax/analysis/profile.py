"""Kernels of a trace beside the operations of its program: where the time of a step went."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from nanojax.analysis.hlo import Op
from nanojax.analysis.trace import COMMUNICATION, COPY, Kernel, main_module, own_times
from nanojax.errors import UserError

PRODUCTS, ATTENTION, ELEMENTWISE, OPTIMIZER = "matrix products", "attention", "elementwise", "optimizer"
QUANTISATION, COMMUNICATING, COPIES, OTHER, UNKNOWN, IDLE = (
    "quantisation and casts", "communication", "copies to and from the host", "other programs", "unattributed", "idle",
)  # fmt: skip
GROUPS: tuple[str, ...] = (PRODUCTS, ATTENTION, ELEMENTWISE, OPTIMIZER, QUANTISATION, COMMUNICATING, COPIES, OTHER, UNKNOWN, IDLE)
# The named scopes of the model and the step (model.py, step.py), outermost first.
SCOPES = ("prepare", "embed", "block", "attention", "qkv", "rope", "attend", "out", "ffn", "final_norm", "loss", "accumulate", "optimizer")
KERNELS = (  # kernels by their names, for traces that do not say which operation one belongs to
    (re.compile(r"sdpa|fmha|flash|fused_attn|compute_dot_do_o|convert_dq", re.I), ATTENTION),
    (re.compile(r"nccl", re.I), COMMUNICATING),
    (re.compile(r"nvjet|gemm|cutlass|cublas|splitK|(^|_)dot(_|\.|$)", re.I), PRODUCTS),
    (re.compile(r"fusion|wrapped_|^memcpy\d|^Memset|^copy|transpose|reduce|broadcast|convert|scatter|select", re.I), ELEMENTWISE),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Kernels of one group, model part and name, over one step."""

    group: str
    part: str
    """Named scopes, `backward` with them; empty where nothing says."""
    name: str
    seconds: float
    count: float
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """A step, by the clock of the device."""

    rows: tuple[Row, ...]
    """Their seconds, and those idle, make up the wall time."""
    wall: float
    """Seconds from the first kernel of the steps to the end of the last, over their number."""
    idle: float
    hidden: float
    """Seconds of communication and copies under other kernels."""
    steps: int
    spans: tuple[tuple[float, float, str], ...]
    """(start, end, group) of what ran in the last step, in seconds from its start."""

    def by(self, field: str) -> dict[str, Row]:
        """Rows summed over one of `group`, `part`, `name`, longest first."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
        groups: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.rows:
            key = getattr(row, field)
            groups[key][row.group] += 1
            for i, value in enumerate((row.seconds, row.count, row.flops, row.bytes)):
                sums[key][i] += value
        found = {key: Row(groups[key].most_common(1)[0][0], key if field == "part" else "", key, *sums[key]) for key in sums}
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))

    def seconds(self, group: str) -> float:
        """Of a group, idle included."""
        return self.idle if group == IDLE else sum(row.seconds for row in self.rows if row.group == group)


def make_profile(kernels: Sequence[Kernel], ops: Sequence[Op], steps: int | None = None) -> Profile:
    """`ops` of the program that was traced, none where it is not known. `steps` it was run; None: by how often its rarest kernel ran."""
    module = main_module(kernels)
    within = [kernel for kernel in kernels if kernel.module == module]
    begin, end = within[0].start, max(kernel.end for kernel in within)
    kernels = [kernel for kernel in kernels if kernel.start >= begin and kernel.end <= end]
    counts = Counter(kernel.op or kernel.name for kernel in within).values()
    if steps is not None and steps > max(counts):
        raise UserError(
            f"a trace of {steps} steps runs a kernel in each, and here none ran more than {max(counts)} times; leave out --steps"
        )
    steps = steps or min(counts)
    own, hidden = own_times(kernels), 0.0
    known = {name: op for op in ops for name in (op.name, op.wrapped) if name}
    shares = _shares(kernels, own)
    rows: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
    spans: list[tuple[float, float, str]] = []
    for kernel, ns, share in zip(kernels, own, shares, strict=True):
        op = known.get(kernel.op) or known.get(re.sub(r"_(\d+)$", r".\1", kernel.name)) if kernel.module == module else None
        group, part = (OTHER, "") if kernel.module not in (module, "") else _place(kernel, op, bool(ops))
        if kernel.kind in (COMMUNICATION, COPY):
            hidden += kernel.end - kernel.start - ns
        values = rows[group, part, re.sub(r"([._]\d+)+$", "", kernel.name)]
        for i, value in enumerate((ns / 1e9, 1.0, op.flops * share if op else 0.0, op.bytes * share if op else 0.0)):
            values[i] += value
        spans.append((kernel.start, kernel.end, group))
    made = tuple(Row(*key, *(value / steps for value in values)) for key, values in rows.items())
    wall = (end - begin) / steps
    last = [((a - end + wall) / 1e9, (b - end + wall) / 1e9, group) for a, b, group in spans if a >= end - wall]
    return Profile(made, wall / 1e9, (wall - sum(own) / steps) / 1e9, hidden / 1e9 / steps, steps, tuple(_joined(last)))


def _joined(spans: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Spans of one group that follow one another within 5 us made one: what a picture can show."""
    found: list[tuple[float, float, str]] = []
    for start, end, group in spans:
        if found and found[-1][2] == group and start - found[-1][1] < 5e-6:
            found[-1] = (found[-1][0], max(end, found[-1][1]), group)
        else:
            found.append((start, end, group))
    return found


def _shares(kernels: Sequence[Kernel], own: Sequence[float]) -> list[float]:
    """For each kernel the part that it has in an execution of its operation, which may be several: by its time.

    An execution may run a kernel more than once, clearing memory for instance; the one that ran least tells how many there were.
    """
    ops = [(kernel.module, kernel.op) for kernel in kernels]  # programs name theirs alike
    times: dict[tuple[str, str], float] = defaultdict(float)
    for op, ns in zip(ops, own, strict=True):
        times[op] += ns
    executions: dict[tuple[str, str], int] = {}
    for (op, _), count in Counter((op, kernel.name) for op, kernel in zip(ops, kernels, strict=True)).items():
        executions[op] = min(count, executions.get(op, count))
    return [executions[op] * ns / times[op] if op[1] and times[op] else 1.0 for op, ns in zip(ops, own, strict=True)]


def _place(kernel: Kernel, op: Op | None, program_known: bool) -> tuple[str, str]:
    """(group, model part)."""
    if kernel.kind == COPY:
        return COPIES, ""
    if op is not None:
        return group_of(op), part_of(op.scope)
    if program_known and kernel.op:
        return UNKNOWN, ""
    return next((group for pattern, group in KERNELS if pattern.search(kernel.name)), UNKNOWN), ""


def group_of(op: Op) -> str:
    """What kind of work an operation is."""
    scopes = part_of(op.scope).split("/")
    if op.collective:
        return COMMUNICATING
    if "optimizer" in scopes:
        return OPTIMIZER
    if "prepare" in scopes:
        return QUANTISATION
    if "attend" in scopes:
        return ATTENTION
    return PRODUCTS if op.flops or op.opcode == "dot" else ELEMENTWISE


def part_of(scope: str) -> str:
    """'jit(train_step)/.../transpose(jvp(block_3))/ffn/dot_general' -> 'backward: block/ffn'."""
    words = [re.sub(r"^.*\(|\)+$|_\d+\)*$", "", word) for word in scope.split("/")]
    path = "/".join(dict.fromkeys(word for word in words if word in SCOPES))
    return f"backward: {path}" if path and "transpose(" in scope else path
