"""Which settings of 4 and 8 bits go together, and fit the sizes of a model."""

from __future__ import annotations

import math
from typing import Any

from nanojax.checks import fitting_divisor, nearest_multiple, require_positive
from nanojax.errors import UserError
from nanojax.formats import FORMATS

FP8_MULTIPLE = 16  # of both sides of a matrix, and of the tokens: what cuBLAS takes


def check_four_bit(c: Any) -> None:
    """Of a TrainConfig: raise UserError on 4-bit settings that say nothing, or too much, for the precision they go with."""
    require_positive("fp4_skip_first", c.fp4_skip_first, zero=True)
    require_positive("fp4_skip_last", c.fp4_skip_last or 0, zero=True)
    if not 0 < c.fp4_until <= 1:
        raise UserError(f"fp4_until={c.fp4_until} must be above 0 and at most 1, the whole run; try 0.82")
    if c.fp4_recipe == "full" and c.precision not in ("auto", "nvfp4_2d"):
        raise UserError(f"fp4_recipe=full has weights in nvfp4_2d, given precision={c.precision}; drop --precision")
    four = f"a 4-bit precision, given {c.precision}; add --precision, one of {', '.join(FORMATS)}"
    for name, off, needed, have in (
        ("int4_group", FORMATS["int4"].block, f"precision=int4, given {c.precision}, whose blocks are fixed", c.precision == "int4"),
        ("fp4_head", False, four, c.four_bit),
        ("fp4_skip_first", 0, four, c.four_bit),
        ("fp4_skip_last", 0, four, c.four_bit),
        ("fp4_until", 1.0, four, c.four_bit),
    ):
        if (value := getattr(c, name)) not in (off, None) and not have:
            flag = name.replace("_", "-")
            raise UserError(f"{name}={value} needs {needed}, or write {f'--no-{flag}' if off is False else f'--{flag} {off}'}")


def check_blocks(model: Any, c: Any) -> None:
    """Of a ModelConfig and a TrainConfig: raise UserError where a format's blocks do not divide the matrices, or none is left."""
    first, last = c.fp4_skip_first, c.fp4_skip_last or 0
    if first + last >= model.depth and (first + last > model.depth or not c.fp4_head):
        raise UserError(f"fp4_skip_first={first} and fp4_skip_last={last} leave none of {model.depth} blocks in 4 bits; skip fewer")
    name, block = c.four_bit or "", c.fp4_block
    across = FORMATS[name].across
    heads = fitting_divisor(model.n_head, model.kv_heads, model.head_dim, across)
    for what, size, n, remedy in (
        ("d_model", model.width, block, f"--d-model {nearest_multiple(model.width, math.lcm(block, model.head_dim))}"),
        ("d_ffn", model.hidden, block, f"--d-ffn {nearest_multiple(model.hidden, block)}"),
        ("n_kv_head * head_dim", model.kv_heads * model.head_dim, across, f"--n-kv-head {heads}"),
        ("seq_len", model.seq_len, block if c.fp4_recipe == "full" else 1, f"--seq-len {nearest_multiple(model.seq_len, block)}"),
    ):
        if size % n:
            groups = [str(g) for g in (64, 128, 256) if name == "int4" and size % g == 0]
            also = f", or --int4-group {groups[-1]}" if groups else ""
            raise UserError(f"{what}={size} must be a multiple of the {n} that share a scale in {name}; the nearest is {remedy}{also}")


def require_precision(precision: str, request: Any, device: str) -> None:
    """Raise UserError where devices, as an attention's request tells of them, cannot train in this precision."""
    if precision.startswith("fp8") and (request.platform != "gpu" or float(request.capability or 9) < 9):
        raise UserError(
            f"precision={precision} is trained on NVIDIA GPUs of compute capability 9.0 or later, and the device is a {device}; "
            "choose --precision bf16"
        )


def check_fp8(model: Any, c: Any) -> None:
    """Of a ModelConfig and a TrainConfig in fp8: raise UserError on activations in fp32, and on sizes that 8-bit products lack."""
    if c.compute_dtype == "fp32":
        raise UserError(f"precision={c.precision} needs bf16 activations, given compute_dtype=fp32; drop one of the two")
    for what, size, remedy in (
        ("d_model", model.width, f"--d-model {nearest_multiple(model.width, math.lcm(FP8_MULTIPLE, model.head_dim))}"),
        ("d_ffn", model.hidden, f"--d-ffn {nearest_multiple(model.hidden, FP8_MULTIPLE)}"),
        ("n_kv_head * head_dim", model.kv_heads * model.head_dim, f"--head-dim {nearest_multiple(model.head_dim, FP8_MULTIPLE)}"),
        ("seq_len", model.seq_len, f"--seq-len {nearest_multiple(model.seq_len, FP8_MULTIPLE)}"),
    ):
        if size % FP8_MULTIPLE:
            raise UserError(f"{what}={size} must be a multiple of {FP8_MULTIPLE} in fp8; the nearest is {remedy}")
