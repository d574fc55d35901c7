"""A config made concrete on devices: mesh, attention, shardings, and the jitted functions that share them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from nanojax import mesh as meshes
from nanojax import vocabulary
from nanojax.checks import parse_mesh
from nanojax.config import Config
from nanojax.data.shards import storing
from nanojax.errors import UserError
from nanojax.model import GPT, parameters, split
from nanojax.narrow import require_precision
from nanojax.ops import elementwise
from nanojax.ops.attention import KERNELS, AttentionFn, compiled_kernels, make_attention, resolve
from nanojax.ops.attention_check import self_test
from nanojax.ops.attention_context import key_heads
from nanojax.ops.attention_request import Request
from nanojax.ops.attention_te import require_deterministic
from nanojax.ops.dot import dot
from nanojax.ops.fp4_dot import full_recipe_dot
from nanojax.ops.fp8_dot import Round, fp8_dot, fp8_head, fp8_products
from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
from nanojax.ops.kernels.spread import Spread, alone
from nanojax.ops.kernels.swiglu_down import serves
from nanojax.ops.products import PLAIN_PRODUCTS, Products
from nanojax.ops.xent import PLAIN_HEAD, total_nats
from nanojax.optim import Axes, optimizer, schedule
from nanojax.precision import Rounding, prepare_step, prepare_weights
from nanojax.run_kind import USUAL, RunKind
from nanojax.sizes import micro_batch
from nanojax.step import TrainState, eval_step, first_state, microbatch_nats, train_step

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Site:
    """What a config comes to on the devices there are."""

    config: Config
    mesh: Mesh
    attention: str
    why: str
    """Why this backend, and why not the faster ones."""
    request: Request
    """What it is asked for."""
    no_kernels: str | None
    """Why elementwise work is XLA's, or None where it is that of kernels."""
    compute: str
    """Format of the activations."""
    precision: str
    """Format that the matrices of the blocks are rounded to, up to config.train.fp4_until."""
    rows: int
    """Rows of a microbatch on all devices together, B."""
    accumulation: int
    """Microbatches a step, A."""

    @property
    def platform(self) -> str:
        """Kind of the devices: cpu, gpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def rounding(self) -> Rounding:
        """The format, and the weights that are in it."""
        return Rounding.of(self.config, self.precision)

    @property
    def kernels(self) -> list[str]:
        """What has kernels where any are used. SwiGLU's follows one product of gates and ups; it and the loss take whole matrices."""
        model, whole = self.config.model, self.mesh.shape["tensor"] == 1
        tokens = self.request.rows * model.seq_len // self.mesh.shape["context"]  # of a device
        swiglu = model.ffn == "swiglu" and products_of(self) is not None and whole
        within = self.hopper and self.precision != "fp8" and serves(tokens, model.width, model.hidden)
        name = "SwiGLU (backward in a product)" if within else "SwiGLU"
        known = {"norms": True, "rotation": model.qk_norm, name: swiglu, "loss": whole}
        return [name for name, there in known.items() if there]

    @property
    def hopper(self) -> int | None:
        """The devices that rows and tokens are cut over, where they are GPUs of compute capability 9.0, as all are that are only compiled
        for; else None.
        """
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.mesh.shape["context"]
        return parts if self.request.platform in ("gpu", "cuda") and self.request.capability in (None, "9.0") else None

    @property
    def facts(self) -> dict[str, str]:
        """Lines for the header."""
        return {
            "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind} ({self.platform})",
            "mesh": ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items()),
            "attention": f"{self.attention} ({self.why})",
            "elementwise": f"XLA: {self.no_kernels}" if self.no_kernels else f"kernels: {', '.join(self.kernels)}; else XLA",
            "precision": f"activations {self.compute}, block matrices {self.rounding.describe(self.config)}, master weights fp32",
            "batch": f"{self.accumulation} x {self.rows} rows of {self.config.model.seq_len} tokens",
        }

    def require_trainable(self) -> None:
        """Raise UserError on devices that the precision cannot be trained on."""
        require_precision(self.precision, self.request, self.mesh.devices.flat[0].device_kind)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run in one precision."""

    precision: str
    prepare: Callable[[dict[str, Array]], dict[str, Array]]
    """Master weights -> those that products read."""
    train_step: jax.stages.Wrapped
    """jitted (TrainState, batch) -> (TrainState, metrics); where faults are on, factors come third (run_kind.py)."""


@dataclasses.dataclass(frozen=True)
class Program(Site):
    """What a run computes with. Shardings are derived once and given to init, step, evaluation and restore."""

    run: RunKind
    shapes: TrainState
    """ShapeDtypeStructs."""
    shardings: TrainState
    init: Callable[[Array], TrainState]
    phases: tuple[Phase, ...]
    """One, or two where the run leaves 4 bits before its end."""
    eval_step: Callable[[dict[str, Array], Any, Array], dict[str, Array]]
    """Of weights that a phase prepared."""
    graph: nnx.GraphDef
    """With `model.merge` and prepared weights, the model."""

    def phase(self, step: int) -> Phase:
        """The phase that step number `step` runs in, and that the model it leaves is evaluated in; 0 is before the first."""
        return self.phases[-1 if step > round(self.config.train.fp4_until * self.config.steps) else 0]

    def self_test(self) -> str:
        """How near to the reference the attention is on this device, in words. Raises UserError, naming it, where it is wrong or fails."""
        with attention_told():
            return f"attention: {self.attention} is at {self_test(self.attention, self.request):.0%} of the tolerated deviation"

    def compile_step(self, step: int = 1) -> jax.stages.Compiled:
        """The compiled step number `step`. Nothing is allocated, and the first real step compiles nothing more.

        Raises UserError as `require_trainable` does.
        """
        from nanojax.data.loader import Batch  # here: a program that only samples needs no grain

        self.require_trainable()
        state = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), self.shapes, self.shardings)
        shape_ABT = (self.accumulation, self.rows, self.config.model.seq_len)
        tokens: Any = jax.ShapeDtypeStruct(shape_ABT, jnp.int32, sharding=meshes.batch_sharding(self.mesh))
        factors = [jax.ShapeDtypeStruct((2,), jnp.float32, sharding=meshes.replicated(self.mesh))] * self.run.factors
        with jax.set_mesh(self.mesh):
            return self.phase(step).train_step.lower(state, Batch(tokens, tokens, tokens), *factors).compile()

    def check_step(self, compiled: jax.stages.Compiled) -> str:
        """Which attention kernels a compiled step calls, in words. Raises UserError where the backend's own are missing."""
        with attention_told():
            return f"attention: compiled step calls {compiled_kernels(self.attention, compiled.as_text() or '')}"

    @property
    def parameters(self) -> int:
        """Count of the parameters that are really there, embedding included."""
        return sum(x.size for x in self.shapes.params.values())


