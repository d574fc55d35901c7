"""The bytes that are written, against a reading of them by numpy that shares nothing with the library."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exporting import FORMATS, read_tensors, runs  # noqa: F401  # fixture

from nanojax.errors import StorageError, UserError
from nanojax.export import layout
from nanojax.export.write import replacing, tensors_of, write_export
from nanojax.precision import Rounding

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
GROUP = {"int4_group": 64}


def train_of(format: str) -> dict:
    return {"precision": format} | (GROUP if format == "int4" else {})


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Codes [out, in]: of each byte the low four bits first, of an I32 its low byte first."""
    out = packed.shape[0]
    words = packed.astype(np.int64) & (2 ** (8 * packed.itemsize) - 1)
    return np.stack([words >> (4 * i) & 15 for i in range(2 * packed.itemsize)], axis=-1).reshape(out, -1)


def e4m3(byte: np.ndarray) -> np.ndarray:
    """Sign, four bits of exponent with bias 7, three of mantissa; exponent 0 is subnormal."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    assert (byte < 127).all()
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def naive(tensors: dict[str, np.ndarray], module: str, format: str) -> np.ndarray:
    """The weight [out, in] that the parts of a module stand for, in float64."""
    codes, scale = nibbles(tensors[f"{module}.weight_packed"]), tensors[f"{module}.weight_scale"]
    if format == "int4":
        assert tensors[f"{module}.weight_shape"].tolist() == list(codes.shape)
        values, scales = codes - 8.0, scale.astype(np.float64)
    elif format == "mxfp4":
        values, scales = E2M1[codes], 2.0 ** (scale.astype(np.float64) - 127)
    else:
        (encode,) = tensors[f"{module}.weight_global_scale"].astype(np.float64)
        values, scales = E2M1[codes], e4m3(scale.view(np.uint8).astype(np.int64)) / encode
    return values * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_stand_for_the_weights_of_training(runs, format):
    tensors = read_tensors(runs.export(**train_of(format)) / "model.safetensors")
    config, _ = runs.base.read()
    trained = runs.prepared(**train_of(format))
    for name, parameter in layout.parameters(config.model).items():
        if name.startswith("blocks.") and parameter.linear:
            want = trained[name].T
            # nvfp4 multiplies by a reciprocal in float32, two roundings of 2^-24 each; the others' products round once or never.
            np.testing.assert_allclose(naive(tensors, parameter.module, format), want, rtol=2.5 * 2**-24, err_msg=name)
        else:
            want = runs.params[name].astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(tensors[f"{parameter.module}.weight"], want.T if parameter.linear else want, err_msg=name)
    wanted = {
        f"{p.module}.{part}": (tensor.dtype, tensor.shape)
        for name, p in layout.parameters(config.model).items()
        for part, tensor in layout.parts(
            p, format if name.startswith("blocks.") and p.linear else None, 64 if format == "int4" else None
        ).items()
    }
    types = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8"}
    assert {name: (types[w.dtype.name], w.shape) for name, w in tensors.items()} == wanted


def test_bf16_is_every_weight_rounded_and_transposed(runs):
    tensors = read_tensors(runs.export("--format", "bf16") / "model.safetensors")
    config, _ = runs.base.read()
    known = layout.parameters(config.model)
    assert set(tensors) == {f"{parameter.module}.weight" for parameter in known.values()}
    for name, parameter in known.items():
        want = runs.params[name].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(tensors[f"{parameter.module}.weight"], want.T if parameter.linear else want, err_msg=name)


def test_matrices_that_servers_fuse_share_a_global_scale_and_not_their_block_scales(runs):
    tensors = read_tensors(runs.export(**train_of("nvfp4")) / "model.safetensors")
    for i in range(2):
        for members in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            modules = [f"model.layers.{i}.{member}" for member in members]
            shared = {float(tensors[f"{module}.weight_global_scale"][0]) for module in modules}
            ours = [f"blocks.{i}.{'attention' if 'attn' in m else 'ffn'}.{m.split('.')[1].removesuffix('_proj')}.w" for m in members]
            largest = max(np.abs(runs.params[name]).max() for name in ours)
            assert shared == {float(np.float32(2688) / largest)}  # 6 * 448
            scales = [tensors[f"{module}.weight_scale"].astype(np.float32) for module in modules]
            assert not np.array_equal(scales[0], scales[-1][: len(scales[0])])
            assert max(s.max() for s in scales) == 448  # the block of the largest weight
    alone = {float(tensors[f"model.layers.0.{m}.weight_global_scale"][0]) for m in ("self_attn.o_proj", "mlp.down_proj")}
    assert len(alone) == 2


def test_tiles_are_stored_as_blocks_that_repeat_their_scale(runs):
    scales = read_tensors(runs.export(**train_of("nvfp4_2d")) / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"]
    assert scales.shape == (128, 4)
    tiles = scales.view(np.uint8).reshape(8, 16, 4)
    assert (tiles == tiles[:, :1]).all()
    assert len(np.unique(tiles[:, 0])) > 4


def test_packed_weights_take_half_a_byte_and_their_scales(runs):
    def size(format: str) -> tuple[int, int, int]:
        tensors = read_tensors(runs.export(**train_of(format)) / "model.safetensors")
        packed = [name.removesuffix("_packed") for name in tensors if name.endswith("weight_packed")]
        bytes_of = sum(w.nbytes for name, w in tensors.items() if any(name.startswith(module) for module in packed))
        return bytes_of, sum(2 * tensors[f"{module}_packed"].nbytes for module in packed), len(packed)

    stored, weights, matrices = size("nvfp4")
    assert stored == 0.5625 * weights + 4 * matrices
    assert size("nvfp4_2d") == size("nvfp4")
    assert all(stored < 0.6 * weights for stored, weights, _ in map(size, FORMATS))


def test_the_head_is_packed_and_blocks_are_left_out_as_the_run_says(runs):
    train = {"precision": "mxfp4", "fp4_head": True, "fp4_skip_first": 1}
    out = runs.export(**train)
    tensors, trained = read_tensors(out / "model.safetensors"), runs.prepared(**train)
    np.testing.assert_array_equal(naive(tensors, "lm_head", "mxfp4"), trained["head.w"].T)
    assert "model.layers.1.mlp.up_proj.weight_packed" in tensors
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert len(ignored) == 7
    assert all(module.startswith("model.layers.0.") for module in ignored)


def test_weights_that_are_not_finite_are_refused_by_name_and_number(runs):
    config, _ = runs.base.read()
    for value in (np.nan, -np.inf, 3.4e38):  # the last is finite, and infinite in bf16
        params = {name: jnp.asarray(w) for name, w in runs.params.items()}
        params["blocks.1.ffn.up.w"] = params["blocks.1.ffn.up.w"].at[3, 5:7].set(value)
        with pytest.raises(UserError, match=r"finite to be exported, and blocks\.1\.ffn\.up\.w has 2 that are not"):
            tensors_of(params, config.model, Rounding("nvfp4"))


def test_weights_go_as_their_tensors_come(runs):
    config, _ = runs.base.read()
    params = {name: jnp.asarray(w) for name, w in runs.params.items()}
    tensors_of(params, config.model, None)
    assert params == {}


def test_an_export_that_is_cut_short_has_no_config(runs, tmp_path, monkeypatch):
    tokenizer = runs.base.tokenizer()
    monkeypatch.setattr(type(tokenizer), "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_export(tmp_path, {"x": np.zeros(3, np.float32)}, tokenizer, {"nanojax": {}})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_disk_that_fails_leaves_nothing_of_the_file(tmp_path):
    def write() -> None:
        with replacing(tmp_path / "model") as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*model: No space left"):
        write()
    assert list(tmp_path.iterdir()) == []
