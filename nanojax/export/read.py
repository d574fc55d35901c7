"""The tensors of an export, checked and dequantised: the weights that products read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array
from safetensors import SafetensorError, safe_open

from nanojax.errors import UserError
from nanojax.export import layout
from nanojax.export.folder import CONFIG, REMEDY, WEIGHTS, Export
from nanojax.export.layout import Parameter, Tensor
from nanojax.files import printable
from nanojax.mesh import replicated
from nanojax.ops.fp4 import FP32_MIN_NORMAL, QuantizedArray, dequantize, unpack
from nanojax.ops.packed import CODES, PackedMatrix, for_kernels, span
from nanojax.precision import Rounding, siblings

DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
E8M0_NAN = 255
LARGEST_HEADER = 2**23  # bytes of JSON; that of a hundred blocks has 2**18
Parts = dict[str, np.ndarray]
"""Part -> tensor of one parameter."""


def read_parts(export: Export) -> dict[str, Parts]:
    """Name of parameter -> its tensors, mapped from the file; nothing of the sizes that config.json claims is made before they are found.

    Raises UserError on a tensor whose name, type or shape is not as it must be, and on packed ones that no quantiser makes.
    """
    path, model = export.path / WEIGHTS, export.config.model
    known, rounding = layout.parameters(model), rounding_of(export)
    packed = set(rounding.names(known))
    if export.quantization_config != layout.quantization_config(model, packed, export.format, rounding.block):
        raise UserError(f"{export.path / CONFIG} has another quantization_config than its format {export.format} needs; {REMEDY}")
    wanted = {name: layout.parts(p, export.format if name in packed else None, rounding.block) for name, p in known.items()}
    stored = mapped(path, {f"{known[name].module}.{part}": tensor for name, parts in wanted.items() for part, tensor in parts.items()})
    found = {name: {part: stored[f"{known[name].module}.{part}"] for part in wanted[name]} for name in known}
    for name in filter(packed.__contains__, known):
        check_packed(path, known[name], found[name], export.format)
        check_shared(path, {known[other].module: found[other] for other in siblings(name, packed)})
    return found


def read_weights(
    export: Export, parts: dict[str, Parts], dtype: jnp.dtype, shardings: Mapping[str, NamedSharding], *, packed: bool = False
) -> dict[str, Any]:
    """Name -> weight, as `precision.prepare_weights` has it: matrices and head in `dtype`, embedding and gains in fp32.

    `parts` are those of `read_parts`. `packed`: matrices in 4 bits stay so, as ops.packed.PackedMatrix, whole on every device. Raises
    UserError on a weight that is not finite.
    """
    known, made = layout.parameters(export.config.model), {}
    for name, sharding in shardings.items():
        w = weight(parts[name], known[name].linear, export.format, dtype)
        if bad := int(jnp.sum(~jnp.isfinite(w))):
            raise UserError(f"{export.path / WEIGHTS}: weights must be finite, and {known[name].module} has {bad} that are not; {REMEDY}")
        if packed and "weight_packed" in parts[name]:
            made[name] = jax.device_put(packed_matrix(parts[name], export.format), replicated(sharding.mesh))
        else:
            made[name] = jax.device_put(w, sharding)
    return made


def rounding_of(export: Export) -> Rounding:
    """Which weights are packed, and in what blocks."""
    if export.format == "bf16":
        return Rounding("bf16", end=0)
    return Rounding.of(layout.quantized_config(export.config, export.format, export.int4_group), export.format)


def mapped(path: Path, expected: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensor name -> read-only view of the file. Raises UserError on the first tensor that is not there as expected, or not expected."""
    try:
        with open(path, "rb") as file:
            if (header := int.from_bytes(file.read(8), "little")) > LARGEST_HEADER:
                raise SafetensorError(f"a header of {header:,} bytes, and at most {LARGEST_HEADER:,} are read")
        # Its own numpy arrays know no E4M3; but it checks that tensors follow one another to the end of the file without a gap.
        with safe_open(path, framework="numpy") as file:
            order = file.offset_keys()
            found = {name: Tensor(s.get_dtype(), tuple(s.get_shape())) for name in order for s in [file.get_slice(name)]}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({printable(str(error))}); {REMEDY}") from error
    for name, tensor in expected.items():
        if found.get(name) != tensor:
            raise UserError(f"{path} must hold {name} as {tensor}, and has {found.get(name, 'none')}; {REMEDY}")
    if strange := sorted(set(found) - set(expected)):
        raise UserError(f"{path} holds {strange[0]!r:.80}, which this model has not; {REMEDY}")
    sizes = {name: DTYPES[t.dtype].itemsize * int(np.prod(t.shape, dtype=np.int64)) for name, t in expected.items()}
    content = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    at = len(content) - sum(sizes.values())
    views = {}
    for name in order:
        views[name] = content[at : at + sizes[name]].view(DTYPES[expected[name].dtype]).reshape(expected[name].shape)
        at += sizes[name]
    return views


