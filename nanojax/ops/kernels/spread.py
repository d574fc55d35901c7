"""How kernels, which no partitioner understands, are called on every device with its own part of the arrays.

B batch, T tokens, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Spread = Callable[[Callable, Any, Any], Callable]
"""(f, ins, outs) -> f on every device with its own parts. `ins` has the logical axes of each argument, an array or a tree of arrays that
are cut alike, `outs` those of the one result or, in a list, of each; axes left out at the end are whole, and () is whole everywhere.
"""
ROWS = ("batch", "tokens")  # [B, T, ...]
HEADS = (*ROWS, "heads")
TABLE = ("tokens",)  # [T, H], of the rotation
PARTS = ("rows",)  # of a sum over B and T, as many on each device


def alone(f: Callable, ins: Any, outs: Any) -> Callable:
    """The Spread of one device."""
    del ins, outs
    return f
