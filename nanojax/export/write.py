"""Master weights -> a folder of tensors, config and tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import save_file

from nanojax.config import ModelConfig
from nanojax.errors import StorageError, UserError
from nanojax.export import layout
from nanojax.export.folder import CONFIG, TOKENIZER, WEIGHTS
from nanojax.formats import FORMATS
from nanojax.ops.fp4 import QuantizedArray, pack
from nanojax.precision import Rounding, quantize_weights
from nanojax.tokenizer import Tokenizer, write_atomically


def tensors_of(params: dict[str, Array], model: ModelConfig, rounding: Rounding | None) -> dict[str, np.ndarray]:
    """Tensor name -> its bytes on disk, of fp32 parameters: what a 4-bit `rounding` covers is packed, the rest is bf16.

    Raises UserError on a parameter that is not finite in bf16. Empties `params`, so that their memory goes as that of the tensors comes.
    """
    known = layout.parameters(model)
    made = {}
    for group in blocks_of(params):
        weights = {name: params.pop(name) for name in group}
        plain = {name: in_bf16(name, w) for name, w in weights.items()}
        packed = packed_block(weights, rounding) if rounding else {}
        for name in group:
            for part, tensor in packed.get(name, {"weight": plain[name].T if known[name].linear else plain[name]}).items():
                made[f"{known[name].module}.{part}"] = np.ascontiguousarray(tensor)
    return made


def blocks_of(params: dict[str, Array]) -> list[list[str]]:
    """Names that belong together: those of one block, or one outside all blocks."""
    groups: dict[str, list[str]] = {}
    for name in params:
        groups.setdefault(".".join(name.split(".")[:2]) if name.startswith("blocks.") else name, []).append(name)
    return list(groups.values())


def in_bf16(name: str, w: Array) -> Array:
    """w in bf16. Raises UserError when it is not finite there."""
    rounded = w.astype(jnp.bfloat16)
    if bad := int(jnp.sum(~jnp.isfinite(rounded))):
        raise UserError(f"weights must be finite to be exported, and {name} has {bad} that are not; export an older checkpoint of the run")
    return rounded


def packed_block(weights: dict[str, Array], rounding: Rounding) -> dict[str, dict[str, Any]]:
    """Name -> part -> tensor, of those among one block's parameters that `rounding` covers."""
    covered = {name: weights[name] for name in rounding.names(weights)}
    # Under the names of block 0, so that all blocks share one compiled program.
    alias = {name: ".".join(["blocks", "0", *name.split(".")[2:]]) if name.startswith("blocks.") else name for name in covered}
    made = packed_parts({alias[name]: w for name, w in covered.items()}, dataclasses.replace(rounding, first=0, end=1))
    return {name: on_host(made[alias[name]], rounding.format, covered[name].shape) for name in covered}


@functools.partial(jax.jit, static_argnums=1)
def packed_parts(weights: dict[str, Array], rounding: Rounding) -> dict[str, dict[str, Array]]:
    """Name -> part -> tensor of [in, out] matrices, transposed to [out, in]."""
    return {name: laid_out(q) for name, q in quantize_weights(weights, rounding).items()}


def laid_out(q: QuantizedArray) -> dict[str, Array]:
    """Part -> tensor of one matrix: element 2i of a row is in the low four bits of byte i."""
    scales = q.scales.T
    if (across := FORMATS[q.format].across) > 1:
        scales = jnp.repeat(scales, across, axis=0)  # a tile's scale once for each of its outputs: ordinary NVFP4
    made = {"weight_packed": pack(q.codes.T), "weight_scale": scales}
    return made if q.global_scale is None else made | {"weight_global_scale": q.global_scale[None]}


def on_host(made: dict[str, Array], format: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The same as numpy arrays, int4 with four bytes to an I32 and its [out, in] beside it."""
    host = {part: np.asarray(tensor) for part, tensor in made.items()}
    if format == "int4":
        host["weight_packed"] = np.ascontiguousarray(host["weight_packed"]).view("<i4")
        host["weight_shape"] = np.array(shape[::-1], np.int64)
    return host


def write_export(out: Path, tensors: dict[str, np.ndarray], tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Write the folder's three files. config.json, which is `record` and the weights' hash, comes last: without it nothing is readable.

    Raises StorageError.
    """
    with replacing(out / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    tokenizer.save(out / TOKENIZER)
    whole = record | {"nanojax": record["nanojax"] | {"weights_sha256": digest}}
    write_atomically(out / CONFIG, json.dumps(whole, indent=2) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` if nothing fails. Raises StorageError when the disk does."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)  # the library makes files that nobody else may read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {path}: {reason}; free space there, or choose a folder that can be written") from error
    finally:
        temporary.unlink(missing_ok=True)
