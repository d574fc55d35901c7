"""What an export's tensors are called, and what they are: Hugging Face's names for Qwen3, compressed-tensors' bytes for 4 bits.

Letters: D model, F feed-forward, Q all query heads, K all key and value heads, H one head, V vocabulary. On disk matrices are
[out, in], the transpose of our kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nanojax.config import Config, ModelConfig
from nanojax.formats import FORMATS

# Our name inside a block -> (theirs, in, out).
LINEARS = {
    "attention.q": ("self_attn.q_proj", "D", "Q"),
    "attention.k": ("self_attn.k_proj", "D", "K"),
    "attention.v": ("self_attn.v_proj", "D", "K"),
    "attention.o": ("self_attn.o_proj", "Q", "D"),
    "ffn.gate": ("mlp.gate_proj", "D", "F"),
    "ffn.up": ("mlp.up_proj", "D", "F"),
    "ffn.down": ("mlp.down_proj", "F", "D"),
}
# Our name inside a block -> (theirs, size).
GAINS = {
    "norm_1": ("input_layernorm", "D"),
    "norm_2": ("post_attention_layernorm", "D"),
    "attention.q_norm": ("self_attn.q_norm", "H"),
    "attention.k_norm": ("self_attn.k_norm", "H"),
}
SCALE_TYPES = {"int4": "F32", "nvfp4": "F8_E4M3", "nvfp4_2d": "F8_E4M3", "mxfp4": "U8"}


@dataclass(frozen=True)
class Parameter:
    """Where a parameter is on disk, and what it is in the model."""

    module: str
    """Its tensors are called this, a dot, and their part: weight, weight_packed, ..."""
    shape: tuple[int, ...]
    """As in the model: a kernel is [in, out]."""
    linear: bool
    """Whether it is transposed on disk, and may be in 4 bits."""


@dataclass(frozen=True)
class Tensor:
    """Type, by safetensors' name for it, and shape, on disk."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def parameters(model: ModelConfig) -> dict[str, Parameter]:
    """Our name -> Parameter, of every parameter that a model of that config has."""
    sizes = {"D": model.width, "F": model.hidden, "H": model.head_dim, "V": model.vocab_size}
    sizes |= {"Q": model.n_head * model.head_dim, "K": model.kv_heads * model.head_dim}
    found = {"embedding": Parameter("model.embed_tokens", (sizes["V"], sizes["D"]), linear=False)}
    for i in range(model.depth):
        for name, (module, n_in, n_out) in LINEARS.items():
            if name != "ffn.gate" or model.ffn == "swiglu":
                found[f"blocks.{i}.{name}.w"] = Parameter(f"model.layers.{i}.{module}", (sizes[n_in], sizes[n_out]), linear=True)
        for name, (module, size) in GAINS.items():
            if model.norm == "learnable" and (size == "D" or model.qk_norm):
                found[f"blocks.{i}.{name}.gain"] = Parameter(f"model.layers.{i}.{module}", (sizes[size],), linear=False)
    if model.norm == "learnable":
        found["norm.gain"] = Parameter("model.norm", (sizes["D"],), linear=False)
    return found | {"head.w": Parameter("lm_head", (sizes["D"], sizes["V"]), linear=True)}


def parts(parameter: Parameter, format: str | None, block: int | None) -> dict[str, Tensor]:
    """Part -> Tensor of one parameter: `format` is its 4-bit format, with `block` inputs to a scale, or None."""
    if format is None:
        return {"weight": Tensor("BF16", parameter.shape[::-1] if parameter.linear else parameter.shape)}
    n_in, n_out = parameter.shape
    packed = Tensor("I32", (n_out, n_in // 8)) if format == "int4" else Tensor("U8", (n_out, n_in // 2))
    made = {"weight_packed": packed, "weight_scale": Tensor(SCALE_TYPES[format], (n_out, n_in // (block or FORMATS[format].block)))}
    if format == "int4":
        made["weight_shape"] = Tensor("I64", (2,))
    if format.startswith("nvfp4"):
        made["weight_global_scale"] = Tensor("F32", (1,))  # no dimension at all is refused by transformers
    return made


def quantization_config(model: ModelConfig, quantized: Collection[str], format: str, block: int | None) -> dict[str, Any] | None:
    """What tells compressed-tensors, and so vLLM and transformers, which modules are packed, and how; None where none is."""
    if not quantized:
        return None
    weights: dict[str, Any] = {"num_bits": 4, "symmetric": True, "dynamic": False, "group_size": block or FORMATS[format].block}
    if format == "int4":
        name, rest = "pack-quantized", {"type": "int", "strategy": "group"}
    elif format == "mxfp4":
        name, rest = "mxfp4-pack-quantized", {"type": "float", "strategy": "group", "scale_dtype": "torch.uint8"}
    else:
        name, rest = "nvfp4-pack-quantized", {"type": "float", "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    group = {"targets": ["Linear"], "format": name, "input_activations": None, "output_activations": None, "weights": weights | rest}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [p.module for our, p in parameters(model).items() if p.linear and our not in quantized],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
    }


def quantized_config(config: Config, format: str, int4_group: int | None) -> Config:
    """The run's config as if it had been trained in that 4-bit format throughout, the parts that it leaves out included.

    Raises UserError where the format's blocks do not divide a matrix, or its settings do not fit it.
    """
    train = dataclasses.replace(
        config.train,
        precision=format,  # pyright: ignore[reportArgumentType]  # checked by the class
        int4_group=FORMATS["int4"].block if int4_group is None else int4_group,  # pyright: ignore[reportArgumentType]  # likewise
        fp4_until=1.0,
        fp4_recipe="weights",
    )
    return dataclasses.replace(config, train=train)
