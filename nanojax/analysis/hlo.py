"""A compiled program's text -> the operations that the device runs, each with its floating-point operations and bytes.

XLA's own cost analysis counts the body of a loop once and a custom call not at all; a training step is loops and custom calls.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from nanojax.ops.kernels.work import EVERY

Shape = tuple[str, tuple[int, ...]]
"""(element type, dimensions)."""

BITS = {"pred": 8, "token": 0, "opaque": 0}  # other types carry their bits in their names
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "optimization-barrier",
    "add-dependency",
}  # fmt: skip
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
    "ragged-all-to-all",
)
# Products of a causal attention, forward and backward, half of whose scores are never needed: QK and PV; those and their four gradients
# less one, since the scores are computed again (Dao et al. 2022, arXiv:2205.14135, algorithm 4). A window is not seen in their shapes.
ATTENTION_PRODUCTS = {
    "__cudnn$fmhaSoftmax": 2.0, "__cudnn$fmhaSoftmaxBackward": 5.0,
    "te_fused_attn_forward_ffi": 2.0, "te_fused_attn_backward_ffi": 5.0,
}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Those that write into their first operand -> the operand that they write."""
OWN_PRODUCTS = "mosaic_gpu"
"""Of ops/kernels/wgmma.py."""
OWN_NAMES = ("down_backward", "gate_and_up", "head_exponentials")
"""Its kernels, products of the first operand [M, K] and the second [K, N]."""
OWN_CHECKS = ("round_again",)
"""Own kernels, of ops/kernels/both_ways.py, that most often read their first two operands and leave the others alone."""
OWN_LOOKS = ("see",)
"""Those that read one token of `EVERY`."""
MATMUL_TARGETS = ("__cublas$", "__onednn$matmul", "__cudnn$blockScaledDot")


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction that is run by itself: a kernel, or a few."""

    name: str
    opcode: str
    target: str
    """Of a custom call, or of the one that a fusion wraps; else empty."""
    scope: str
    """op_name: the jax functions and named scopes that it comes from."""
    flops: float
    """Of one execution: products of matrices and attention. Elementwise work is not counted."""
    bytes: int
    """Read and written by one execution, if every operand came from memory once."""
    times: float
    """Executions of it in one of the program."""
    wrapped: str = ""
    """The name of the custom call that a fusion wraps, by which the profiler knows it; else empty."""
    shapes: tuple[Shape, ...] = ()
    """Of its results."""
    operands: tuple[str, ...] = ()
    """Names."""
    attributes: str = ""
    """As XLA writes them."""

    @property
    def collective(self) -> bool:
        return self.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES

    @property
    def recomputed(self) -> bool:
        """Whether jax.checkpoint has it computed a second time."""
        return "rematted_computation" in self.scope


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    """What stands in the parentheses: the number of a parameter."""
    rest: str

    def attribute(self, name: str) -> str:
        """Name of the computation that an attribute refers to."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


Computation = dict[str, _Instruction]


def read_program(text: str) -> list[Op]:
    """The operations of a program as `compiled.as_text()` prints it, those in loops too. Raises ValueError where there is no program."""
    computations, entry = _computations(text)
    if not entry:
        raise ValueError("the text has no ENTRY computation")
    return list(_run(computations, entry, 1.0))


def loops_without_a_count(text: str) -> int:
    """Loops whose trip count the compiler does not know; their bodies are counted once."""
    return sum("known_trip_count" not in line for line in text.splitlines() if " while(" in line)


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    """(name -> computation, name of the entry)."""
    found: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = found.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return found, entry


def _instruction(line: str) -> _Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.find(" ", at)
    opened = line.find("(", end)
    closed = _closing(line, opened) if opened > 0 else -1
    if min(end, opened, closed) < 0:
        return None
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opened:closed]))
    return _Instruction(head[2], line[end:opened].strip(), _shapes(line[at:end]), operands, line[opened + 1 : closed - 1], line[closed:])


def _closing(line: str, at: int) -> int:
    """Just after the parenthesis that closes the one at `at`, or -1."""
    depth = 0
    for i in range(at, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i + 1
    return -1


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)
    return tuple((kind, tuple(int(n) for n in re.findall(r"\d+", dims))) for kind, dims in found)