def keep_compiled_programs(cache: str) -> None:
    """Let jax store compiled programs below the cache folder, so that a second start skips compilation.

    Raises StorageError where it cannot be written: jax would say so at every program, and go on.
    """
    folder = Path(cache).expanduser() / "xla"
    with storing(Path(cache)):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def out_of_memory_told(remedy: str = "try a smaller --micro-batch, --remat, or fsdp in --mesh") -> Iterator[None]:
    """Turn a device's out-of-memory into a UserError that says what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):  # the latter on CPUs
            raise
        what = str(error).splitlines()[0][:160]
        raise UserError(f"the devices are out of memory ({what}); {remedy}") from error


@contextlib.contextmanager
def attention_told() -> Iterator[None]:
    """Turn what ops say about a backend into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def choose_site(config: Config, devices: list[jax.Device] | None) -> Site:
    """Mesh, attention, formats and microbatch of a resolved config. Raises UserError where they do not fit the devices."""
    mesh = meshes.make_mesh(parse_mesh(config.train.mesh), devices)
    meshes.check_divisible(config, mesh)
    compute, precision = formats(config, mesh.devices.flat[0].platform)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = micro_batch(config, replicas) * replicas
    request = request_of(config, mesh, rows // replicas)
    with attention_told():
        attention, why = resolve(config.train.attn_impl, request)
    refused = "asked for" if config.train.kernels == "plain" else elementwise.refusal(request)
    accumulation = config.batch_tokens // (config.model.seq_len * rows)
    return Site(config, mesh, attention, why, request, refused, compute, precision, rows, accumulation)


def require_devices(config: Config) -> None:
    """Raise UserError where these devices do not have the attention or the precision that the config names, before data is prepared.

    The vocabulary is not known yet, nor how many rows a device takes, which may follow from it: `choose_site` asks once more.
    """
    mesh = meshes.make_mesh(parse_mesh(config.train.mesh))
    meshes.check_divisible(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=mesh.shape["tensor"])), mesh)
    request = request_of(config, mesh, rows=1)
    with attention_told():
        resolve(config.train.attn_impl, request)
    require_precision(config.train.precision, request, mesh.devices.flat[0].device_kind)


