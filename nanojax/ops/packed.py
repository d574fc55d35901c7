"""Matrices kept in 4 bits: eight codes a word, and bits and words in the order in which kernels read them.

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

CODES = 8  # in a word of 32 bits
LONGEST_SPAN = 32  # inputs
# Of E2M1, for the four codes of half a word: its lowest bit, and that of its sign. bfloat16 has its sign in bit 15 and the bits that E2M1's
# others become in 8 to 6: two codes need one shift to get there, or none, and two need one for the sign and one for the rest.
MAGNITUDES, SIGNS = (6, 3, 0, 9), (15, 12, 13, 14)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words_OW", "scales_OG", "global_scale"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A product's weights: half a byte each, and a scale for each block of inputs."""

    words_OW: Any
    """int32, as `for_kernels` makes them: the first words of all spans, the second words of all spans, and so on."""
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


def for_kernels(words_OW: Any, span: int, format: str) -> Any:
    """Words as an export has them, in the order of their inputs and with the j-th code in bits 4j to 4j + 3, as kernels read them."""
    words_OW = words_OW.reshape(len(words_OW), -1, span // CODES).swapaxes(1, 2).reshape(words_OW.shape)
    if format == "int4":
        return words_OW
    made = 0
    for j in range(CODES):
        code_OW, half, k = words_OW >> 4 * j & 15, 16 * (j // 4), j % 4
        made |= (code_OW & 7) << half + MAGNITUDES[k] | (code_OW >> 3) << half + SIGNS[k]
    return made


def codes(words: Any, format: str) -> list[Any]:
    """The codes, 0 to 15, of words as kernels read them."""
    if format == "int4":
        return [words >> 4 * j & 15 for j in range(CODES)]
    halves = [(16 * (j // 4), j % 4) for j in range(CODES)]
    return [words >> half + MAGNITUDES[k] & 7 | (words >> half + SIGNS[k] & 1) << 3 for half, k in halves]


def unpacked(w: PackedMatrix, dtype: DTypeLike) -> Float[Array, "I O"]:
    """The kernel [in, out] that a packed matrix stands for."""
    words_OW = w.words_OW.reshape(len(w.words_OW), w.span // CODES, -1).swapaxes(1, 2).reshape(w.words_OW.shape)  # as their inputs
    codes_OI = jnp.stack(codes(words_OW, w.format), axis=-1).astype(jnp.uint8).reshape(w.shape)
    scales_OG = w.scales_OG if w.global_scale is None else jax.lax.bitcast_convert_type(w.scales_OG, jnp.float8_e4m3fn)
    return dequantize(QuantizedArray(codes_OI.T, scales_OG.T, w.global_scale, w.format), dtype)


def stacked(matrices: list[PackedMatrix]) -> PackedMatrix:
    """One matrix with the outputs of all, which share format and global scale."""
    words_OW = jnp.concatenate([m.words_OW for m in matrices])
    scales_OG = jnp.concatenate([m.scales_OG for m in matrices])
    return dataclasses.replace(matrices[0], words_OW=words_OW, scales_OG=scales_OG)
