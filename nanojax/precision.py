"""What the products read: the master weights, cast, rounded to bf16 or 8 bits or quantised to 4, once a step."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nanojax.config import Config, TrainConfig
from nanojax.formats import FORMATS
from nanojax.ops.fp4 import QuantizedArray, fake_quant, finite_amax, quantize
from nanojax.ops.fp8_dot import Matrices
from nanojax.optim import label

# Matrices that servers fuse into one have one global scale, so that what is served is what was trained. Block scales stay their own.
FUSED = (("attention.q", "attention.k", "attention.v"), ("ffn.gate", "ffn.up"))


@dataclass(frozen=True)
class Rounding:
    """A format, and the weights that are in it."""

    format: str
    """fp32, bf16, fp8 (whose products round, of weights in bf16), or one of formats.FORMATS."""
    block: int | None = None
    """int4's group; the other formats have their own."""
    rule: str = "ceil"
    """mxfp4's scale rule (ops/fp4.py). Training takes the one under which no weight saturates."""
    first: int = 0
    """Blocks below this one are left alone, and so are those from `end` on."""
    end: int = 2**31
    head: bool = False

    @classmethod
    def of(cls, config: Config, format: str) -> Rounding:
        """That of a resolved config, whose `auto` has become `format`."""
        train = config.train
        if format not in FORMATS:
            return cls(format, head=train.fp8_head)
        end = config.model.depth - (train.fp4_skip_last or 0)
        return cls(format, train.fp4_block, first=train.fp4_skip_first, end=end, head=train.fp4_head)

    def covers(self, name: str) -> bool:
        """Whether the parameter of that name is rounded."""
        found = re.fullmatch(r"blocks\.([0-9]+)\..*\.w", name)
        return self.first <= int(found[1]) < self.end if found else name == "head.w" and self.head

    def names(self, names: Iterable[str]) -> list[str]:
        """Those that are rounded."""
        return [name for name in names if self.covers(name)]

    def describe(self, config: Config) -> str:
        """In words, for the header of a run."""
        train, depth = config.train, config.model.depth
        if self.format == "fp8":
            return f"{'and the head ' if self.head else ''}fp8 (e4m3, gradients e5m2; evaluated in bf16)"
        if self.format not in FORMATS:
            return self.format
        words = self.format + (f" in groups of {self.block}" if self.format == "int4" else "")
        ends = ((0, self.first), (self.end, depth))
        skipped = [f"block {a}" if b == a + 1 else f"blocks {a} to {b - 1}" for a, b in ends if a < b]
        words += f" but for {' and '.join(skipped)}" if skipped else ""
        words += ", activations and gradients too (emulated; evaluated without)" if train.fp4_recipe == "full" else ""
        words += ", and the head's weights" if self.head else ""
        return words + (f" up to step {round(train.fp4_until * config.steps)}" if train.fp4_until < 1 else "")


def prepare_weights(params: dict[str, Array], *, rounding: Rounding, dtype: jnp.dtype) -> dict[str, Array]:
    """The weights that products read, made once a step, outside accumulation and rematerialisation.

    Matrices of the blocks and the head are in `dtype`, those that `rounding` covers on its grid. Gains and the embedding stay fp32.
    """
    groups = label(params)
    four_bit = fake_quantize_weights(params, rounding, dtype) if rounding.format in FORMATS else {}

    def cast(name: str, w: Array) -> Array:
        if rounding.covers(name) and rounding.format in ("bf16", "fp8") and dtype != jnp.bfloat16:
            bits = jnp.finfo(jnp.bfloat16)
            # Not a pair of casts: under jit XLA deletes a narrowing that is followed by a widening.
            return jax.lax.reduce_precision(w, bits.nexp, bits.nmant).astype(dtype)
        return w.astype(dtype) if groups[name] in ("matrix", "head") else w

    return {name: four_bit[name] if name in four_bit else cast(name, w) for name, w in params.items()}


