"""The two tables of the vocabulary, embedding and head, on a mesh: each crosses it once a microbatch, and no wider than it must.

B batch, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from nanojax.checks import MESH_AXES
from nanojax.mesh import place, spec

TOKENS = spec(("batch", "tokens"))
OWN = set(MESH_AXES) - {"tensor"}
"""Axes that functions here divide the work by. The vocabulary may be cut over tensor, and how is left to the partitioner."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VD: Array, tokens_BT: Array, dtype: jnp.dtype) -> Array:
    """`table_VD[tokens_BT].astype(dtype)` of a table whose width is cut over devices, bit for bit.

    It is cast before it is gathered, which halves the bytes of an fp32 table. Its gradient, a scatter-add with many collisions, is
    summed in fp32 all the same. Rows are gathered whole: a width that stayed cut would collide with the batch on the same mesh axis.
    """
    return place(table_VD.astype(dtype), "vocab", None)[tokens_BT]


def _look_up_forward(table_VD: Array, tokens_BT: Array, dtype: jnp.dtype):
    return look_up(table_VD, tokens_BT, dtype), (tokens_BT, table_VD)


def _look_up_backward(dtype: jnp.dtype, kept: tuple[Array, Array], cotangent_BTD: Array):
    del dtype
    tokens_BT, table_VD = kept

    def local(tokens_BT: Array, cotangent_BTD: Array) -> Array:
        d_VD = jnp.zeros(table_VD.shape, table_VD.dtype).at[tokens_BT].add(cotangent_BTD.astype(table_VD.dtype))
        # First within the shards of a table, which mostly share a host, then what is left of it among hosts.
        d_VD = jax.lax.psum_scatter(d_VD, "fsdp", scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_VD, ("data", "context"))

    ins, out = (TOKENS, TOKENS), P(None, "fsdp")
    d_VD = jax.shard_map(local, in_specs=ins, out_specs=out, axis_names=OWN, check_vma=False)(tokens_BT, cotangent_BTD)
    return place(d_VD, "vocab", "embed"), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def per_device(total: Callable, mesh: Mesh) -> Callable:
    """`total(x_BTD, w_DV, targets_BT, softcap)`, a sum over tokens, taken on every device over its own and added up.

    Left to the partitioner, the gradient of the head is summed over devices after every block of `ops.xent.total_nats`, here after all.
    """
    if all(mesh.shape[axis] == 1 for axis in OWN):
        return total

    def over_devices(x_BTD: Array, w_DV: Array, targets_BT: Array, softcap: float | None) -> Array:
        def local(x_BTD: Array, w_DV: Array, targets_BT: Array) -> Array:
            return total(x_BTD, w_DV, targets_BT, softcap)[None, None]

        each = jax.shard_map(local, mesh=mesh, in_specs=(TOKENS, P(), TOKENS), out_specs=TOKENS, axis_names=OWN, check_vma=False)
        return jnp.sum(each(x_BTD, w_DV, targets_BT))

    return over_devices
