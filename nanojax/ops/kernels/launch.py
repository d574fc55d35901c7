"""How Pallas kernels are started."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is started."""

    early: bool = False
    """Whether the kernel that comes next may be launched while this one runs: compute capability 9.0 and later."""
    interpret: bool = False
    """Whether to run without a GPU."""


ON_GPU, INTERPRETED = Launch(), Launch(interpret=True)


def let_the_next_start(launch: Launch) -> int | Int[Array, ""]:
    """0; from here on the next kernel's instances take what room there is, and wait for this kernel's end.

    Programmatic dependent launch, if `early`. XLA puts that wait at the start of each kernel that Triton compiles, and launches it so.
    """
    if not launch.early or launch.interpret:
        return 0
    (zeros,) = triton.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;",
        args=[jnp.zeros(1, jnp.int32)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.sum(zeros)