def prepare_step(
    params: dict[str, Array], *, prepare: Callable, rounding: Rounding, train: TrainConfig, whole: bool, together: Collection[str]
) -> tuple[dict[str, Array], dict[str, Matrices | None]]:
    """(weights by `prepare`; those whose products round what they multiply -> what is made of them once a step).

    That is all of a matrix in 8 bits where every device has `whole` ones: those that are gathered are rounded then. `together` are the
    parts of a layer, of attention and ffn, in which what reads the same is multiplied as one.
    """
    weights, ready = prepare(params), {}
    if rounding.format == "fp8":
        names = dataclasses.replace(rounding, head=False).names(weights)
        ready = eight_bit_matrices(weights, names, together=together) if whole else {}
    else:
        names = rounding.names(weights) if rounding.format == train.four_bit and train.fp4_recipe == "full" else []
    return weights, {name: ready.get(name) for name in names}


def eight_bit_matrices(weights: dict[str, Array], names: Collection[str], *, together: Collection[str]) -> dict[str, Matrices]:
    """Of those names the matrices in 8 bits, by the first of several that are multiplied as one in the parts that are `together`."""
    groups = [siblings(name, names) if any(f".{part}." in name for part in together) else [name] for name in names]
    by_shapes = collections.defaultdict(list)
    for group in (group for name, group in zip(names, groups, strict=True) if name == group[0]):
        by_shapes[tuple(weights[name].shape for name in group), ".ffn." in group[0]].append(group)
    ready = {}
    for (_, joined), same in by_shapes.items():
        # As one array: each on its own, a model's worth takes XLA long to compile.
        stacked = [jnp.stack([weights[name] for name in each]) for each in zip(*same, strict=True)]
        stacked = [jnp.concatenate(stacked, axis=2)] if joined else stacked  # gates and ups have one product, forward too
        made = jax.vmap(lambda *ws: Matrices.of(ws))(*stacked)
        ready |= {group[0]: jax.tree.map(lambda x, i=i: x[i], made) for i, group in enumerate(same)}
    return ready


def fake_quantize_weights(params: dict[str, Array], rounding: Rounding, dtype: jnp.dtype) -> dict[str, Array]:
    """The weights that a 4-bit rounding covers, on its grid, in `dtype`."""
    amaxes, ready = shared_amaxes(params, rounding), {}

    def quantise(w: Array, amax: Array | None) -> Array:
        return fake_quant(w, rounding.format, 0, rounding.block, rounding.rule, dtype, amax)

    for names, stack in stacks(params, rounding):
        amax = jnp.stack([amaxes[name] for name in names]) if amaxes else None
        ready |= zip(names, jax.vmap(quantise)(stack, amax), strict=True)
    return ready


def quantize_weights(params: dict[str, Array], rounding: Rounding) -> dict[str, QuantizedArray]:
    """Codes and scales of the weights that a 4-bit rounding covers; `prepare_weights` has what they stand for."""
    amaxes = shared_amaxes(params, rounding)
    return {
        name: quantize(params[name], rounding.format, block=rounding.block, rule=rounding.rule, amax=amaxes.get(name))
        for name in rounding.names(params)
    }


def shared_amaxes(params: dict[str, Array], rounding: Rounding) -> dict[str, Array]:
    """Name -> the largest magnitude that its global scale is made from, for formats that have one."""
    if not rounding.format.startswith("nvfp4"):
        return {}
    own = {name: amax for names, stack in stacks(params, rounding) for name, amax in zip(names, jax.vmap(finite_amax)(stack), strict=True)}
    return {name: jnp.max(jnp.stack([own[other] for other in siblings(name, own)])) for name in own}


def stacks(params: dict[str, Array], rounding: Rounding) -> Iterator[tuple[list[str], Array]]:
    """Weights that are rounded, those of one shape as one array: each on its own, a model's worth takes XLA half a minute to compile."""
    by_shape = collections.defaultdict(list)
    for name in rounding.names(params):
        by_shape[params[name].shape].append(name)
    for names in by_shape.values():
        yield names, jnp.stack([params[name] for name in names])


def siblings(name: str, names: Iterable[str]) -> list[str]:
    """Those among `names` that share a global scale with `name`, itself included."""
    for members in FUSED:
        for member in members:
            if f".{member}." in name:
                return [other for other in (name.replace(member, m) for m in members) if other in names]
    return [name]
