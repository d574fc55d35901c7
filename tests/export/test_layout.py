"""Names and shapes on disk, against the model itself and against literals."""

from __future__ import annotations

import pytest

from nanojax.checks import LARGEST
from nanojax.config import Config, ModelConfig, TrainConfig, nanochat
from nanojax.errors import UserError
from nanojax.export.layout import Parameter, Tensor, parameters, parts, quantization_config, quantized_config


@pytest.mark.parametrize("changes", [{}, {"norm": "fixed", "ffn": "relu2"}, {"qk_norm": False}], ids=["modern", "nanochat", "no qk_norm"])
def test_the_table_holds_every_parameter_of_the_model_with_its_shape_and_no_other(tiny_model, tiny_config, changes):
    _, params = tiny_model(**changes)
    known = parameters(tiny_config(**changes))
    assert {name: parameter.shape for name, parameter in known.items()} == {name: w.shape for name, w in params.items()}
    assert len({parameter.module for parameter in known.values()}) == len(known), "two parameters would have one name on disk"


def test_names_are_those_of_qwen3():
    known = parameters(ModelConfig(depth=2, d_model=64, head_dim=16, n_kv_head=2, d_ffn=128, vocab_size=384))
    assert known["embedding"] == Parameter("model.embed_tokens", (384, 64), linear=False)
    assert known["head.w"] == Parameter("lm_head", (64, 384), linear=True)
    assert known["norm.gain"].module == "model.norm"
    assert known["blocks.1.attention.k.w"] == Parameter("model.layers.1.self_attn.k_proj", (64, 32), linear=True)
    assert known["blocks.1.ffn.down.w"] == Parameter("model.layers.1.mlp.down_proj", (128, 64), linear=True)
    assert known["blocks.0.norm_1.gain"] == Parameter("model.layers.0.input_layernorm", (64,), linear=False)
    assert known["blocks.0.norm_2.gain"].module == "model.layers.0.post_attention_layernorm"
    assert known["blocks.0.attention.q_norm.gain"] == Parameter("model.layers.0.self_attn.q_norm", (16,), linear=False)
    assert not any("gate" in name for name in parameters(nanochat(1)))


def test_parts_of_a_matrix_of_128_inputs_and_64_outputs():
    matrix = Parameter("p", (128, 64), linear=True)
    assert parts(matrix, None, None) == {"weight": Tensor("BF16", (64, 128))}
    assert parts(matrix, "int4", 64) == {
        "weight_packed": Tensor("I32", (64, 16)),
        "weight_scale": Tensor("F32", (64, 2)),
        "weight_shape": Tensor("I64", (2,)),
    }
    nvfp4 = {
        "weight_packed": Tensor("U8", (64, 64)),
        "weight_scale": Tensor("F8_E4M3", (64, 8)),
        "weight_global_scale": Tensor("F32", (1,)),
    }
    assert parts(matrix, "nvfp4", 16) == parts(matrix, "nvfp4_2d", 16) == nvfp4
    assert parts(matrix, "mxfp4", 32) == {"weight_packed": Tensor("U8", (64, 64)), "weight_scale": Tensor("U8", (64, 4))}
    assert parts(Parameter("e", (384, 64), linear=False), None, None) == {"weight": Tensor("BF16", (384, 64))}


@pytest.mark.parametrize(
    ("format", "block", "name", "weights"),
    [
        ("int4", 64, "pack-quantized", {"type": "int", "strategy": "group", "group_size": 64}),
        ("nvfp4", 16, "nvfp4-pack-quantized",
         {"type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}),
        ("nvfp4_2d", 16, "nvfp4-pack-quantized",
         {"type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}),
        ("mxfp4", 32, "mxfp4-pack-quantized", {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    ],
)  # fmt: skip
def test_the_quantization_config_is_that_of_compressed_tensors(format, block, name, weights):
    model = ModelConfig(depth=2, d_model=64, head_dim=16)
    packed = [our for our in parameters(model) if our.startswith("blocks.1.") and our.endswith(".w")]
    made = quantization_config(model, packed, format, block)
    assert made is not None
    assert (made["quant_method"], made["format"], made["quantization_status"]) == ("compressed-tensors", name, "compressed")
    group = made["config_groups"]["group_0"]
    assert (group["targets"], group["format"], group["input_activations"]) == (["Linear"], name, None)
    assert group["weights"] == {"num_bits": 4, "symmetric": True, "dynamic": False} | weights
    left = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert made["ignore"] == [
        *(f"model.layers.0.self_attn.{m}" for m in left),
        *(f"model.layers.0.mlp.{m}_proj" for m in ("gate", "up", "down")),
        "lm_head",
    ]
    assert "lm_head" not in quantization_config(model, [*packed, "head.w"], format, block)["ignore"]
    assert quantization_config(model, [], format, block) is None


def test_a_run_of_the_full_recipe_that_left_4_bits_may_be_packed_in_another_format():
    config = Config(model=ModelConfig(depth=4), train=TrainConfig(fp4_recipe="full", fp4_until=0.8, fp4_skip_last=1))
    train = quantized_config(config, "int4", None).train
    assert (train.precision, train.int4_group, train.fp4_until, train.fp4_recipe, train.fp4_skip_last) == ("int4", 128, 1.0, "weights", 1)


@pytest.mark.parametrize(("format", "group", "words"), [("int4", 128, "d_model=64"), ("int4", 100, "int4_group=100"), ("fp3", None, "fp3")])
def test_a_format_that_does_not_fit_the_model_is_refused_by_the_configs_own_check(format, group, words):
    config = Config(model=ModelConfig(depth=1, d_model=64, head_dim=16, seq_len=64), train=TrainConfig(seed=LARGEST - 1))
    with pytest.raises(UserError, match=words):
        quantized_config(config, format, group)