def request_of(config: Config, mesh: Mesh, rows: int) -> Request:
    """What a device of the mesh asks of its attention, for so many rows: all their tokens, of its share of the heads."""
    platform, tensor, context = mesh.devices.flat[0].platform, mesh.shape["tensor"], mesh.shape["context"]
    capabilities = [c for device in mesh.devices.flat if (c := getattr(device, "compute_capability", None))]
    return Request(
        platform=platform,
        capability=min(capabilities, key=float, default=None),
        dtype=DTYPES[formats(config, platform)[0]],
        rows=rows,
        tokens=config.model.seq_len,
        heads=config.model.n_head // tensor // context,
        kv_heads=key_heads(config.model.kv_heads // tensor, context) // context,
        head_dim=config.model.head_dim,
        windows=tuple(dict.fromkeys(config.model.windows)),
        documents=config.data.documents,
    )


def attention_of(site: Site) -> AttentionFn:
    """The backend that a site chose, on all of its devices."""
    attend = make_attention(site.attention, site.request.documents)
    # XLA can cut its own products, but would gather all keys on every device along context.
    return meshes.per_shard(attend, site.mesh) if site.attention in KERNELS or site.mesh.shape["context"] > 1 else attend


def elementwise_of(site: Site) -> elementwise.Elementwise:
    """What a site chose to do between products, on all of its devices."""
    if site.no_kernels:
        return elementwise.PLAIN
    return elementwise.kernels(spread_of(site), products_of(site), whole=site.mesh.shape["tensor"] == 1, hopper=site.hopper)


def spread_of(site: Site) -> Spread:
    """How kernels are called on the devices of a site."""
    return functools.partial(meshes.per_device, mesh=site.mesh)


def product_of(site: Site) -> Callable:
    """The matrix product of a site's precision."""
    if site.precision == "fp8":
        return functools.partial(fp8_dot, rounded=rounded_of(site, spread_of(site)))
    return full_recipe_dot if site.config.train.fp4_recipe == "full" else dot


def products_of(site: Site) -> Products | None:
    """Those of several matrices side by side, where a site's precision has them."""
    if site.precision == "fp8":
        return fp8_products(rounded_of(site, spread_of(site)))
    return None if site.config.train.fp4_recipe == "full" else PLAIN_PRODUCTS


def rounded_of(site: Site, spread: Spread) -> Round:
    """How activations are rounded to 8 bits: by a kernel where devices have whole columns."""
    if site.no_kernels or site.mesh.shape["tensor"] > 1:
        return both_ways_reference
    return functools.partial(both_ways, spread=spread)


def total_of(site: Site, between: elementwise.Elementwise) -> Callable:
    """The summed loss of hidden states, on all devices of a site: each rounds its own tokens."""
    train = site.config.train
    head = fp8_head(rounded_of(site, alone)) if train.fp8_head else PLAIN_HEAD
    total = functools.partial(total_nats, blocks=train.loss_blocks, of_logits=between.nats_and_gradient, head=head)
    return vocabulary.per_device(total, site.mesh)


def build_model(site: Site, between: elementwise.Elementwise, key: Array) -> GPT:
    """The model with parameters drawn from `key`."""
    return GPT(
        site.config.model,
        attention=attention_of(site),
        key=key,
        compute_dtype=DTYPES[site.compute],
        dot=product_of(site),
        elementwise=between,
        remat=site.config.train.remat,
    )


def optimizer_of(site: Site, axes: Axes) -> optax.GradientTransformation:
    """That of a site's config, for parameters with these logical axes."""
    c, cut = site.config, site.mesh.shape["fsdp"] * site.mesh.shape["tensor"] > 1
    sizes = dict(steps=c.steps, batch_tokens=c.batch_tokens, d_model=c.model.width)
    return optimizer(c.optim, **sizes, ns_dtype=DTYPES[site.compute], axes=axes if cut else None)


def make_program(
    config: Config, devices: list[jax.Device] | None = None, *, prepare: Callable | None = None, run: RunKind = USUAL
) -> Program:
    """The program of a resolved config on all devices (or those given); nothing is compiled or allocated yet.

    `prepare`, for formats of your own, replaces precision.prepare_weights: master weights -> those that products read, in the
    type of the activations. Raises UserError when mesh, batch, attention or precision do not fit the devices.
    """
    if run.deterministic:
        require_deterministic()
    site = choose_site(config, devices)
    mesh, dtype, train = site.mesh, DTYPES[site.compute], config.train
    between = elementwise_of(site)
    build = functools.partial(build_model, site, between)

    with nnx.use_eager_sharding(False):  # parameters get their shardings from the table below, all at once
        graph, _, axes = split(lambda: build(jax.random.key(0)))
    tx = optimizer_of(site, axes)

    def init(key: Array) -> TrainState:
        key_init, key_run = jax.random.split(key)
        with nnx.use_eager_sharding(False):
            params = parameters(build(key_init))
        return first_state(params, tx.init(params), jax.random.key_data(key_run), spikes=run.spikes)

    shapes = jax.eval_shape(init, jax.random.key(0))
    by_name, one, batch = meshes.parameter_shardings(axes, mesh), meshes.replicated(mesh), meshes.batch_sharding(mesh)
    moments = meshes.moment_shardings(shapes.moments, by_name, mesh)
    shardings = dataclasses.replace(jax.tree.map(lambda _: one, shapes), params=by_name, moments=moments)
    meshes.require_sharded(shapes, shardings, mesh)

    packed, blocks = config.data.mask_documents, train.loss_blocks
    whole, together = mesh.shape["fsdp"] * mesh.shape["tensor"] == 1, site.no_kernels is None
    total = total_of(site, between)
    evaluate = functools.partial(eval_step, graph, blocks=blocks, packed=packed)
    jit = functools.partial(jax.jit, compiler_options=run.options(site.platform, site.mesh.shape["fsdp"]) or None)

    def make_phase(rounding: Rounding) -> Phase:
        ready = prepare or functools.partial(prepare_weights, rounding=rounding, dtype=dtype)
        for_step = functools.partial(prepare_step, prepare=ready, rounding=rounding, train=train, whole=whole, together=together)
        loss = functools.partial(microbatch_nats, graph, total=total, packed=packed)
        rate = schedule(config.optim, config.steps)
        step = functools.partial(train_step, tx=tx, lr=rate, prepare=for_step, loss=loss, shardings=by_name)
        return Phase(
            rounding.format,
            prepare=jax.jit(ready, in_shardings=(by_name,), out_shardings=by_name),
            train_step=jit(step, in_shardings=(shardings, batch) + (one,) * run.factors, out_shardings=(shardings, one), donate_argnums=0),
        )

    roundings = [site.rounding] + ([Rounding(site.compute)] if train.fp4_until < 1 else [])
    return Program(
        **vars(site),
        run=run,
        shapes=shapes,
        shardings=shardings,
        graph=graph,
        init=jax.jit(init, out_shardings=shardings),
        phases=tuple(map(make_phase, roundings)),
        eval_step=jit(evaluate, in_shardings=(by_name, batch, one), out_shardings=one),
    )


def formats(config: Config, platform: str) -> tuple[str, str]:
    """(format of activations, format that block matrices are rounded to), as configured or by the device."""
    train = config.train
    compute = ("bf16" if platform == "gpu" else "fp32") if train.compute_dtype == "auto" else train.compute_dtype
    precision = train.four_bit or (compute if train.precision == "auto" else train.precision)
    if (compute, precision) == ("bf16", "fp32"):
        raise UserError(f"precision=fp32 needs fp32 activations, and on a {platform} they are bf16; add --compute-dtype fp32")
    return compute, precision
