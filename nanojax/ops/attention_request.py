"""What a run asks of its attention backend: shapes on one device, type, device."""

from __future__ import annotations

import dataclasses

from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Training attention as one device sees it: its rows B and, with tensor parallelism, its heads."""

    platform: str
    """Kind of the device: cpu, gpu."""
    capability: str | None = None
    """Lowest CUDA compute capability of the devices, '9.0'; None where there is none."""
    dtype: DTypeLike
    """Of queries, keys and values."""
    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = (None,)
    """Each that a layer has, in keys including the token itself; None: all."""
    documents: int | None = None
    """Most documents in a row, hidden from each other; None: a row is one."""
