"""Cross entropy of a linear head, in blocks, so that the full logits never exist. B batch, T tokens, D model, V vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED = -1
LARGEST_SHIFT = 40.0  # exp(-2 * 40) is a normal float32


def token_nats(
    x_BTD: Float[Array, "B T D"], w_DV: Float[Array, "D V"], targets_BT: Int[Array, "B T"], *, softcap: float | None = None, blocks: int = 1
) -> Float[Array, "B T"]:
    """-log softmax(cap(x w))[target] of every token, in float32, 0 where the target is IGNORED.

    T must be a multiple of `blocks`, the number of parts in which the logits are made and dropped. Differentiable, but
    `total_nats` is the one to train with.
    """

    def block(_, part):
        x, targets = part
        lse, picked = statistics(jnp.einsum("BTD,DV->BTV", x, w_DV), targets, softcap)
        return None, jnp.where(targets == IGNORED, 0, lse - picked)

    _, nats = jax.lax.scan(block, None, (split_tokens(x_BTD, blocks), split_tokens(targets_BT, blocks)))
    return join_tokens(nats)


def nats_and_gradient(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], softcap: float | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T V"]]:
    """(-log softmax(cap(logits))[target] of every token in float32, gradient of their sum by the logits in the dtype of those)."""
    lse_BT, picked_BT = statistics(logits_BTV, targets_BT, softcap)
    valid_BT = targets_BT != IGNORED
    # Capped anew: kept from above they would be written and read in float32.
    capped_BTV = capped(jax.lax.optimization_barrier(logits_BTV), softcap)
    d_BTV = jnp.exp(capped_BTV - lse_BT[..., None]) - (targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])[None, None])
    if softcap is not None:
        d_BTV *= 1 - jnp.square(capped_BTV / softcap)
    return jnp.where(valid_BT, lse_BT - picked_BT, 0), jnp.where(valid_BT[..., None], d_BTV, 0).astype(logits_BTV.dtype)


class Head(NamedTuple):
    """The products of a block of tokens with the head."""

    prepare: Callable[[Array], Any]
    """Matrix [D, V] -> what the next two are given, once for all blocks of a microbatch."""
    forward: Callable[[Array, Any], tuple[Any, Any]]
    """(x [B, T, D], what was prepared) -> (logits [B, T, V], or what `of_logits` takes in their place; what is kept)."""
    backward: Callable[[Any, Any, Any], tuple[Array, Array]]
    """(what was kept, what was prepared, gradient of the logits) -> gradients of x, in its type, and of the matrix, in float32."""
    of_logits: Callable | None = None
    """What takes the place of the loss's own, where logits or that gradient are not an array."""


PLAIN_HEAD = Head(
    lambda w_DV: w_DV,
    lambda x_BTD, w_DV: (jnp.einsum("BTD,DV->BTV", x_BTD, w_DV), x_BTD),
    lambda x_BTD, w_DV, d_BTV: (
        jnp.einsum("BTV,DV->BTD", d_BTV, w_DV).astype(x_BTD.dtype),
        jnp.einsum("BTD,BTV->DV", x_BTD, d_BTV, preferred_element_type=jnp.float32),
    ),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def total_nats(
    x_BTD: Array,
    w_DV: Array,
    targets_BT: Array,
    softcap: float | None,
    blocks: int,
    of_logits: Callable = nats_and_gradient,
    head: Head = PLAIN_HEAD,
) -> Array:
    """Sum of `token_nats`, a float32 scalar.

    Its forward pass leaves the gradients of the sum behind, so that the backward pass repeats no product and keeps no logits
    (the sum has one cotangent, a scalar that multiplies them). The gradient of the head is summed over blocks in float32.
    `of_logits` is `nats_and_gradient`, or what computes the same. `head` multiplies where there are gradients to be made.
    """
    del of_logits, head
    return jnp.sum(token_nats(x_BTD, w_DV, targets_BT, softcap=softcap, blocks=blocks))


def total_nats_forward(x_BTD, w_DV, targets_BT, softcap, blocks, of_logits, head):
    """The value, and what the backward pass needs."""
    prepared = head.prepare(w_DV)

    def block(carry, part):
        total, dw_DV = carry
        x, targets = part
        logits_BTV, kept = head.forward(x, prepared)
        nats_BT, d_BTV = (head.of_logits or of_logits)(logits_BTV, targets, softcap)
        dx_BTD, d_DV = head.backward(kept, prepared, d_BTV)
        return (total + jnp.sum(nats_BT), dw_DV + d_DV), dx_BTD

    start = jnp.zeros((), jnp.float32), jnp.zeros(w_DV.shape, jnp.float32)
    (total, dw_DV), dx = jax.lax.scan(block, start, (split_tokens(x_BTD, blocks), split_tokens(targets_BT, blocks)))
    return total, (join_tokens(dx), dw_DV.astype(w_DV.dtype))


def total_nats_backward(softcap, blocks, of_logits, head, residuals, cotangent):
    """Gradients of states and head, from the residuals of the forward pass."""
    del softcap, blocks, of_logits, head
    dx_BTD, dw_DV = residuals
    return (cotangent * dx_BTD).astype(dx_BTD.dtype), (cotangent * dw_DV).astype(dw_DV.dtype), None


total_nats.defvjp(total_nats_forward, total_nats_backward)


def capped(logits_BTV, softcap):
    """Logits in float32, within +-softcap."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)


def statistics(logits_BTV, targets_BT, softcap):
    """(log-sum-exp_BT, logit of the target_BT) of logits once capped, in float32."""
    # A comparison, not a gather: it fuses into the reduction and works on a vocabulary that is sharded.
    hit_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])[None, None]
    picked_BT = capped(jnp.sum(jnp.where(hit_BTV, logits_BTV.astype(jnp.float32), 0), axis=-1), softcap)
    logits_BTV = capped(logits_BTV, softcap)
    if softcap is None or softcap > LARGEST_SHIFT:
        return jax.nn.logsumexp(logits_BTV, axis=-1), picked_BT
    # The cap bounds the largest: no pass over the logits to find it.
    return softcap + jnp.log(jnp.sum(jnp.exp(logits_BTV - softcap), axis=-1)), picked_BT


def split_tokens(x: Array, blocks: int) -> Array:
    """[B, T, ...] -> [blocks, B, T / blocks, ...]: every blocks-th token, so that what is sharded along B and T stays where it is."""
    b, t, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, t // blocks, blocks, *rest), 2, 0)


def join_tokens(x: Array) -> Array:
    """Inverse of `split_tokens`."""
    n, b, t, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(b, n * t, *rest)
