"""What is read is what was trained, to the bit; and tensors that are not as they must be are refused before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exporting import FORMATS, altered, read_tensors, runs  # noqa: F401  # fixture
from generating import jitted_unpacked

from nanojax.errors import UserError
from nanojax.export.folder import WEIGHTS, open_export
from nanojax.export.layout import Parameter, Tensor
from nanojax.export.read import check_packed, mapped, read_parts, read_weights
from nanojax.ops.packed import PackedMatrix, for_kernels
from nanojax.program import make_program
from nanojax.sizes import resolve

GROUP = {"int4_group": 64}
UP = "model.layers.1.mlp.up_proj"


def train_of(format: str) -> dict:
    return {"precision": format} | (GROUP if format == "int4" else {})


def read(folder: Path, dtype=jnp.float32) -> dict[str, np.ndarray]:
    return {name: np.asarray(w) for name, w in read_any(folder, dtype).items()}


def read_any(folder: Path, dtype=jnp.float32, packed: bool = False) -> dict[str, Any]:
    """Where a program of one device wants them."""
    export = open_export(folder)
    config = resolve(export.config, export.config.model.vocab_size)
    shardings = make_program(config, jax.devices()[:1]).shardings.params
    return read_weights(export, read_parts(export), jnp.dtype(dtype), shardings, packed=packed)


def assert_equal(found: dict[str, np.ndarray], trained: dict[str, np.ndarray], packed: set[str]) -> None:
    """Bit for bit: packed weights as they were, the others as they are after rounding to bf16."""
    assert set(found) == set(trained)
    for name, want in trained.items():
        rounded = want if name in packed else want.astype(ml_dtypes.bfloat16).astype(want.dtype)
        assert found[name].dtype == want.dtype
        np.testing.assert_array_equal(found[name], rounded, err_msg=name)


@pytest.mark.parametrize(
    ("format", "dtype"), [*((format, jnp.float32) for format in (*FORMATS, "bf16")), ("nvfp4", jnp.bfloat16), ("bf16", jnp.bfloat16)]
)
def test_weights_are_those_of_training_to_the_bit(runs, format, dtype):
    found = read(runs.export(**train_of(format)), dtype)
    blocks = {name for name in found if name.startswith("blocks.") and name.endswith(".w")}
    assert_equal(found, runs.prepared(dtype, **train_of(format)), blocks if format != "bf16" else set())


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_that_stay_packed_are_the_bytes_of_the_file_and_stand_for_the_same(runs, format):
    folder = runs.export(**train_of(format))
    kept = read_any(folder, packed=True)
    for name, w in read(folder).items():
        if name.startswith("blocks.") and name.endswith(".w"):
            assert isinstance(kept[name], PackedMatrix)
            np.testing.assert_array_equal(jitted_unpacked(kept[name]), w)
        else:
            np.testing.assert_array_equal(kept[name], w)
    stored = read_tensors(folder / WEIGHTS)
    assert (
        kept["blocks.1.ffn.up.w"].words_OW.tobytes()
        == for_kernels(
            stored[f"{UP}.weight_packed"].view("<i4"), 16 if format.startswith("nvfp4") else 32, kept["blocks.1.ffn.up.w"].format
        ).tobytes()
    )
    assert kept["blocks.1.ffn.up.w"].scales_OG.tobytes() == stored[f"{UP}.weight_scale"].tobytes()


def test_a_scale_of_minus_zero_is_refused():
    scales = np.zeros((4, 2), ml_dtypes.float8_e4m3fn)
    where = Parameter("lm_head", (32, 4), linear=True)
    check_packed(Path("x"), where, {"weight_scale": scales}, "nvfp4")
    scales[1, 1] = -0.0
    with pytest.raises(UserError, match="scales must be finite and not negative, and lm_head has 1 that are not"):
        check_packed(Path("x"), where, {"weight_scale": scales}, "nvfp4")


def test_a_packed_head_and_blocks_that_were_left_out_too(runs):
    train = {"precision": "mxfp4", "fp4_head": True, "fp4_skip_first": 1}
    found = read(runs.export(**train))
    packed = {name for name in found if name == "head.w" or (name.startswith("blocks.1.") and name.endswith(".w"))}
    assert_equal(found, runs.prepared(**train), packed)


def test_a_run_in_bf16_that_is_packed_afterwards_has_mxfp4_by_the_rule_even(runs):
    found = read(runs.export("--format", "mxfp4", precision="bf16"))
    even, ceil = (runs.prepared(rule=rule, precision="mxfp4")["blocks.1.ffn.up.w"] for rule in ("even", "ceil"))
    np.testing.assert_array_equal(found["blocks.1.ffn.up.w"], even)
    assert (even != ceil).any()


def test_a_run_in_one_format_that_is_packed_in_another_leaves_out_what_it_left_out(runs):
    found = read(runs.export("--format", "int4", "--int4-group", "64", precision="nvfp4", fp4_skip_last=1))
    want = runs.prepared(precision="int4", int4_group=64, fp4_skip_last=1)
    assert_equal(found, want, {name for name in want if name.startswith("blocks.0.") and name.endswith(".w")})


def change(value, *at):
    """A tensor with one element changed, at 0 of each axis unless said."""

    def make(tensor: np.ndarray) -> np.ndarray:
        made = tensor.copy()
        made[at or (0,) * tensor.ndim] = value
        return made

    return make


BROKEN = {
    "missing": ("nvfp4", f"{UP}.weight_scale", lambda _: None, rf"must hold {UP}.weight_scale as F8_E4M3 \[128, 4\], and has none"),
    "type": ("nvfp4", f"{UP}.weight_packed", lambda t: t.view(np.int8), r"as U8 \[128, 32\], and has I8 \[128, 32\]"),
    "transposed": ("nvfp4", f"{UP}.weight_packed", lambda t: t.T, r"as U8 \[128, 32\], and has U8 \[32, 128\]"),
    "not packed": ("nvfp4", "lm_head.weight", lambda t: t.astype(np.float32), r"lm_head.weight as BF16 \[384, 64\], and has F32"),
    "scalar": ("nvfp4", f"{UP}.weight_global_scale", lambda t: t[0], r"as F32 \[1\], and has F32 \[\]"),
    "empty": ("nvfp4", "model.norm.weight", lambda t: t[:0], r"model.norm.weight as BF16 \[64\], and has BF16 \[0\]"),
    "scale NaN": ("nvfp4", f"{UP}.weight_scale", change(np.nan), rf"scales must be finite and not negative, and {UP} has 1"),
    "scale negative": ("nvfp4", f"{UP}.weight_scale", change(-1), "scales must be finite and not negative"),
    "scale inf": ("int4", f"{UP}.weight_scale", change(np.inf), "scales must be finite and not negative"),
    "exponent NaN": ("mxfp4", f"{UP}.weight_scale", change(255), "scales must be finite and not negative"),
    "exponent huge": ("mxfp4", f"{UP}.weight_scale", change(254, slice(None)), rf"weights must be finite, and {UP} has [0-9]+"),
    "shape": ("int4", f"{UP}.weight_shape", change(64), rf"{UP}.weight_shape must be \[128, 64\], given \[64, 64\]"),
    "code 0": ("int4", f"{UP}.weight_packed", change(0x10101010), rf"int4 codes must be 1 to 15, and {UP} has 4 that are 0"),
    "global 0": ("nvfp4", f"{UP}.weight_global_scale", change(0), "must be finite and above 0, given 0.0"),
    "global NaN": ("nvfp4", f"{UP}.weight_global_scale", change(np.nan), "must be finite and above 0, given nan"),
    "global alone": ("nvfp4", f"{UP}.weight_global_scale", lambda t: t * 2, "the same weight_global_scale, given .*gate_proj"),
    "weight NaN": ("nvfp4", "model.embed_tokens.weight", change(np.nan), "weights must be finite, and model.embed_tokens has 1"),
    "strange": ("nvfp4", "strange\n", lambda _: np.zeros(3, np.float32), r"holds 'strange\\n', which this model has not"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_tensor_that_is_not_as_it_must_be_is_refused_by_name(runs, tmp_path, name):
    format, tensor, how, words = BROKEN[name]
    whole = runs.export(**train_of(format))
    old = read_tensors(whole / "model.safetensors").get(tensor)
    broken = altered(whole, tmp_path / "broken", {tensor: how(old)})
    with pytest.raises(UserError, match=words) as error:
        read(broken)
    assert "\n" not in str(error.value)
    assert str(broken / "model.safetensors") in str(error.value)


def test_a_config_of_a_larger_model_is_refused_by_the_first_tensor_that_is_not_there(runs, tmp_path):
    """Before any is made of the size that it claims."""
    config = runs.run(precision="nvfp4").read()[0].to_dict()
    config["model"] |= {"vocab_size": 2**31 - 1}
    with pytest.raises(UserError, match=r"must hold model.embed_tokens.weight as BF16 \[2147483647, 64\], and has BF16 \[384, 64\]"):
        read_parts(open_export(altered(runs.export(precision="nvfp4"), tmp_path / "rows", config=config)))
    config["model"] |= {"vocab_size": 384, "depth": 1024}
    with pytest.raises(UserError, match=r"must hold model.layers.2.self_attn.q_proj.weight_packed as U8 \[64, 32\], and has none"):
        read_parts(open_export(altered(runs.export(precision="nvfp4"), tmp_path / "deep", config=config)))


def test_a_quantization_config_that_says_something_else_is_refused(runs, tmp_path):
    """Servers would go by it."""
    broken = altered(runs.export(precision="nvfp4"), tmp_path / "broken")
    record = json.loads((broken / "config.json").read_text())
    record["quantization_config"]["ignore"] = []
    (broken / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="has another quantization_config than its format nvfp4 needs"):
        read(broken)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"{}" + b"more"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(UserError, match=r"m is no safetensors file \("):
        mapped(tmp_path / "m", {"x": Tensor("F32", (1,))})
