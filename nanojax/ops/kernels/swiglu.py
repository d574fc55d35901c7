"""silu(gate) * up of gates and ups that one product made, side by side, and its gradients where that product reads them.

XLA reads everything twice to write the gradients side by side. N tokens, F feed-forward; gates are the first F columns, ups the last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

AT_ONCE, WARPS = 4096, 4  # gates of an instance
COLUMNS = 512  # of those, side by side, at most


def swiglu_reference(both_BTF: Float[Array, "B T F"]) -> Array:
    """`swiglu` written out; F is both gates and ups here."""
    gate_BTF, up_BTF = jnp.split(both_BTF, 2, axis=-1)
    return jax.nn.silu(gate_BTF) * up_BTF


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def swiglu(both_BTF: Float[Array, "B T F"], interpret: bool = False) -> Array:
    """silu(gate) * up, [B, T, F / 2], computed in float32, in the dtype of its inputs. Shazeer 2020, arXiv:2002.05202, equation 6."""
    return _call(_forward, (both_BTF,), both_BTF.shape[-1] // 2, interpret)


def _swiglu_forward(both_BTF: Array, interpret: bool):
    return swiglu(both_BTF, interpret), both_BTF


def _swiglu_backward(interpret: bool, both_BTF: Array, dh_BTF: Array):
    return (_call(_backward, (both_BTF, dh_BTF), both_BTF.shape[-1], interpret),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _call(kernel: Any, arrays: tuple[Array, ...], made: int, interpret: bool) -> Array:
    """Run a kernel over blocks of tokens and columns. What it makes has `made` columns."""
    shape, f = arrays[0].shape, arrays[0].shape[-1] // 2
    flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
    n, columns = len(flat[0]), min(COLUMNS, f & -f)  # powers of two that divide them
    tokens = min(AT_ONCE // columns, n & -n)

    def rows(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((tokens, columns), lambda i, j: (i, 0))

    return pl.pallas_call(
        functools.partial(kernel, f, columns),
        out_shape=jax.ShapeDtypeStruct((n, made), arrays[0].dtype),
        grid=(n // tokens, f // columns),
        in_specs=[rows(x.shape[1]) for x in flat],
        out_specs=rows(made),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"swiglu{kernel.__name__}",
        interpret=interpret,
    )(*flat).reshape(*shape[:-1], made)


def _halves(f: int, columns: int) -> tuple[Any, Any]:
    """Where an instance's gates and ups are."""
    start = pl.program_id(1) * columns
    return pl.ds(start, columns), pl.ds(f + start, columns)


def _forward(f: int, columns: int, both_ref, h_ref):
    gates, ups = _halves(f, columns)
    gate, up = (both_ref[:, at].astype(jnp.float32) for at in (gates, ups))
    h_ref[:, gates] = silu_times(gate, up)[0].astype(h_ref.dtype)


def _backward(f: int, columns: int, both_ref, dh_ref, d_ref):
    gates, ups = _halves(f, columns)
    gate, up, dh = (ref[:, at].astype(jnp.float32) for ref, at in ((both_ref, gates), (both_ref, ups), (dh_ref, gates)))
    for at, d in zip((gates, ups), silu_times_backward(gate, up, dh), strict=True):
        d_ref[:, at] = d.astype(d_ref.dtype)


def silu_times(gate: Array, up: Array) -> tuple[Array]:
    """(silu(gate) * up,) in float32."""
    return (gate * jax.nn.sigmoid(gate) * up,)


def silu_times_backward(gate: Array, up: Array, dh: Array, logistic: Callable = jax.nn.sigmoid) -> tuple[Array, Array]:
    """Gradients of gate and up in float32."""
    sigmoid = logistic(gate)
    return dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid
