"""Norm and rotation of queries or keys in one pass, forward and backward: what XLA makes three kernels of each way.

B batch, T tokens, N heads, H head size. An instance of the kernel takes a few tokens of one head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanojax.ops.norm import EPS, rms_norm
from nanojax.ops.rope import Rope, rotate

TOKENS, WARPS = 16, 4  # of an instance (scripts/bench/LOG.md)
Halves = tuple[Array, Array] | list[Array]


def norm_rope_reference(x_BTNH: Float[Array, "B T N H"], gain_H: Float[Array, " H"], rope: Rope) -> Float[Array, "B T N H"]:
    """`norm_rope` by the functions that it is made of."""
    return rotate(rms_norm(x_BTNH, gain_H), rope)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm_rope(x_BTNH: Float[Array, "B T N H"], gain_H: Float[Array, " H"], rope: Rope, interpret: bool = False) -> Float[Array, "B T N H"]:
    """rotate(rms_norm(x, gain), rope) in the dtype of x, rounded to it between the two as they do. H is a power of two, and
    the table [T, H] is for every row.

    The gradient of the gain is summed in float32; the table gets none.
    """
    return _call(_Job(_forward, interpret), x_BTNH, gain_H, rope, (), None)[0]


def _norm_rope_forward(x_BTNH: Array, gain_H: Array, rope: Rope, interpret: bool):
    return norm_rope(x_BTNH, gain_H, rope, interpret), (x_BTNH, gain_H, rope)


def _norm_rope_backward(interpret: bool, kept: tuple[Array, Array, Rope], dy_BTNH: Array):
    x_BTNH, gain_H, rope = kept
    dx_BTNH, dgain_PH = _call(_Job(_backward, interpret), x_BTNH, gain_H, rope, (dy_BTNH,), None)
    return dx_BTNH, jnp.sum(dgain_PH, axis=0).astype(gain_H.dtype), jax.tree.map(jnp.zeros_like, rope)


norm_rope.defvjp(_norm_rope_forward, _norm_rope_backward)


class Place(NamedTuple):
    """Where results go: among the heads of a larger array."""

    first: int
    heads: int
    """Of that array, in all."""
    into: Float[Array, "n Y"] | None
    """The array, which is written over; None where it is still to be made, and its other heads are left as memory has them."""


def backward_into(x_BTNH: Array, gain_H: Array, rope: Rope, dy_BTNH: Array, place: Place, interpret: bool) -> tuple[Array, Array]:
    """The backward pass alone: (gradient of x in its place [tokens, heads * H], parts [P, H] of the gradient of the gain)."""
    made = _call(_Job(_backward, interpret, (place.first, place.heads)), x_BTNH, gain_H, rope, (dy_BTNH,), place.into)
    return made[0], made[1]


class _Job(NamedTuple):
    """What a kernel is compiled for."""

    kernel: Any
    interpret: bool
    place: tuple[int, int] | None = None
    """The first head, and all, of an array that the result is part of."""


@functools.partial(jax.jit, static_argnums=0)
def _call(job: _Job, x_BTNH: Array, gain_H: Array, rope: Rope, more: tuple[Array, ...], into: Array | None) -> list[Array]:
    """Run a kernel over blocks of tokens and heads. It makes an array like x, and the backward one also a part of the gain's gradient."""
    b, t, n, h = x_BTNH.shape
    tokens = min(TOKENS, t & -t)  # blocks are powers of two, and none reaches into the next row
    blocks = b * t // tokens
    flat = [x.reshape(b * t, n * h) for x in (x_BTNH, *more)]
    own = pl.BlockSpec((tokens, h), lambda i, head: (i, head))
    table = pl.BlockSpec((tokens, h), lambda i, head: (i % (t // tokens), 0))
    first, heads = job.place or (0, n)
    written = pl.BlockSpec((tokens, h), lambda i, head: (i, first + head))
    inputs = [flat[0], gain_H.astype(jnp.float32), *rope, *flat[1:]] + ([] if into is None else [into])
    results = [(jax.ShapeDtypeStruct((b * t, heads * h), x_BTNH.dtype), written)]
    if more:
        results.append((jax.ShapeDtypeStruct((blocks, n, h), jnp.float32), pl.BlockSpec((None, None, h), lambda i, head: (i, head, 0))))
    made = pl.pallas_call(
        functools.partial(job.kernel, h // 2),
        out_shape=[shape for shape, _ in results],
        grid=(blocks, n),
        in_specs=[own, pl.BlockSpec((h,), lambda i, head: (0,)), table, table, *([own] * len(more))] + ([] if into is None else [written]),
        input_output_aliases={} if into is None else {len(inputs) - 1: 0},
        out_specs=[spec for _, spec in results],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"norm_rope{job.kernel.__name__}",
        interpret=job.interpret,
    )(*inputs)
    return [made[0] if job.place else made[0].reshape(x_BTNH.shape), *(part.reshape(-1, h) for part in made[1:])]


def _halves(ref, half: int) -> list[Array]:
    """[tokens, H / 2] each, in float32."""
    return [ref[..., pl.ds(start, half)].astype(jnp.float32) for start in (0, half)]


def _forward(half: int, x_ref, *refs):
    *inputs, y_ref = refs
    (x1, x2), (g1, g2), (cos, _), (minus_sin, _) = (_halves(ref, half) for ref in (x_ref, *inputs))
    over = jax.lax.rsqrt(jnp.sum(x1 * x1 + x2 * x2, axis=1, keepdims=True) / (2 * half) + EPS)
    n1, n2 = ((x * over * g[None]).astype(x_ref.dtype).astype(jnp.float32) for x, g in ((x1, g1), (x2, g2)))
    y_ref[:, pl.ds(0, half)] = (n1 * cos + n2 * minus_sin).astype(y_ref.dtype)
    y_ref[:, pl.ds(half, half)] = (n2 * cos - n1 * minus_sin).astype(y_ref.dtype)


def _backward(half: int, x_ref, *refs):
    *inputs, dx_ref, dgain_ref = refs
    # The array that is written over comes last, and is not read.
    x, gain, (cos, _), (minus_sin, _), d = (_halves(ref, half) for ref in (x_ref, *inputs[:4]))
    dx, dgain = turn_back(x, gain, (cos, minus_sin), d, x_ref.dtype)
    for i in range(2):
        dx_ref[:, pl.ds(i * half, half)] = dx[i].astype(dx_ref.dtype)
        dgain_ref[pl.ds(i * half, half)] = jnp.sum(dgain[i], axis=0)


def turn_back(x: Halves, gain: Halves, rope: Halves, d: Halves, dtype: DTypeLike) -> tuple[Halves, Halves]:
    """The gradient of x [tokens, H / 2] and what sums over tokens to that of the gain, of two halves of a head each, from d, that of the
    result, in float32.

    `rope` has the cosines, and the sines that the first half is multiplied by; `dtype` is that of the model's activations.
    """
    (x1, x2), (g1, g2), (cos, minus_sin), (d1, d2) = x, gain, rope, d
    size = 2 * x1.shape[1]
    over = jax.lax.rsqrt(jnp.sum(x1 * x1 + x2 * x2, axis=1, keepdims=True) / size + EPS)
    n1, n2 = x1 * over, x2 * over
    # Back through the rotation, which is by the opposite angle, and rounded as the gradient of `rotate` is.
    e1, e2 = (e.astype(dtype).astype(jnp.float32) for e in (d1 * cos - d2 * minus_sin, d2 * cos + d1 * minus_sin))
    dgain = e1 * n1, e2 * n2
    e1, e2 = e1 * g1[None], e2 * g2[None]
    along = jnp.sum(e1 * n1 + e2 * n2, axis=1, keepdims=True) / size
    return (over * (e1 - n1 * along), over * (e2 - n2 * along)), dgain
