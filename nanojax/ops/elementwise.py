"""What lies between products and attention, as functions that the model and the loss are given: XLA's, or kernels where they are faster.

B batch, T tokens, D model, N heads, H head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanojax.ops.attention_request import Request
from nanojax.ops.kernels import cross_entropy as loss_kernel
from nanojax.ops.kernels import feed_forward as fused
from nanojax.ops.kernels.norm import Stream, add_and_norm_later
from nanojax.ops.kernels.norm import add_and_norm as norm_kernel
from nanojax.ops.kernels.norm_rope import norm_rope
from nanojax.ops.kernels.qkv import How, Three, qkv
from nanojax.ops.kernels.spread import HEADS, ROWS, TABLE, Spread
from nanojax.ops.kernels.swiglu import swiglu
from nanojax.ops.norm import Normed, rms_norm, written
from nanojax.ops.packed import PackedMatrix
from nanojax.ops.products import PLAIN_PRODUCTS, Products, multiply
from nanojax.ops.rope import Rope, rotate
from nanojax.ops.xent import nats_and_gradient

Gain = Float[Array, " S"] | None


def add_and_norm(x_BTD: Stream, y_BTD: Stream | None, gain_D: Gain) -> tuple[Stream, Stream]:
    """(x + y, rms_norm(x + y, gain)): the stream, and what a layer reads of it; y is None where there is nothing to add."""
    x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
    return x_BTD, rms_norm(x_BTD, gain_D)


def norm_and_rotate(x_BTNH: Float[Array, "B T N H"], gain_H: Gain, rope: Rope) -> Float[Array, "B T N H"]:
    """rotate(rms_norm(x, gain), rope): of queries or keys."""
    return rotate(rms_norm(x_BTNH, gain_H), rope)


def project(
    x_BTD: Stream | Normed,
    products: Sequence[Callable],
    gains: tuple[Gain, Gain],
    rope: Rope,
    head_dim: int,
    turn: Callable = norm_and_rotate,
) -> Three:
    """(queries, keys, values) of x by three products, their heads apart; queries and keys through `turn`."""
    x_BTD, heads = written(x_BTD), (*x_BTD.shape[:2], -1, head_dim)
    with jax.named_scope("qkv"):
        q_BTNH, k_BTKH, v_BTKH = (product(x_BTD).reshape(heads) for product in products)
    with jax.named_scope("rope"):
        return turn(q_BTNH, gains[0], rope), turn(k_BTKH, gains[1], rope), v_BTKH


def feed_forward(x_BTD: Float[Array, "B T D"] | Normed, gate: Callable, up: Callable, down: Callable) -> Float[Array, "B T D"]:
    """down(silu(gate(x)) * up(x)), of three products. Shazeer 2020, arXiv:2002.05202, equation 6."""
    x_BTD = written(x_BTD)
    return down(jax.nn.silu(gate(x_BTD)) * up(x_BTD))


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """One way to compute each. All ways agree up to rounding, gradients too."""

    add_and_norm: Callable = add_and_norm
    add_and_read: Callable = add_and_norm
    """The same for what a layer reads, which may be a Normed."""
    project: Callable = project
    feed_forward: Callable = feed_forward
    nats_and_gradient: Callable = nats_and_gradient
    """Of the logits that a device has: the loss is summed on each (vocabulary.py)."""


PLAIN = Elementwise()


def refusal(request: Request) -> str | None:
    """Why the kernels cannot serve a model that asks this of its attention; None when they can."""
    if request.platform not in ("gpu", "cuda"):
        return f"kernels run on NVIDIA GPUs, and the device is a {request.platform}"
    if request.capability is not None and float(request.capability) < 8:
        return f"kernels take compute capability 8.0 or more, given {request.capability}"
    if request.dtype != jnp.bfloat16:
        return f"kernels are for activations in bf16, given {jnp.dtype(request.dtype).name}"
    if request.head_dim & (request.head_dim - 1):
        return f"kernels take head sizes that are powers of two, given {request.head_dim}"
    return None


def known(gain: Gain, size: int) -> Array:
    """A gain that does nothing where there is none."""
    return jnp.ones(size, jnp.float32) if gain is None else gain


def kernels(
    spread: Spread, products: Products | None, *, whole: bool = True, hopper: int | None = None, interpret: bool = False
) -> Elementwise:
    """Those of ops/kernels, on a GPU, or anywhere with `interpret`.

    `products` are those of matrices that are told to round, which all others do not; None where matrices may not be multiplied side by
    side. `whole`: a device has all heads, feed-forward and vocabulary. Where it has a part of each, matrices are multiplied one by one, and
    the loss is XLA's. `hopper`: the devices that rows and tokens are cut over, where they are of compute capability 9.0, which has
    products that do the work after them, which `interpret` does not reach.
    """
    joined = whole and products is not None

    def side_by_side(layers: Sequence[Any]) -> bool:
        """Whether these are multiplied as one matrix. What is kept in 4 bits is unpacked by its own product."""
        return joined and not any(isinstance(layer.w.get_value(), PackedMatrix) for layer in layers)

    def chosen(layer: Any) -> Products:
        return PLAIN_PRODUCTS if products is None or layer.key is None else products

    def norm(x_BTD, y_BTD, gain_D, kernel=norm_kernel):
        return kernel(x_BTD, y_BTD, known(gain_D, x_BTD.shape[-1]), interpret, spread)

    def turn(x_BTNH, gain_H, rope):
        if rope[0].ndim == 3:  # rows whose tokens are at places of their own: decoding
            return norm_and_rotate(x_BTNH, gain_H, rope)
        local = spread(lambda x, gain, rope: norm_rope(x, gain, rope, interpret), (HEADS, (), TABLE), HEADS)
        return local(x_BTNH, known(gain_H, x_BTNH.shape[-1]), rope)

    def project_joined(x_BTD, layers, gains, rope, head_dim):
        if rope[0].ndim == 3 or not side_by_side(layers):
            return project(x_BTD, layers, gains, rope, head_dim, turn)
        ws = tuple(layer.w.get_value().astype(x_BTD.dtype) for layer in layers)
        with jax.named_scope("qkv"):
            how, both = How(head_dim, spread, chosen(layers[0]), interpret), tuple(known(gain, head_dim) for gain in gains)
            return qkv(x_BTD if how.products.later else written(x_BTD), ws, both, rope, how, layers[0].ready)

    def feed(x_BTD, gate, up, down):
        if not side_by_side((gate, up)):
            return feed_forward(x_BTD, gate, up, down)
        b, t, dtype = *x_BTD.shape[:2], x_BTD.dtype
        alike = side_by_side((down,)) and chosen(down) is chosen(gate)
        if alike and chosen(gate) is PLAIN_PRODUCTS and hopper is not None and fused.serves(b * t // hopper, *gate.w.get_value().shape):
            ws = (layer.w.get_value().astype(dtype) for layer in (gate, up, down))
            return fused.feed_forward(written(x_BTD), *ws, fused.How(spread))
        both_DF = jnp.concatenate([w.get_value().astype(dtype) for w in (gate.w, up.w)], axis=1)
        if alike and (joint := chosen(gate).feed_forward) is not None:
            return joint(x_BTD, both_DF, down.w.get_value().astype(dtype), (gate.ready, down.ready))
        x_BTD = written(x_BTD)
        with jax.named_scope("gate_up"):
            both_BTF = multiply(x_BTD, both_DF, chosen(gate), gate.ready)
        with jax.named_scope("down"):
            return down(spread(lambda both: swiglu(both, interpret), (ROWS,), ROWS)(both_BTF))

    read = functools.partial(norm, kernel=add_and_norm_later) if whole and products is not None and products.later else norm
    return Elementwise(norm, read, project_joined, feed, functools.partial(_nats, interpret) if whole else nats_and_gradient)


def _nats(interpret: bool, logits_BTV: Array, targets_BT: Array, softcap: float | None) -> tuple[Array, Array]:
    """`nats_and_gradient` by its kernel."""
    flat = loss_kernel.cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1), softcap, interpret=interpret)
    return flat[0].reshape(targets_BT.shape), flat[1].reshape(logits_BTV.shape)
