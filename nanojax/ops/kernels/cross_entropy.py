"""Cross entropy of capped logits and its gradient in one kernel, which leaves the gradient where the logits were.

XLA makes two passes of it, each bound by the instructions of its tanh and exp. N tokens, V vocabulary. An instance takes one token.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from nanojax.ops.xent import IGNORED, LARGEST_SHIFT

AT_ONCE, WARPS = 16384, 16  # logits at a time, and of an instance (scripts/bench/LOG.md)
LOG2E = math.log2(math.e)
LOWEST = -1e30  # less than any logit; finite, so that differences of two are numbers


class _Job(NamedTuple):
    """What a kernel is compiled for."""

    vocabulary: int
    at_once: int
    softcap: float | None
    interpret: bool

    @property
    def turns(self) -> int:
        return -(-self.vocabulary // self.at_once)

    @property
    def even(self) -> bool:
        return self.vocabulary % self.at_once == 0

    @property
    def bound(self) -> float | None:
        """What no capped logit exceeds, in powers of two, where that is a safe shift."""
        return self.softcap * LOG2E if self.softcap is not None and self.softcap <= LARGEST_SHIFT else None


def cross_entropy(
    logits_NV: Float[Array, "N V"], targets_N: Int[Array, " N"], softcap: float | None, *, interpret: bool = False
) -> tuple[Float[Array, " N"], Float[Array, "N V"]]:
    """(nats of each token in float32, gradient of their sum by the logits in the dtype of those): `xent.nats_and_gradient`.

    On a GPU tanh is the hardware's, 5e-4 of its value off at most, less than logits in bf16 are rounded by. The gradient is written where
    the logits are, if nothing else reads them.
    """
    n, v = logits_NV.shape
    job = _Job(v, min(AT_ONCE, 1 << (v - 1).bit_length()), softcap, interpret)
    row = pl.BlockSpec((None, v), lambda i: (i, 0))
    every = pl.BlockSpec((n,), lambda i: (0,))
    nats_N, d_NV = pl.pallas_call(
        functools.partial(_kernel, job),
        out_shape=[jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n, v), logits_NV.dtype)],
        grid=(n,),
        in_specs=[row, every],
        out_specs=[every, row],
        input_output_aliases={0: 1},
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="cross_entropy",
        interpret=interpret,
    )(logits_NV, targets_N.astype(jnp.int32))
    return nats_N, d_NV


def nats_and_sums(
    logits_NV: Float[Array, "N V"], targets_N: Int[Array, " N"], softcap: float | None, *, interpret: bool = False
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """(nats of each token, what `gradient` wants of it), both in float32."""
    n, v = logits_NV.shape
    every = pl.BlockSpec((n,), lambda i: (0,))
    return pl.pallas_call(
        functools.partial(_nats_and_sums, _Job(v, min(AT_ONCE, 1 << (v - 1).bit_length()), softcap, interpret)),
        out_shape=[jax.ShapeDtypeStruct((n,), jnp.float32)] * 2,
        grid=(n,),
        in_specs=[pl.BlockSpec((None, v), lambda i: (i, 0)), every],
        out_specs=[every, every],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="nats_and_sums",
        interpret=interpret,
    )(logits_NV, targets_N.astype(jnp.int32))


def gradient(x: Array, at: Array, target: Array, log2_sum: Array, softcap: float | None, interpret: bool) -> Array:
    """Of a token's nats by its logits x at some places of the vocabulary, float32; nothing for an ignored target."""
    logit, slope = capped(x, softcap, interpret)
    return jnp.where(target != IGNORED, slope * (jnp.exp2(logit - log2_sum) - (at == target)), 0.0)


def _kernel(job: _Job, x_ref, targets_ref, nats_ref, d_ref):
    """One token, which is read twice, the second time from a cache."""
    target, log2_sum = targets_ref[pl.program_id(0)], _sum(job, x_ref, targets_ref, nats_ref)

    def write(i, _):
        at, x = _piece(job, x_ref, i)
        d = gradient(x, at, target, log2_sum, job.softcap, job.interpret)
        mask = None if job.even else at < job.vocabulary
        triton.store(d_ref.at[pl.ds(i * job.at_once, job.at_once)], d.astype(d_ref.dtype), mask=mask)
        return 0

    jax.lax.fori_loop(0, job.turns, write, 0)


def _nats_and_sums(job: _Job, x_ref, targets_ref, nats_ref, sums_ref):
    sums_ref[pl.program_id(0)] = _sum(job, x_ref, targets_ref, nats_ref)


def _sum(job: _Job, x_ref, targets_ref, nats_ref) -> Array:
    """The nats of one token. Logits are in powers of two, and 2^(logit - shift) is summed; the sum's logarithm is given back."""
    target = targets_ref[pl.program_id(0)]
    # As an array: the hardware's tanh takes no scalar.
    of_target = jnp.sum(_capped(job, x_ref[pl.ds(jnp.maximum(target, 0), 1)].astype(jnp.float32)))

    def larger(i, most):
        return jnp.maximum(most, _capped(job, _piece(job, x_ref, i)[1]))

    def add(i, total):
        at, x = _piece(job, x_ref, i)
        e = jnp.exp2(_capped(job, x) - shift)
        return total + (e if job.even else jnp.where(at < job.vocabulary, e, 0.0))

    shift: Any = job.bound
    if shift is None:
        shift = jnp.max(jax.lax.fori_loop(0, job.turns, larger, jnp.full(job.at_once, LOWEST, jnp.float32)))
    log2_sum = shift + jnp.log2(jnp.sum(jax.lax.fori_loop(0, job.turns, add, jnp.zeros(job.at_once, jnp.float32))))
    nats_ref[pl.program_id(0)] = jnp.where(target != IGNORED, (log2_sum - of_target) / LOG2E, 0.0)
    return log2_sum


def _piece(job: _Job, x_ref, i: Any) -> tuple[Array, Array]:
    """(positions in the vocabulary, logits in float32); beyond its end the lowest."""
    at, place = i * job.at_once + jnp.arange(job.at_once), x_ref.at[pl.ds(i * job.at_once, job.at_once)]
    if job.even:
        return at, triton.load(place).astype(jnp.float32)
    return at, triton.load(place, mask=at < job.vocabulary, other=LOWEST).astype(jnp.float32)


def _capped(job: _Job, x: Array) -> Array:
    return capped(x, job.softcap, job.interpret)[0]


def capped(x: Array, softcap: float | None, interpret: bool) -> tuple[Array, Array]:
    """(capped logits in powers of two, their slope by the logits)."""
    if softcap is None:
        return x * LOG2E, jnp.ones_like(x)
    tanh = (jnp.tanh if interpret else triton.approx_tanh)(x * (1 / softcap))
    return tanh * (softcap * LOG2E), 1 - tanh * tanh
