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
from jaxtyping import Array

from nanojax import mesh as meshes
from nanojax.config import Config
from nanojax.data.shards import storing
from nanojax.errors import UserError
from nanojax.model import GPT, parameters, split
from nanojax.ops import elementwise
from nanojax.ops.attention import compiled_kernels
from nanojax.ops.attention_check import self_test
from nanojax.ops.attention_te import require_deterministic
from nanojax.optim import Axes, optimizer, schedule
from nanojax.precision import Rounding, prepare_step, prepare_weights
from nanojax.run_kind import USUAL, RunKind
from nanojax.site import DTYPES, Site, attention_of, attention_told, choose_site, elementwise_of, product_of, total_of
from nanojax.step import TrainState, eval_step, first_state, microbatch_nats, train_step


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
    total = total_of(site, between)
    evaluate = functools.partial(eval_step, graph, blocks=blocks, packed=packed)
    jit = functools.partial(jax.jit, compiler_options=run.options(site.platform, site.mesh.shape["fsdp"]) or None)

    def make_phase(rounding: Rounding) -> Phase:
        ready = prepare or functools.partial(prepare_weights, rounding=rounding, dtype=dtype)
        how = dict(rounding=rounding, train=train, whole=site.whole_matrices, together=site.together)
        for_step = functools.partial(prepare_step, prepare=ready, **how)
        loss = functools.partial(microbatch_nats, graph, total=total, packed=packed)
        step = functools.partial(train_step, tx=tx, lr=schedule(config.optim, config.steps), prepare=for_step, loss=loss, shardings=by_name)
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
