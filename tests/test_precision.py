"""What the products read: the grid of each format, what is left out, what shares a scale, and that it is so in a compiled step."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from typing import NamedTuple, get_args

import fp4_reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from quick import QUICK, XLA_FLAGS

from nanojax.config import Config, ModelConfig, Precision, TrainConfig
from nanojax.formats import FORMATS
from nanojax.ops.fp4 import dequantize
from nanojax.ops.xent import total_nats
from nanojax.optim import label
from nanojax.precision import Rounding, prepare_weights, quantize_weights
from nanojax.run_kind import USUAL
from nanojax.step import first_state, microbatch_nats, train_step

TOTAL = functools.partial(total_nats, blocks=2)
SIZES = dict(depth=3, d_model=64, n_kv_head=2, head_dim=16, d_ffn=128, seq_len=16, vocab_size=128)
ROUNDINGS = {
    "int4": Rounding("int4", 64),
    "nvfp4": Rounding("nvfp4"),
    "nvfp4_2d": Rounding("nvfp4_2d"),
    "mxfp4": Rounding("mxfp4"),
}


class Batch(NamedTuple):
    inputs: jax.Array
    targets: jax.Array
    segments: jax.Array


prepare = jax.jit(prepare_weights, static_argnames=("rounding", "dtype"))


@pytest.fixture(scope="module")
def one_block(tiny_model):
    return tiny_model(**SIZES | {"depth": 1})


@pytest.fixture(scope="module")
def model(tiny_model):
    graph, params = tiny_model(**SIZES)
    # One matrix of each fused group is much larger than the others, so that sharing a scale or not makes a difference.
    big = {"blocks.1.attention.v.w": 50.0, "blocks.1.ffn.gate.w": 50.0}
    return graph, {name: w * big.get(name, 1.0) for name, w in params.items()}


def expected(params: dict, rounding: Rounding) -> dict[str, np.ndarray]:
    """By the numpy reference, float32. A global scale comes from q, k and v together, and from gate and up."""
    found = {}
    for name, w in params.items():
        if not rounding.covers(name):
            continue
        kin = [name]
        for group in (("q", "k", "v"), ("gate", "up")):
            head, part, tail = name.rsplit(".", 2) if name.count(".") > 2 else ("", "", "")
            if part in group:
                kin = [f"{head}.{member}.{tail}" for member in group]
        amax = max(float(np.abs(params[n]).max()) for n in kin)
        q = fp4_reference.quantize(np.asarray(w), rounding.format, block=rounding.block, rule=rounding.rule, amax=amax)
        found[name] = q.values.astype(np.float32)
    return found


def test_the_formats_of_the_command_line_are_those_of_the_table():
    assert set(get_args(Precision)) == {"auto", "fp32", "bf16", "fp8", "fp8_head", *FORMATS}


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_block_matrices_are_on_the_grid_and_nothing_else_is(model, rounding):
    _, params = model
    ready = prepare(params, rounding=rounding, dtype=jnp.float32)
    want = expected(params, rounding)
    assert set(want) == {name for name, group in label(params).items() if group == "matrix"}
    for name, w in ready.items():
        np.testing.assert_array_equal(w, want.get(name, params[name]), err_msg=name)


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_codes_and_scales_stand_for_what_training_reads_and_fused_matrices_share_the_global_scale(model, rounding):
    _, params = model
    codes = jax.jit(functools.partial(quantize_weights, rounding=rounding))(params)
    ready = prepare(params, rounding=rounding, dtype=jnp.float32)
    stand_for = jax.jit(lambda codes, dtype: {name: dequantize(q, dtype) for name, q in codes.items()}, static_argnums=1)
    for dtype in (jnp.float32, jnp.bfloat16):
        for name, w in stand_for(codes, dtype).items():
            np.testing.assert_array_equal(w, ready[name].astype(dtype), err_msg=name)
    if not rounding.format.startswith("nvfp4"):
        return
    scale = {name: float(q.global_scale) for name, q in codes.items()}
    for fused in (("attention.q", "attention.k", "attention.v"), ("ffn.gate", "ffn.up")):
        assert len({scale[f"blocks.1.{member}.w"] for member in fused}) == 1
    assert len({scale[f"blocks.1.{alone}.w"] for alone in ("attention.q", "attention.o", "ffn.gate", "ffn.down")}) == 4
    assert scale["blocks.0.attention.q.w"] != scale["blocks.1.attention.q.w"]


def test_blocks_are_skipped_from_either_end_and_the_head_joins_when_asked(model):
    _, params = model
    config = Config(
        model=ModelConfig(**SIZES),
        train=TrainConfig(precision="nvfp4", fp4_skip_first=1, fp4_skip_last=1, fp4_head=True),
    )
    rounding = Rounding.of(config, "nvfp4")
    assert {name.split(".")[1] for name in rounding.names(params)} == {"1", "w"}
    ready = jax.jit(functools.partial(prepare_weights, rounding=rounding, dtype=jnp.float32))(params)
    want = expected(params, rounding)
    assert "head.w" in want
    for name, w in ready.items():
        np.testing.assert_array_equal(w, want.get(name, params[name]), err_msg=name)


def test_a_weight_that_is_not_finite_makes_the_loss_nan_and_the_step_is_skipped(model):
    graph, params = model
    bad = params | {"blocks.2.ffn.down.w": params["blocks.2.ffn.down.w"].at[3, 5].set(jnp.inf)}
    ready = jax.jit(functools.partial(prepare_weights, rounding=ROUNDINGS["nvfp4"], dtype=jnp.float32))(bad)
    assert not jnp.isfinite(ready["blocks.2.ffn.down.w"][3, 5])
    micro = Batch(*(x[0] for x in batch()))
    nats = jax.jit(functools.partial(microbatch_nats, graph, total=TOTAL, packed=False))
    assert jnp.isnan(nats(ready, micro, jax.random.key(0)))


def test_the_gradient_of_a_step_is_that_of_fake_quant(one_block):
    """The step rounds outside of its gradient and applies it to the master weights: the straight-through rule, once a step."""
    graph, params = one_block
    rounding = Rounding("nvfp4_2d")
    loss = functools.partial(microbatch_nats, graph, total=TOTAL, packed=False)
    micro, key = Batch(*(x[0] for x in batch())), jax.random.key(0)
    prepare = functools.partial(prepare_weights, rounding=rounding, dtype=jnp.float32)

    inside = jax.jit(jax.grad(lambda p: loss(prepare(p), micro, key)))(params)
    outside = read_gradients(loss, prepare, params, batch(), scale=16)
    for name, g in inside.items():
        np.testing.assert_allclose(outside[name], g, rtol=1e-5, atol=1e-5 * float(jnp.abs(g).max()), err_msg=name)  # fp32, fused apart


# Inside a compiled step ---------------------------------------------------------------------------------------------------------------


def batch() -> Batch:
    """[1, 1, 16], every target valid: 16 of them, so that the mean divides exactly."""
    tokens = np.random.default_rng(0).integers(0, 128, (1, 1, 17))
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens[..., :-1], tokens[..., 1:], np.ones((1, 1, 16)))))


def read_gradients(loss, prepare, params, batch, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The gradients that nanojax.step's train_step hands its optimizer, jitted as for a run, times `scale`."""
    platform = jax.default_backend()
    keep = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p=None: (s, g))
    start = first_state(params, keep.init(params), jax.random.key_data(jax.random.key(0)))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    shardings = {name: NamedSharding(mesh, PartitionSpec()) for name in params}
    step = functools.partial(
        train_step, tx=keep, lr=lambda _: 0.0, prepare=lambda params: (prepare(params), {}), loss=loss, shardings=shardings
    )
    state, _ = jax.jit(step, compiler_options=USUAL.options(platform) or None)(start, batch)
    return {name: np.asarray(g) * scale for name, g in state.moments.items()}


