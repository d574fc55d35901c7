"""RMSNorm of a residual sum as one kernel each way: what XLA makes a copy, an addition and two passes of, and more of them backward.

N tokens, D model. An instance takes a few tokens at a time, and D in powers of two, as register arrays are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from nanojax.ops.kernels.pieces import powers_of_two
from nanojax.ops.kernels.spread import PARTS, ROWS, Spread, alone
from nanojax.ops.norm import EPS, Normed, rms_norm

TOKENS, WARPS = 2, 2  # at a time, and of an instance (scripts/bench/LOG.md)
TURNS = 16  # of an instance backward: so many tokens share a sum for the gradient of the gain
Stream = Float[Array, "B T D"]


def add_and_norm_reference(x_BTD: Stream, y_BTD: Stream | None, gain_D: Float[Array, " D"]) -> tuple[Array, Array]:
    """`add_and_norm` by the functions that it is made of."""
    x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
    return x_BTD, rms_norm(x_BTD, gain_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def add_and_norm(
    x_BTD: Stream, y_BTD: Stream | None, gain_D: Float[Array, " D"], interpret: bool = False, spread: Spread = alone
) -> tuple[Array, Array]:
    """(x + y, rms_norm(x + y, gain)), as a stream and what the next layer reads of it; their gradients meet in one pass. y may be None.

    The gradient of the gain is summed in float32. Each pass is spread over devices on its own, rather than both
    at once: those that hold the same rows, as along a tensor axis, then have nothing to add up.
    """
    xs = (x_BTD,) if y_BTD is None else (x_BTD, y_BTD)
    made = spread(functools.partial(_call, _forward, interpret), ((), *(ROWS for _ in xs)), [ROWS for _ in xs])(gain_D, *xs)
    return (x_BTD if y_BTD is None else made[1]), made[0]


def _add_and_norm_forward(x_BTD: Array, y_BTD: Array | None, gain_D: Array, interpret: bool, spread: Spread):
    made: Any = add_and_norm(x_BTD, y_BTD, gain_D, interpret, spread)
    return made, (made[0], gain_D, None if y_BTD is None else ())


def _add_and_norm_backward(interpret: bool, spread: Spread, kept: tuple[Array, Array, tuple | None], cotangents: tuple[Array, Array]):
    sum_BTD, gain_D, added = kept
    backward = spread(functools.partial(_call, _backward, interpret), ((), ROWS, ROWS, ROWS), [ROWS, PARTS])
    dx_BTD, dgain_PD = backward(gain_D, sum_BTD, *cotangents)
    return dx_BTD, None if added is None else dx_BTD, jnp.sum(dgain_PD, axis=0).astype(gain_D.dtype)


add_and_norm.defvjp(_add_and_norm_forward, _add_and_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def add_and_norm_later(
    x_BTD: Stream, y_BTD: Stream | None, gain_D: Float[Array, " D"], interpret: bool = False, spread: Spread = alone
) -> tuple[Array, Normed]:
    """`add_and_norm` whose norm is left to what reads it."""
    xs = (x_BTD,) if y_BTD is None else (x_BTD, y_BTD)
    over_BT, *made = spread(functools.partial(_call_later, interpret), [ROWS for _ in xs], [ROWS for _ in xs])(*xs)
    x_BTD = made[0] if made else x_BTD
    return x_BTD, Normed(x_BTD, over_BT, gain_D.astype(jnp.float32))


def _add_and_norm_later_forward(x_BTD: Array, y_BTD: Array | None, gain_D: Array, interpret: bool, spread: Spread):
    made: Any = add_and_norm_later(x_BTD, y_BTD, gain_D, interpret, spread)
    return made, (made[0], gain_D, None if y_BTD is None else ())


def _add_and_norm_later_backward(
    interpret: bool, spread: Spread, kept: tuple[Array, Array, tuple | None], cotangents: tuple[Array, Normed]
):
    return _add_and_norm_backward(interpret, spread, kept, (cotangents[0], cotangents[1].x))


add_and_norm_later.defvjp(_add_and_norm_later_forward, _add_and_norm_later_backward)


@functools.partial(jax.jit, static_argnums=(0,))
def _call_later(interpret: bool, *xs: Array) -> tuple[Array, ...]:
    """1 / rms of each token, then the sum of two."""
    shape, d = xs[0].shape, xs[0].shape[-1]
    n = xs[0].size // d
    tokens = min(TOKENS, n & -n)
    own = pl.BlockSpec((tokens, d), lambda i: (i, 0))
    over, *made = pl.pallas_call(
        functools.partial(_later, tokens),
        out_shape=[jax.ShapeDtypeStruct((n,), jnp.float32), *[jax.ShapeDtypeStruct((n, d), xs[0].dtype)] * (len(xs) - 1)],
        grid=(n // tokens,),
        in_specs=[own] * len(xs),
        out_specs=[pl.BlockSpec((tokens,), lambda i: (i,)), *[own] * (len(xs) - 1)],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="norm_later",
        interpret=interpret,
    )(*(x.reshape(n, d) for x in xs))
    return over.reshape(shape[:-1]), *(y.reshape(shape) for y in made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(kernel: Any, interpret: bool, gain_D: Array, *xs: Array) -> tuple[Array, ...]:
    """Run a kernel over blocks of tokens. It makes an array like x, then the sum of two, or backward a part of the gain's gradient."""
    shape, d = xs[0].shape, xs[0].shape[-1]
    flat, backward = [x.reshape(-1, d) for x in xs], len(xs) == 3
    n = len(flat[0])
    tokens = min(TOKENS * (TURNS if backward else 1), n & -n)  # a power of two that divides them
    own = pl.BlockSpec((tokens, d), lambda i: (i, 0))
    like_x = 2 if len(xs) == 2 else 1
    results = [(jax.ShapeDtypeStruct((n, d), xs[0].dtype), own)] * like_x
    if backward:
        results.append((jax.ShapeDtypeStruct((n // tokens, d), jnp.float32), pl.BlockSpec((None, d), lambda i: (i, 0))))
    made = pl.pallas_call(
        functools.partial(kernel, min(TOKENS, tokens)),
        out_shape=[shape for shape, _ in results],
        grid=(n // tokens,),
        in_specs=[pl.BlockSpec((d,), lambda i: (0,)), *([own] * len(xs))],
        out_specs=[spec for _, spec in results],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"norm{kernel.__name__}",
        interpret=interpret,
    )(gain_D.astype(jnp.float32), *flat)
    return *(y.reshape(shape) for y in made[:like_x]), *made[like_x:]


def _rows(ref, at: Any) -> list[Array]:
    """Some tokens, in pieces [tokens, columns], in float32."""
    return [ref[at, pl.ds(start, size)].astype(jnp.float32) for start, size in powers_of_two(ref.shape[1])]


def _pieces(ref) -> list[Array]:
    """The gain, likewise."""
    return [ref[pl.ds(start, size)][None] for start, size in powers_of_two(ref.shape[0])]


def _mean(parts: list[Array], d: int) -> Array:
    return functools.reduce(jnp.add, (jnp.sum(part, axis=1, keepdims=True) for part in parts)) / d


def _summed(x_ref, refs: Sequence[Any], at: Any) -> tuple[list[Array], Array, Any]:
    """(x + y, written to the last of (y, result, x + y), or x where only the result is given; 1 / rms; the result)."""
    d, xs = x_ref.shape[1], _rows(x_ref, at)
    if len(refs) == 3:
        y_ref, result_ref, sum_ref = refs
        sums = [(x + y).astype(x_ref.dtype) for x, y in zip(xs, _rows(y_ref, at), strict=True)]
        for total, (start, size) in zip(sums, powers_of_two(d), strict=True):
            sum_ref[at, pl.ds(start, size)] = total
        xs = [total.astype(jnp.float32) for total in sums]
    else:
        (result_ref,) = refs
    return xs, jax.lax.rsqrt(_mean([x * x for x in xs], d) + EPS), result_ref


def _later(tokens: int, x_ref, *refs):
    _, over, over_ref = _summed(x_ref, refs, pl.ds(0, tokens))
    over_ref[...] = over[:, 0]


def _forward(tokens: int, gain_ref, x_ref, *refs):
    d, at = x_ref.shape[1], pl.ds(0, tokens)
    xs, over, h_ref = _summed(x_ref, refs, at)
    for x, gain, (start, size) in zip(xs, _pieces(gain_ref), powers_of_two(d), strict=True):
        h_ref[at, pl.ds(start, size)] = (x * over * gain).astype(h_ref.dtype)


def _backward(tokens: int, gain_ref, x_ref, kept_ref, dy_ref, dx_ref, dgain_ref):
    d, gains = x_ref.shape[1], _pieces(gain_ref)

    def turn(i, dgains):
        at = pl.ds(i * tokens, tokens)
        xs, kept, dys = _rows(x_ref, at), _rows(kept_ref, at), _rows(dy_ref, at)
        over = jax.lax.rsqrt(_mean([x * x for x in xs], d) + EPS)
        normed, scaled = [x * over for x in xs], [dy * gain for dy, gain in zip(dys, gains, strict=True)]
        along = _mean([a * b for a, b in zip(scaled, normed, strict=True)], d)
        for a, b, stream, (start, size) in zip(scaled, normed, kept, powers_of_two(d), strict=True):
            dx = (over * (a - b * along)).astype(dx_ref.dtype)  # rounded as the gradient of `rms_norm` is
            dx_ref[at, pl.ds(start, size)] = (stream + dx.astype(jnp.float32)).astype(dx_ref.dtype)
        return [total + dy * b for total, dy, b in zip(dgains, dys, normed, strict=True)]

    none = [jnp.zeros((tokens, size), jnp.float32) for _, size in powers_of_two(d)]
    for total, (start, size) in zip(jax.lax.fori_loop(0, x_ref.shape[0] // tokens, turn, none), powers_of_two(d), strict=True):
        dgain_ref[pl.ds(start, size)] = jnp.sum(total, axis=0)
