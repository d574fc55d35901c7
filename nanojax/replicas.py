"""Whether all copies of a state are equal and finite, and whether one process keeps the others waiting. D devices, L arrays of a state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from nanojax.errors import DriftError, NonFiniteError
from nanojax.mesh import replicated
from nanojax.step import TrainState

# Steps from one look to the next: a process that is slow is to be named within 50, and half of a look's steps must be slow for that. A look
# reads the state once; with the smallest of models on a CPU it took a thirteenth of a step, 0.3 % of these.
EVERY = 25
SLOW = 0.25  # of a step's time: what a process may take on its host beyond what the others take, before it is named


@dataclass(frozen=True)
class Look:
    """What all devices say of their part of a state, the same on every process."""

    sums_DL: UInt32[np.ndarray, "D L"]
    """Of the bits of what each device holds of each array."""
    wrong_DP: UInt32[np.ndarray, "D P"]
    """Values of each parameter that are not finite."""
    busy_D: np.ndarray
    """Seconds that the process of each device takes for a step on its host, NaN where it does not know."""


class Watch:
    """Looks at the state of a run. Every process must ask for the same at the same step."""

    def __init__(self, mesh: Mesh, shardings: TrainState):
        self.mesh, self._shardings = mesh, shardings
        self.names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(shardings)]
        self._specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
        self._by_device = NamedSharding(mesh, P(mesh.axis_names))
        self._look = look_of(mesh, shardings)
        self._held: tuple[int, Any] | None = None
        self._slow: set[int] = set()

    def start(self, step: int, state: TrainState, busy: float) -> None:
        """Begin to look at the state after `step`; nothing waits for it. `busy`: seconds of a step on this host."""
        times_D = jax.make_array_from_callback((self.mesh.size,), self._by_device, lambda _: np.array([busy], np.float32))
        self._held = (step, self._look(state, times_D))
        if self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(self._held)  # virtual devices deadlock in their rendezvous when work for them queues up

    def read(self) -> tuple[int, Look] | None:
        """(step, what was seen) of the look that was begun, if one was."""
        held, self._held = self._held, None
        return held and (held[0], Look(*jax.device_get(held[1])))

    def require_equal(self, look: Look, step: int) -> None:
        """Raise DriftError, naming array and device, unless all copies are equal."""
        for name, spec, sums_D in zip(self.names, self._specs, look.sums_DL.T, strict=True):
            if odd := odd_ones(sums_D.reshape(self.mesh.devices.shape), self.mesh, spec):
                who = " and ".join(
                    f"device {self.mesh.devices.flat[n].id} of process {self.mesh.devices.flat[n].process_index}" for n in odd
                )
                raise DriftError(f"after step {step}, {name} has other bits on {who} than in the other copies")

    def require_finite(self, look: Look, step: int) -> None:
        """Raise NonFiniteError, naming a parameter, unless all are finite."""
        for name, wrong in zip(sorted(self._shardings.params), look.wrong_DP.sum(0, dtype=np.int64), strict=True):
            if wrong:
                raise NonFiniteError(f"after step {step}, {name} has values that are not finite")

    def slow(self, look: Look, seconds: float) -> list[str]:
        """Words on each process that has come to take more of a step's `seconds` than the others do, said once until it no longer does."""
        busy = {device.process_index: float(t) for device, t in zip(self.mesh.devices.flat, look.busy_D, strict=True)}
        usual = sorted(busy.values())[(len(busy) - 1) // 2]
        slow = {rank for rank, t in busy.items() if t - usual > SLOW * seconds}  # no NaN is
        new, self._slow = slow - self._slow, slow
        return [
            f"process {rank} takes {busy[rank]:.3f} s of each step's {seconds:.3f} on its host, where {usual:.3f} is usual, and the others "
            "wait for it; look at its processors, its data and what else runs there"
            for rank in sorted(new)
        ]


def look_of(mesh: Mesh, shardings: TrainState) -> Any:
    """jitted (state, seconds [D]) -> the arrays of a Look, on all devices."""

    def local(state: TrainState, times: Array) -> tuple[Array, Array, Array]:
        sums = jnp.stack([bit_sum(x) for x in jax.tree.leaves(state)])
        wrong = jnp.stack([jnp.sum(~jnp.isfinite(state.params[name]), dtype=jnp.uint32) for name in sorted(state.params)])
        return sums[None], wrong[None], times

    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    by_device = P(mesh.axis_names)
    # Unchecked: that copies may differ is what this is about.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs, by_device), out_specs=by_device, check_vma=False)
    return jax.jit(mapped, out_shardings=replicated(mesh))


def bit_sum(x: Array) -> UInt32[Array, ""]:
    """Sum of an array's bits, as unsigned integers of its width, modulo 2^32. One bit that flips changes it by a power of two."""
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    return jnp.sum(bits, dtype=jnp.uint32)


def odd_ones(sums: np.ndarray, mesh: Mesh, spec: P) -> list[int]:
    """Numbers, in the mesh, of devices whose copy differs from that of most; all of those that hold a copy where there is no most.

    `sums` has the mesh's shape; devices that agree in every axis that `spec` names hold copies of one another.
    """
    named = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,)) if axis}
    cut = [n for n, axis in enumerate(mesh.axis_names) if axis in named]
    whole = [n for n, axis in enumerate(mesh.axis_names) if axis not in named]
    order = (*cut, *whole)
    groups = math.prod(sums.shape[n] for n in cut)
    values, numbers = (x.transpose(order).reshape(groups, -1) for x in (sums, np.arange(sums.size).reshape(sums.shape)))
    return sorted(n for group, ids in zip(values, numbers, strict=True) if (group != group[0]).any() for n in odd(group, ids))


def odd(group: np.ndarray, ids: np.ndarray) -> Iterable[int]:
    """Those of a group that differ from the value of more than half of it, or all."""
    found, counts = np.unique(group, return_counts=True)
    most = found[counts > len(group) / 2]
    return [int(n) for value, n in zip(group, ids, strict=True) if not len(most) or value != most[0]]
