"""The 4-bit formats by name: how many elements share a scale, and how many bytes that comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How many elements of a matrix share a scale, and the bytes of that scale."""

    block: int
    """Elements along the contraction axis; of int4, the default."""
    across: int = 1
    """Elements along the other axis."""
    scale_bytes: int = 1


# NVFP4: NVIDIA 2025, arXiv:2509.25149, appendix B. MXFP4: OCP Microscaling Formats v1.0, sections 5.3 and 6.3.
FORMATS = {
    "int4": Format(128, scale_bytes=4),
    "nvfp4": Format(16),
    "nvfp4_2d": Format(16, across=16),
    "mxfp4": Format(32),
}


def block_shape(shape: tuple[int, ...], format: str, axis: int, block: int | None = None) -> tuple[int, ...]:
    """Elements that share a scale, axis by axis. Raises ValueError on an unknown format and on blocks that do not fit the shape."""
    if format not in FORMATS:
        raise ValueError(f"a 4-bit format is one of {', '.join(FORMATS)}, given {format!r}")
    known = FORMATS[format]
    if block not in (None, known.block) and (format != "int4" or block < 1):
        raise ValueError(f"{format} has blocks of {known.block}, given {block}; only int4 takes others, of one or more")
    if known.across > 1 and len(shape) != 2:
        raise ValueError(f"{format} has blocks of {known.block} x {known.across} and takes a matrix, given shape {shape}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"blocks lie along one of the axes of the array, given axis {axis} and shape {shape}")
    sizes = [known.across] * len(shape)
    sizes[axis] = block or known.block
    for at, (size, n) in enumerate(zip(shape, sizes, strict=True)):
        if size % n or not size:
            near = max(n, round(size / n) * n)
            raise ValueError(f"{format} has blocks of {n} along axis {at}, which do not divide shape {shape}; the nearest size is {near}")
    return tuple(sizes)


def stored_bytes_per_weight(format: str, block: int | None = None) -> float:
    """Of codes and block scales together, on disk, where a 16 x 16 block's scale is repeated for each of its columns."""
    known = FORMATS[format]
    return 0.5 + known.scale_bytes / (block or known.block)
