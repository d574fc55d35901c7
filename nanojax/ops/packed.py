"""Matrices kept in 4 bits: eight codes a word, and words in the order in which kernels read them.

O outputs, I inputs, W = I / 8 words, G = I / block scales of a row. Inputs come in spans, which have one scale, or share it with others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.fp4 import QuantizedArray, dequantize

CODES = 8  # in a word of 32 bits, the j-th in bits 4j to 4j + 3
LONGEST_SPAN = 32  # inputs


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words_OW", "scales_OG", "global_scale"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A product's weights: half a byte each, and a scale for each block of inputs."""

    words_OW: Any
    """int32: the first words of all spans, the second words of all spans, and so on (`by_place`)."""
    scales_OG: Any
    """float32 (int4), or the bytes, uint8, of E4M3 (nvfp4) and E8M0 (mxfp4) numbers."""
    global_scale: Any
    """float32 scalar that nvfp4's values are divided by; None of the other formats."""
    format: str

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.words_OW.shape[0], CODES * self.words_OW.shape[1]

    @property
    def span(self) -> int:
        """Inputs of a span."""
        return span(self.shape[1], self.scales_OG.shape[1])

    @property
    def nbytes(self) -> int:
        """Of codes and scales together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def span(inputs: int, scales: int) -> int:
    """Inputs of a span of a matrix that has so many scales a row."""
    return min(inputs // scales, LONGEST_SPAN)


def by_place(words_OW: Any, span: int) -> Any:
    """Words in the order of their inputs, as an export has them -> all first words of spans, then all second ones, and so on."""
    return words_OW.reshape(len(words_OW), -1, span // CODES).swapaxes(1, 2).reshape(words_OW.shape)


def unpacked(w: PackedMatrix, dtype: DTypeLike) -> Float[Array, "I O"]:
    """The kernel [in, out] that a packed matrix stands for."""
    shifts = 4 * jnp.arange(CODES)[None, None, :]
    words_OW = w.words_OW.reshape(len(w.words_OW), w.span // CODES, -1).swapaxes(1, 2).reshape(w.words_OW.shape)  # as their inputs
    codes_OI = ((words_OW[:, :, None] >> shifts) & 15).astype(jnp.uint8).reshape(w.shape)
    scales_OG = w.scales_OG if w.global_scale is None else jax.lax.bitcast_convert_type(w.scales_OG, jnp.float8_e4m3fn)
    return dequantize(QuantizedArray(codes_OI.T, scales_OG.T, w.global_scale, w.format), dtype)


def stacked(matrices: list[PackedMatrix]) -> PackedMatrix:
    """One matrix with the outputs of all, which share format and global scale."""
    words_OW = jnp.concatenate([m.words_OW for m in matrices])
    scales_OG = jnp.concatenate([m.scales_OG for m in matrices])
    return dataclasses.replace(matrices[0], words_OW=words_OW, scales_OG=scales_OG)
