"""What a value on the command line or in a config may be, and the words that refuse it."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nanojax.errors import UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")
LARGEST = 2**31  # of any whole number in a config: steps and token ids are int32 on the device


def round_up(x: float, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least x."""
    return math.ceil(x / multiple) * multiple


def nearest_divisor(n: int, k: int) -> int:
    """The divisor of n nearest to k."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return min([*small, *(n // d for d in small)], key=lambda d: (abs(d - k), d))


def fitting_divisor(n: int, least: int, size: int, multiple: int) -> int:
    """The smallest divisor of n, from `least` on, that makes a multiple of `multiple` when times `size`; n if there is none."""
    return min([d for d in range(least, n) if n % d == 0 and d * size % multiple == 0], default=n)


def nearest_multiple(x: int, n: int) -> int:
    """The multiple of n nearest to x, and at least n."""
    return max(n, round(x / n) * n)


def check_types(config: Any) -> None:
    """Raise UserError where a field does not hold what its annotation says: presets and saved configs get no parser's check."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            wanted = ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else str(getattr(hint, "__name__", hint))
            raise UserError(f"{name}={value!r:.60} must be one of these: {wanted.replace('NoneType', 'None')}; write one of them")
        if isinstance(value, int) and abs(value) >= LARGEST:
            given = value if abs(value) < 2**64 else f"a number of {value.bit_length()} bits"
            raise UserError(f"{name}={given} must be below {LARGEST}; write a smaller number")
        if value == "" and name not in ("mesh", "prompt"):
            raise UserError(f"{name} must not be empty; {'leave it out to have it derived' if fits(None, hint) else 'give one'}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: a plain type, a Literal, a union or a tuple of them. An int passes for a float."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args, strict=True))
    if args:
        return any(fits(value, arg) for arg in args)
    return isinstance(value, int | float if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def require_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise UserError unless value is finite and above zero (or, with zero=True, at least zero)."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UserError(f"{name}={value} must be {'at least' if zero else 'above'} 0 and finite; leave it out for the default")


def require_share(name: str, value: float) -> None:
    """Raise UserError unless value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value} must lie between 0 and 1; leave it out for the default")


def parse_mesh(text: str) -> dict[str, int]:
    """'data=2,fsdp=2' -> sizes of the axes named. Raises UserError on an unknown axis or a size below 1."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name.strip() not in MESH_AXES or not re.fullmatch(r"\s*[1-9][0-9]*\s*", size):
            raise UserError(f"--mesh takes axis=size pairs of {', '.join(MESH_AXES)}, given {part!r}; try --mesh data=2,fsdp=2")
        if name.strip() in sizes:
            raise UserError(f"--mesh names each axis once, given {text!r}; write one size for {name.strip()}")
        sizes[name.strip()] = int(size)
    return sizes


def parse_window(text: str) -> tuple[int, int]:
    """'20:23' -> (20, 23): the steps that are traced, the first is 1. Raises UserError otherwise."""
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile takes first:last steps, given {text!r}; try --profile 20:23")
    return first, last