def read_weights(graph, params, prepare) -> dict[str, np.ndarray]:
    """What the products of a compiled training step read of each block matrix.

    Beside the model's loss, whose gradient is cut off, the step has a product of the identity with every weight w, and half the
    square of that product, whose gradient is w as it was read.
    """
    names = [name for name, group in label(params).items() if group == "matrix"]
    plain = functools.partial(microbatch_nats, graph, total=TOTAL, packed=False)

    def loss(weights, micro, key, rounds):
        real = plain(jax.lax.stop_gradient(weights), micro, key)
        read = [jnp.eye(weights[n].shape[0], dtype=weights[n].dtype) @ weights[n] for n in names]
        return real + sum(0.5 * jnp.sum(jnp.square(y.astype(jnp.float32))) for y in read)

    gradients = read_gradients(loss, prepare, params, batch(), scale=16)
    return {name: gradients[name] for name in names}


def cast_pairs(params: dict, dtype) -> dict:
    """4-bit weights as they must not be made: narrowed and widened again."""
    narrow = {name: w.astype(jnp.float4_e2m1fn).astype(dtype) if label(params)[name] == "matrix" else w for name, w in params.items()}
    return {name: w.astype(dtype) if label(params)[name] == "head" else w for name, w in narrow.items()}


def assert_on_the_grid(one_block, tiny_model, rounding: Rounding, dtype) -> None:
    _, params = one_block
    graph, _ = tiny_model(**SIZES | {"depth": 1}, compute_dtype=dtype)
    read = read_weights(graph, params, functools.partial(prepare_weights, rounding=rounding, dtype=dtype))
    for name, want in expected(params, rounding).items():
        np.testing.assert_array_equal(read[name], np.asarray(jnp.asarray(want).astype(dtype), np.float32), err_msg=name)
        assert (read[name] != np.asarray(params[name])).mean() > 0.5, name


