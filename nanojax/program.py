"""A config made concrete on devices: mesh, attention, shardings, and the jitted functions that share them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from nanojax import mesh as meshes
from nanojax.config import Config, parse_mesh
from nanojax.errors import UserError
from nanojax.model import GPT, parameters, split
from nanojax.ops.attention import BACKENDS, resolve
from nanojax.optim import optimizer, schedule
from nanojax.sizes import micro_batch
from nanojax.step import TrainState, eval_step, microbatch_nats, prepare_weights, train_step

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
# XLA flags by platform, given to jax.jit, so that no environment variable can be forgotten.
COMPILER_OPTIONS: dict[str, dict[str, bool]] = {
    # cuBLAS beats XLA's Triton products at these shapes, and compiling takes half the time (scripts/bench/LOG.md).
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    "cpu": {},
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes with. Shardings are derived once and given to init, step, evaluation and restore."""

    config: Config
    mesh: Mesh
    attention: str
    precision: str
    facts: dict[str, str]
    """Lines for the header: devices, mesh, attention and why, precision, batch."""
    accumulation: int
    """Microbatches a step, A."""
    rows: int
    """Rows of a microbatch on all devices together, B."""
    shapes: TrainState
    """ShapeDtypeStructs."""
    shardings: TrainState
    """A TrainState of NamedShardings."""
    init: Callable[[Array], TrainState]
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]
    eval_step: Callable[[dict[str, Array], Any, Array], dict[str, Array]]
    graph: nnx.GraphDef
    """With `model.merge` and prepared weights, the model."""
    prepare: Callable[[dict[str, Array]], dict[str, Array]]

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def parameters(self) -> int:
        """Count of the parameters that are really there, embedding included."""
        return sum(x.size for x in self.shapes.params.values())


def keep_compiled_programs(cache: str) -> None:
    """Let jax store compiled programs below the cache folder, so that a second start skips compilation."""
    jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_program(config: Config, devices: list[jax.Device] | None = None) -> Program:
    """The program of a resolved config on all devices (or those given).

    Raises UserError when mesh, batch, attention or precision do not fit the devices; nothing is compiled or allocated yet.
    """
    mesh = meshes.make_mesh(parse_mesh(config.train.mesh), devices)
    meshes.check_divisible(config.model, mesh)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = micro_batch(config, replicas)
    accumulation = config.batch_tokens // (config.model.seq_len * rows * replicas)
    platform = mesh.devices.flat[0].platform
    compute, precision = formats(config, platform)
    dtype = DTYPES[compute]
    packed = config.data.mask_documents
    try:
        attention, why = resolve(config.train.attn_impl, platform=platform, dtype=dtype, head_dim=config.model.head_dim, packed=packed)
    except ValueError as error:
        raise UserError(str(error)) from error
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    facts = {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({platform})",
        "mesh": sizes,
        "attention": f"{attention} ({why})",
        "precision": f"activations {compute}, block matrices {precision}, master weights fp32",
        "batch": f"{accumulation} x {rows * replicas} rows ({rows} a device) of {config.model.seq_len} tokens",
    }

    def build(key: Array) -> GPT:
        return GPT(config.model, attention=BACKENDS[attention], key=key, compute_dtype=dtype, remat=config.train.remat)

    with nnx.use_eager_sharding(False):  # parameters get their shardings from the table below, all at once
        graph, _, axes = split(lambda: build(jax.random.key(0)))
    prepare = functools.partial(prepare_weights, precision=DTYPES[precision], dtype=dtype)
    head = dict(blocks=config.train.loss_blocks, packed=packed)
    options = COMPILER_OPTIONS.get(platform) or None
    tx = optimizer(
        config.optim,
        steps=config.steps,
        batch_tokens=config.batch_tokens,
        d_model=config.model.width,
        ns_dtype=dtype,
    )

    def init(key: Array) -> TrainState:
        key_init, key_run = jax.random.split(key)
        with nnx.use_eager_sharding(False):
            params = parameters(build(key_init))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(step=zero, skipped=zero, key=jax.random.key_data(key_run), params=params, moments=tx.init(params))

    shapes = jax.eval_shape(init, jax.random.key(0))
    by_name, one = meshes.parameter_shardings(axes, mesh), meshes.replicated(mesh)
    moments = meshes.moment_shardings(shapes.moments, by_name, mesh)
    shardings = TrainState(step=one, skipped=one, key=one, params=by_name, moments=moments)
    step = functools.partial(
        train_step,
        tx=tx,
        lr=schedule(config.optim, config.steps),
        prepare=prepare,
        loss=functools.partial(microbatch_nats, graph, **head),
        shardings=by_name,
    )
    batch = meshes.batch_sharding(mesh)
    return Program(
        config=config,
        mesh=mesh,
        attention=attention,
        precision=precision,
        facts=facts,
        accumulation=accumulation,
        rows=rows * replicas,
        shapes=shapes,
        shardings=shardings,
        graph=graph,
        prepare=prepare,
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            step, in_shardings=(shardings, batch), out_shardings=(shardings, one), donate_argnums=0, compiler_options=options
        ),
        eval_step=jax.jit(
            functools.partial(eval_step, graph, prepare=prepare, **head),
            in_shardings=(by_name, batch, one),
            out_shardings=one,
            compiler_options=options,
        ),
    )


def formats(config: Config, platform: str) -> tuple[str, str]:
    """(format of activations, format that block matrices are rounded to), as configured or by the device."""
    train = config.train
    compute = ("bf16" if platform == "gpu" else "fp32") if train.compute_dtype == "auto" else train.compute_dtype
    precision = compute if train.precision == "auto" else train.precision
    if (compute, precision) == ("bf16", "fp32"):
        raise UserError(f"precision=fp32 needs fp32 activations, and on a {platform} they are bf16; add --compute-dtype fp32")
    return compute, precision
