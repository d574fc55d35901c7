"""Where arrays live: the mesh, the one table from logical axes to mesh axes, and the shardings derived from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanojax.checks import MESH_AXES, nearest_divisor, nearest_multiple
from nanojax.config import Config
from nanojax.errors import UserError
from nanojax.narrow import FP8_MULTIPLE
from nanojax.ops.attention import AttentionFn
from nanojax.ops.attention_context import over_context

# Logical axis -> mesh axis. A parameter's axes are named where it is made, in model.py.
RULES = (
    ("batch", ("data", "fsdp")),
    ("tokens", "context"),
    ("rows", ("data", "fsdp", "context")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("ffn", "tensor"),
    ("vocab", "tensor"),
    ("gain", None),
)
MAX_UNSHARDED = 0.02  # as MaxText's sharding_tolerance
Axes = Sequence[str | None]
"""Logical axes of an array, as many as are cut; those left out at the end are whole."""


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with the sizes given; axes left out are 1, and with no sizes all devices are on `data`.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(sizes) or {"data": len(devices)}
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if math.prod(shape) != len(devices):
        given = ",".join(f"{k}={v}" for k, v in sizes.items())
        raise UserError(
            f"the mesh must hold every device: {given} makes {math.prod(shape)}, there are {len(devices)}; try --mesh data={len(devices)}"
        )
    # Auto: with jax's default, Explicit, an embedding's gather and a target's pick raise ShardingTypeError.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Raise UserError where an axis of a parameter or of the activations cannot be cut evenly over its mesh axis."""
    model, blocks = config.model, config.train.loss_blocks
    for name, size, axis in (
        ("d_model", model.width, "fsdp"),
        ("n_head", model.n_head, "tensor"),
        ("n_kv_head", model.kv_heads, "tensor"),
        ("d_ffn", model.hidden, "tensor"),
        ("vocab_size", model.vocab_size, "tensor"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(
                f"{name}={size} must be a multiple of the mesh axis {axis}={mesh.shape[axis]}; "
                f"try --mesh {axis}={nearest_divisor(size, mesh.shape[axis])}"
            )
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    if model.seq_len // blocks % context:
        raise UserError(
            f"seq_len={model.seq_len} must be a multiple of loss_blocks={blocks} times the mesh axis context={context}; "
            f"try --seq-len {nearest_multiple(model.seq_len, blocks * context)}"
        )
    if config.train.fp8_head and model.seq_len % (blocks * context * FP8_MULTIPLE):
        raise UserError(
            f"seq_len={model.seq_len} must be a multiple of {FP8_MULTIPLE} times loss_blocks={blocks} times the mesh axis "
            f"context={context} for a head in fp8; try --seq-len {nearest_multiple(model.seq_len, FP8_MULTIPLE * blocks * context)}"
        )
    if (heads := model.n_head // tensor) % context:
        raise UserError(
            f"n_head={model.n_head} must be a multiple of the mesh axes tensor={tensor} times context={context}, which share the heads; "
            f"try --mesh context={nearest_divisor(heads, context)}"
        )


def require_sharded(shapes: Any, shardings: Any, mesh: Mesh) -> None:
    """Raise UserError where devices hold too much beyond their share of a state, on a mesh that shards it: for whoever changes the model.

    The gains of norms are whole on each, and do not count among all the rest.
    """
    shares = mesh.shape["fsdp"] * mesh.shape["tensor"]
    leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True)
    beyond = {jax.tree_util.keystr(path): math.prod(s.shard_shape(leaf.shape)) - leaf.size / shares for (path, leaf), s in leaves}
    share = sum(beyond.values()) / sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if share > MAX_UNSHARDED:
        raise UserError(
            f"at most {MAX_UNSHARDED:.0%} of the state may be left unsharded on fsdp={mesh.shape['fsdp']},tensor={mesh.shape['tensor']}, "
            f"and {share:.1%} are, most of it {max(beyond, key=beyond.__getitem__)}; give its axes a mesh axis in RULES of nanojax/mesh.py"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [accumulation, rows, tokens]: rows over data and fsdp, their tokens over context."""
    return NamedSharding(mesh, spec((None, "batch", "tokens")))


def spec(axes: Axes) -> P:
    """Mesh axes of logical axes, by RULES."""
    table = dict(RULES)
    return P(*(table[axis] if axis else None for axis in axes))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's logical axes to the mesh that is set (`jax.set_mesh`); without one, x as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def dealt_out(f: Callable[[jax.Array], jax.Array], x_LIO: jax.Array, cut: tuple[str, ...]) -> jax.Array:
    """f(x_LIO) of L matrices whose logical axes are `cut` over the devices of the mesh that is set: each gives f whole ones of them.

    `f` keeps shapes, and makes zeros of zeros.
    """
    where = spec((None, *cut))
    over = [(dim, axis) for dim, axis in enumerate(where) if axis]
    count = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for _, axis in over)

    def local(x_LIO: jax.Array) -> jax.Array:
        for dim, axis in over:
            x_LIO = jax.lax.all_to_all(x_LIO, axis, split_axis=0, concat_axis=dim, tiled=True)
        x_LIO = f(x_LIO)
        for dim, axis in reversed(over):
            x_LIO = jax.lax.all_to_all(x_LIO, axis, split_axis=dim, concat_axis=0, tiled=True)
        return x_LIO

    full_LIO = jax.numpy.pad(x_LIO, ((0, -len(x_LIO) % count), (0, 0), (0, 0)))
    return jax.shard_map(local, in_specs=where, out_specs=where, check_vma=False)(full_LIO)[: len(x_LIO)]


def parts(axis: str) -> int:
    """How many devices share a logical axis on the mesh that is set; 1 without one."""
    mesh, over = jax.sharding.get_abstract_mesh(), dict(RULES)[axis]
    return 1 if mesh.empty or not over else math.prod(mesh.shape[name] for name in ((over,) if isinstance(over, str) else over))


def per_shard(attention: AttentionFn, mesh: Mesh) -> AttentionFn:
    """The same attention, called on every device with its own rows and heads, so that no partitioner must understand its kernel."""
    if mesh.size == 1:
        return attention
    inner = attention if mesh.shape["context"] == 1 else over_context(attention, mesh.shape["context"])

    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None, segments_BT=None):
        def local(q_BTNH, k_BTKH, v_BTKH, *segments):
            return inner(q_BTNH, k_BTKH, v_BTKH, window=window, segments_BT=segments[0] if segments else None)

        segments = () if segments_BT is None else (segments_BT,)
        q, kv = (("batch", "tokens", heads) for heads in ("heads", "kv_heads"))
        ins = (q, kv, kv, *(("batch", "tokens") for _ in segments))
        return per_device(local, ins, q, mesh)(q_BTNH, k_BTKH, v_BTKH, *segments)

    return attend


def per_device(f: Callable, ins: Sequence[Axes], outs: Any, mesh: Mesh) -> Callable:
    """`f` on every device with its own part of each argument and result, whose logical axes are given (ops/kernels/spread.py)."""
    return f if mesh.size == 1 else sharded(f, ins, outs, mesh)


def sharded(f: Callable, ins: Sequence[Axes], outs: Any, mesh: Mesh) -> Callable:
    """`per_device`, on a mesh of one device too."""
    out_specs = tuple(map(spec, outs)) if isinstance(outs, list) else spec(outs)
    # Unchecked, because a kernel's own primitives do not say over which axes their results vary. The gradients of what is whole are
    # summed over devices.
    return jax.shard_map(f, mesh=mesh, in_specs=tuple(map(spec, ins)), out_specs=out_specs, check_vma=False)


def parameter_shardings(axes: Mapping[str, tuple[str, ...]], mesh: Mesh) -> dict[str, NamedSharding]:
    """Name of parameter -> sharding, from its logical axes and RULES."""
    return {name: NamedSharding(mesh, spec(names)) for name, names in axes.items()}


def moment_shardings(abstract_moments: Any, shardings: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of an optimizer state: a leaf filed under a parameter's name takes the parameter's, the others replicate.

    jax does not carry shardings through `tx.init`: left to itself, jit replicates every moment.
    """

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", "") if path else ""
        return shardings[name] if name in shardings and len(shardings[name].spec) == leaf.ndim else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, abstract_moments)