def test_the_weights_that_reach_the_products_of_a_step_are_on_the_grid(one_block, tiny_model):
    assert_on_the_grid(one_block, tiny_model, ROUNDINGS["nvfp4"], jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_on_a_gpu_the_weights_that_reach_the_products_of_a_step_are_on_the_grid(one_block, tiny_model, rounding, dtype):
    with jax.default_matmul_precision("highest"):  # products by the identity must not round to TF32
        assert_on_the_grid(one_block, tiny_model, rounding, dtype)


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_rounding_reaches_the_products_of_a_float32_step(model):
    graph, params = model
    with jax.default_matmul_precision("highest"):
        read = read_weights(graph, params, functools.partial(prepare_weights, rounding=Rounding("bf16"), dtype=jnp.float32))
    for name, w in read.items():
        np.testing.assert_array_equal(w, np.asarray(np.asarray(params[name]).astype(jnp.bfloat16), np.float32), err_msg=name)


@pytest.mark.gpu
def test_on_a_gpu_a_cast_pair_is_deleted_and_this_file_would_notice(model):
    graph, params = model
    with jax.default_matmul_precision("highest"):
        read = read_weights(graph, params, functools.partial(cast_pairs, dtype=jnp.float32))
    assert all((w == np.asarray(params[name])).all() for name, w in read.items()), "XLA keeps cast pairs now: read fp4.py again"


# Beyond one device --------------------------------------------------------------------------------------------------------------------


def sharded_equals_whole() -> None:
    """Runs in a process of its own with 8 virtual devices."""
    from nanojax.mesh import make_mesh, parameter_shardings
    from nanojax.model import GPT, split
    from nanojax.ops.attention import reference_attention

    config = ModelConfig(depth=1, d_model=256, n_kv_head=2, head_dim=64, d_ffn=512, seq_len=16, vocab_size=128)
    with nnx.use_eager_sharding(False):
        _, shapes, axes = split(lambda: GPT(config, attention=reference_attention, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in sorted(shapes.items())}
    roundings = [*ROUNDINGS.values(), Rounding("int4", 256), Rounding("nvfp4", head=True)]

    def prepare(params):
        kept = {name: w for name, w in params.items() if re.search(r"(q|k|v|down|head)\.w", name)}
        return [prepare_weights(kept, rounding=rounding, dtype=jnp.bfloat16) for rounding in roundings]

    whole = jax.jit(prepare)(params)
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)):
        shardings = parameter_shardings(axes, make_mesh(sizes))
        placed = {name: jax.device_put(w, shardings[name]) for name, w in params.items()}
        assert len(placed["blocks.0.attention.q.w"].sharding.device_set) == 8
        for rounding, one, eight in zip(roundings, whole, jax.jit(prepare, in_shardings=(shardings,))(placed), strict=True):
            for name, w in eight.items():
                assert np.asarray(w).tobytes() == np.asarray(one[name]).tobytes(), (sizes, rounding, name)
    print("equal")


@pytest.mark.slow
def test_on_eight_devices_every_bit_is_that_of_one():
    env = os.environ | QUICK | {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"]


if __name__ == "__main__":
    sharded_equals_whole()
