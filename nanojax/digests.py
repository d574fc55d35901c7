"""Digests of arrays, made where they lie: what a checkpoint is compared with, and what tells replicas apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

SALTS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # odd numbers without a pattern: one digest of 32 bits from each


def digests_of(arrays: dict[str, Any]) -> dict[str, Array]:
    """Name -> four sums [4] in uint32 over an array's bits, each weighed by its place; computed where it lies, the same on any mesh.

    Any one bit that flips changes all four: an odd multiple of a power of two below 2^32 is not 0.
    """
    made = {}
    for name, x in arrays.items():
        made[name] = digest(x)
        if len(devices := x.sharding.device_set) > 1 and next(iter(devices)).platform == "cpu":
            made[name].block_until_ready()  # virtual devices deadlock in their rendezvous when work for them queues up
    return made


@jax.jit
def digest(x: Array) -> UInt32[Array, 4]:
    """Of one array, of any shape: those of a model have few, each of which compiles once."""
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in range(x.ndim - 1, -1, -1):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]

    def total(salt: int) -> Array:
        mixed = (place + jnp.uint32(salt)) * jnp.uint32(salt)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        return jnp.sum(bits * (mixed ^ (mixed >> 12) | 1), dtype=jnp.uint32)

    return jnp.stack([total(salt) for salt in SALTS])


def in_words(digests: dict[str, Array]) -> dict[str, str]:
    """Digests as text; waits for them."""
    return {name: "".join(f"{int(part):08x}" for part in parts) for name, parts in jax.device_get(digests).items()}
