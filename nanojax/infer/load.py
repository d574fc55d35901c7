"""A model to use: that of a run's newest checkpoint, or of an export."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojax.checks import round_up
from nanojax.config import Attention, Config
from nanojax.export.folder import Export, is_export, open_export
from nanojax.runs import RunFolder, unplaced
from nanojax.sizes import count_parameters
from nanojax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jax

    from nanojax.program import Program


@dataclass(frozen=True)
class Source:
    """A folder with a model in it, which passed all checks that need no device."""

    path: Path
    config: Config
    """For the devices of this machine, its tokenizer the folder's own."""
    tokenizer: Tokenizer
    export: Export | None
    """None for a run."""

    def load(self, devices: list[jax.Device] | None = None, *, packed: bool = False) -> Model:
        """The model on all devices, or those given. `packed`, for the engine: matrices in 4 bits stay so, where its kernels read them.

        Raises UserError on weights that are damaged or of another model, NonFiniteError on those of a run that are not finite.
        """
        import jax
        import jax.numpy as jnp

        from nanojax.checkpoint import PARAMS, Checkpoints
        from nanojax.export.read import read_parts, read_weights
        from nanojax.infer.fused import refusal
        from nanojax.program import keep_compiled_programs, make_program
        from nanojax.site import DTYPES

        # First, whether weights of those sizes are there: a model as large as a config claims takes long to trace.
        parts = read_parts(self.export) if self.export else {}
        checkpoints = Checkpoints(RunFolder(self.path).checkpoints)
        if not self.export:
            checkpoints.verify(4 * count_parameters(self.config.model).total, PARAMS)
        keep_compiled_programs(self.config.data.cache)
        program = make_program(even_rows(self.config, len(devices or jax.devices())), devices)
        shardings = program.shardings.params
        with jax.set_mesh(program.mesh):
            if self.export:
                dtype = jnp.dtype(DTYPES[program.compute])
                packed = packed and refusal(program.request) is None
                weights = read_weights(self.export, parts, dtype, shardings, packed=packed)
                return Model(program, weights, self.export.step, f"{self.export.format}, exported")
            params = checkpoints.finite_params(program.shapes.params, shardings)
            step = checkpoints.latest or 0  # now that damaged ones are known
            phase = program.phase(step)
            weights = phase.prepare(params)
            checkpoints.close()
            return Model(program, weights, step, phase.precision)


def even_rows(config: Config, devices: int) -> Config:
    """The config with as many rows a step as all devices can share evenly: they are no longer trained on."""
    rows = round_up(config.batch_tokens // config.model.seq_len, devices)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_tokens=rows * config.model.seq_len))


@dataclass(frozen=True)
class Model:
    """Weights on devices, and what runs on them."""

    program: Program
    weights: dict[str, Any]
    """Prepared arrays, what products read; where so loaded, some are ops.packed.PackedMatrix."""
    step: int
    """Of the run, that they are from."""
    precision: str
    """Of the matrices of the blocks, in words."""


def open_source(folder: Path, *, attn_impl: Attention = "auto", cache: str | None = None) -> Source:
    """A run's folder or an exported one. `cache` replaces the run's own; an export has none, and takes the default.

    Raises UserError on a folder that is neither, or damaged.
    """
    if is_export(folder):
        export = open_export(folder)
        config, tokenizer = export.plain_config, export.tokenizer
    else:
        export, run = None, RunFolder(folder)
        config, _ = run.read()
        run.require_checkpoint()
        tokenizer = run.tokenizer()
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(folder / "tokenizer.json")))
    if cache is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=cache))
    return Source(folder, unplaced(config, attn_impl), tokenizer, export)