def size_of(shape: Shape) -> int:
    """Bytes of an array."""
    kind, dims = shape
    bits = BITS.get(kind) if kind in BITS else int(next(iter(re.findall(r"\d+", kind)), "32"))
    return -(-(bits or 0) * math.prod(dims) // 8)


def _run(computations: dict[str, Computation], name: str, times: float) -> Iterator[Op]:
    """The operations of a computation that is run so many times."""
    within = computations.get(name, {})
    for instruction in within.values():
        if instruction.opcode == "while":
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.rest)
            for attribute in ("body", "condition"):
                yield from _run(computations, instruction.attribute(attribute), times * (int(count[1]) if count else 1))
        elif instruction.opcode in ("call", "async-start", "command-buffer"):
            yield from _run(computations, instruction.attribute("to_apply") or instruction.attribute("calls"), times)
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            for branch in names or [instruction.attribute("true_computation"), instruction.attribute("false_computation")]:
                yield from _run(computations, branch, times / (len(names) or 2))
        elif instruction.opcode not in FREE:
            inner = computations.get(instruction.attribute("calls"), {}) if instruction.opcode == "fusion" else {}
            yield _op(instruction, within, inner, times)


def _op(instruction: _Instruction, within: Computation, inner: Computation, times: float) -> Op:
    parts = [(part, inner) for part in inner.values()] or [(instruction, within)]
    called = next((part for part, _ in parts if _target(part)), None)
    scope = _scope(instruction) or next((s for part in reversed(inner.values()) if (s := _scope(part))), "")
    return Op(
        name=instruction.name,
        opcode=instruction.opcode,
        target=_target(called) if called else "",
        wrapped=called.name if called and inner else "",
        scope=scope,
        flops=sum(_flops(part, around) for part, around in parts),
        bytes=_bytes(instruction, within, inner),
        times=times,
        shapes=instruction.shapes,
        operands=instruction.operands,
        attributes=instruction.rest,
    )


def _scope(instruction: _Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _target(instruction: _Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _flops(instruction: _Instruction, within: Computation) -> float:
    """Of a product of matrices or an attention kernel; 0 of anything else."""
    target = _target(instruction)
    operand = within.get(instruction.operands[0]) if instruction.operands else None
    if operand is None or not operand.shapes or not instruction.shapes:
        return 0.0
    dims = operand.shapes[0][1]
    if products := ATTENTION_PRODUCTS.get(target):
        if len(dims) != 4:
            return 0.0
        b, t, n, h = dims
        return products * 2 * b * n * h * t * (t + 1) / 2
    if target.startswith(OWN_PRODUCTS):
        known = any(f"/{name}/" in _scope(instruction) for name in OWN_NAMES) and instruction.operands[1] in within
        return 2.0 * dims[0] * dims[1] * within[instruction.operands[1]].shapes[0][1][1] if known else 0.0
    if instruction.opcode != "dot" and not target.startswith(MATMUL_TARGETS):
        return 0.0
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.rest)
    axes = [int(n) for n in re.findall(r"\d+", contracted[1])] if contracted else [len(dims) - 1]
    return 2.0 * math.prod(instruction.shapes[0][1]) * math.prod(dims[axis] for axis in axes if axis < len(dims))


def _bytes(instruction: _Instruction, within: Computation, inner: Computation) -> int:
    """Operands and results. What a fusion only slices counts as the slice, and what it writes into as what it writes."""
    if instruction.opcode.endswith("-done"):
        return 0
    operands = [within[name] for name in instruction.operands if name in within]
    read = [sum(map(size_of, operand.shapes)) for operand in operands]
    if any(f"/{name}/" in _scope(instruction) for name in OWN_CHECKS):
        return sum(read[:2])
    written = sum(map(size_of, instruction.shapes))
    if any(f"/{name}/" in _scope(instruction) for name in OWN_LOOKS):
        return sum(read) // EVERY + written
    scratch = sum(size_of(shape) for shape in instruction.shapes[1:] if shape[0] in ("s8", "u8")) if _target(instruction) else 0
    if instruction.opcode == "dynamic-slice":
        return 2 * written
    if instruction.opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2 * read[1]
    parameters = {part.inside: part.name for part in inner.values() if part.opcode == "parameter"}
    for i in range(len(read)):
        if (name := parameters.get(str(i))) is not None:
            read[i] = _read_of(name, inner, read[i])
    updates = [(part, UPDATES[part.opcode]) for part in inner.values() if part.opcode in UPDATES and len(part.operands) > 1]
    for part, at in updates:
        update = inner.get(part.operands[at])
        written -= sum(map(size_of, part.shapes)) - sum(map(size_of, update.shapes if update else ()))
    return sum(read) + max(0, written) - scratch


def _read_of(name: str, inner: Computation, whole: int) -> int:
    """Bytes of a fusion's parameter that it reads."""
    uses = [part for part in inner.values() if name in part.operands]
    if uses and all(part.opcode in SLICES and part.operands[0] == name for part in uses):
        return min(whole, sum(sum(map(size_of, part.shapes)) for part in uses))
    if uses and all(part.opcode in UPDATES and part.operands[0] == name for part in uses):
        return 0  # it is written into
    return whole