def check_packed(path: Path, parameter: Parameter, parts: Parts, format: str) -> None:
    """Raise UserError where a packed matrix has scales that are no numbers or negative, codes that int4 has not, or another shape."""
    scales = parts["weight_scale"]
    floats = scales.astype(np.float32)
    # Nor -0: the kernels would read its sign bit as part of the number.
    bad = scales == E8M0_NAN if format == "mxfp4" else np.signbit(floats) | ~np.isfinite(floats)
    if bad.any():
        raise UserError(f"{path}: scales must be finite and not negative, and {parameter.module} has {bad.sum()} that are not; {REMEDY}")
    if format != "int4":
        return
    if (shape := parts["weight_shape"].tolist()) != list(parameter.shape[::-1]):
        raise UserError(f"{path}: {parameter.module}.weight_shape must be {list(parameter.shape[::-1])}, given {shape}; {REMEDY}")
    codes = codes_of(parts)
    if zeros := int(np.sum(codes & 15 == 0) + np.sum(codes >> 4 == 0)):
        raise UserError(f"{path}: int4 codes must be 1 to 15, and {parameter.module} has {zeros} that are 0; {REMEDY}")


def check_shared(path: Path, fused: dict[str, Parts]) -> None:
    """Raise UserError unless matrices that servers fuse, by module, have one global scale, and that a positive number, if any."""
    scales = {module: float(parts["weight_global_scale"][0]) for module, parts in fused.items() if "weight_global_scale" in parts}
    for module, scale in scales.items():
        if not FP32_MIN_NORMAL <= scale < np.inf:
            raise UserError(f"{path}: {module}.weight_global_scale must be finite and above 0, given {scale}; {REMEDY}")
    if len(set(scales.values())) > 1:
        words = ", ".join(f"{module} {scale}" for module, scale in scales.items())
        raise UserError(f"{path}: these must have the same weight_global_scale, given {words}; {REMEDY}")


def codes_of(parts: Parts) -> np.ndarray:
    """uint8 [out, in / 2], whichever type the bytes are stored as."""
    return parts["weight_packed"].view(np.uint8)


def weight(parts: Parts, linear: bool, format: str, dtype: jnp.dtype) -> Array:
    """One weight as in the model."""
    if "weight" in parts:
        return plain(parts["weight"], linear, dtype if linear else jnp.dtype(jnp.float32))
    return unpacked(codes_of(parts), parts["weight_scale"], parts.get("weight_global_scale"), format, dtype)


def packed_matrix(parts: Parts, format: str) -> PackedMatrix:
    """A matrix with the codes and scales that are stored, on the host."""
    scales = parts["weight_scale"]
    scales = scales if format == "int4" else scales.view(np.uint8)
    global_scale = parts["weight_global_scale"][0] if "weight_global_scale" in parts else None
    words = codes_of(parts).view("<i4")
    return PackedMatrix(for_kernels(words, span(CODES * words.shape[1], scales.shape[1]), format), scales, global_scale, format)


@functools.partial(jax.jit, static_argnums=(1, 2))
def plain(w: Array, transpose: bool, dtype: jnp.dtype) -> Array:
    """A bf16 tensor in `dtype`."""
    return (w.T if transpose else w).astype(dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def unpacked(packed: Array, scales: Array, global_scale: Array | None, format: str, dtype: jnp.dtype) -> Array:
    """[in, out] in `dtype`, of bytes [out, in / 2], scales [out, in / block] and a global scale [1]."""
    # Tiles of 16 x 16 are stored as blocks of 16, each with its own copy of the scale.
    q = QuantizedArray(unpack(packed).T, scales.T, None if global_scale is None else global_scale[0], format)
    return dequantize(q, dtype)
