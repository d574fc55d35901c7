"""One optimizer step: state and batch in, state and metrics out. A microbatches, B rows, T tokens, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from nanojax.model import give_keys, merge
from nanojax.ops.xent import IGNORED, token_nats
from nanojax.spikes import judge, no_history


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, or the shapes or shardings of it. Parameters and moments are fp32, params by name (model.split)."""

    step: Any
    skipped: Any
    """Steps whose update was not finite and was left out."""
    spikes: Any
    """Steps whose loss or gradient stood out and whose update was left out (spikes.py)."""
    in_a_row: Any
    """Of both, those since the last update."""
    history: dict[str, Any]
    """What spikes are told by, float32 [W] each; empty where none are."""
    key: Any
    """The run's random key as uint32 data; a step that draws wraps it and folds its own number in."""
    params: dict[str, Any]
    moments: Any


def first_state(params: dict[str, Array], moments: Any, key: Array, *, spikes: bool = True) -> TrainState:
    """The state before the first step. `spikes`: whether updates that stand out are to be left out."""
    zero, history = jnp.zeros((), jnp.int32), no_history() if spikes else {}
    return TrainState(step=zero, skipped=zero, spikes=zero, in_a_row=zero, history=history, key=key, params=params, moments=moments)


def microbatch_nats(
    graph: nnx.GraphDef,
    weights: dict[str, Array],
    batch: Any,
    key: Array,
    rounds: Mapping[str, Any] | None = None,
    *,
    total: Callable,
    packed: bool,
) -> Array:
    """Summed loss of one microbatch in nats, by `total`, which is `total_nats`. The products of the weights that `rounds` names draw from
    `key`, and take what it has of theirs.
    """
    model = merge(graph, weights)
    give_keys(model, key, rounds or {})
    x_BTD = model.hidden(batch.inputs, batch.segments if packed else None)
    with jax.named_scope("loss"):
        return total(x_BTD, model.head.w[...], batch.targets, model.softcap)


def train_step(
    state: TrainState,
    batch: Any,
    *factors: Array,
    tx: optax.GradientTransformation,
    lr: optax.Schedule,
    prepare: Callable,
    loss: Callable,
    shardings: dict,
) -> tuple[TrainState, dict[str, Array]]:
    """One step over `batch`, whose arrays are [A, B, T]; metrics are f32 scalars that stay on the device.

    The loss is the sum over valid targets over their count in the whole batch, so a microbatch without any changes nothing.
    `prepare` makes weights and rounds, which `loss(weights, microbatch, key, rounds)` reads; gradients pass straight through it.
    `factors`, if any, are one array [2], of the loss and of the gradient (faults.py).
    """
    with jax.named_scope("prepare"):
        # Kernels want whole matrices, and XLA would gather them before they are cast.
        weights, rounds = prepare(state.params)
        weights = jax.lax.with_sharding_constraint(weights, shardings)

    def accumulate(carry: tuple[Array, dict], micro: Any) -> tuple[tuple[Array, dict], None]:
        nats, grads = jax.value_and_grad(loss)(weights, *micro, rounds)
        total, sums = carry
        with jax.named_scope("accumulate"):
            sums = {name: sums[name] + g.astype(jnp.float32) for name, g in grads.items()}
        return (total + nats, jax.lax.with_sharding_constraint(sums, shardings)), None

    zeros = {name: jnp.zeros(w.shape, jnp.float32) for name, w in state.params.items()}
    zeros = jax.lax.with_sharding_constraint(zeros, shardings)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), len(batch.targets))
    (nats, grads), _ = jax.lax.scan(accumulate, (jnp.zeros((), jnp.float32), zeros), (batch, keys))
    count = jnp.maximum(1, jnp.sum(batch.targets != IGNORED)).astype(jnp.float32)
    if factors:
        nats, grads = nats * factors[0][0], jax.tree.map(lambda g: g * factors[0][1], grads)
    loss_mean, grads = nats / count, jax.tree.map(lambda g: g / count, grads)
    with jax.named_scope("optimizer"):
        norm = jnp.asarray(optax.tree.norm(grads))
        updates, moments = tx.update(grads, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(norm) & jnp.isfinite(nats)
    with jax.named_scope("spikes"):
        values = {"loss": loss_mean, "grad_norm": norm}
        spike, history = judge(state.history, state.step - state.skipped, finite, values, rows=batch.targets[..., 0].size)
    ok = finite & ~spike
    params, moments = jax.tree.map(lambda new, old: jnp.where(ok, new, old), (params, moments), (state.params, state.moments))
    rate = jnp.asarray(lr(state.step - state.skipped - state.spikes))  # a step that is left out does not move the schedule
    state = TrainState(
        step=state.step + 1,
        skipped=state.skipped + ~finite,
        spikes=state.spikes + spike,
        in_a_row=jnp.where(ok, 0, state.in_a_row + 1),
        history=history,
        key=state.key,
        params=params,
        moments=moments,
    )
    counts = {name: getattr(state, name).astype(jnp.float32) for name in ("skipped", "spikes", "in_a_row")}
    return state, values | {"lr": rate} | counts


def eval_step(graph: nnx.GraphDef, weights: dict[str, Array], batch: Any, bytes_V: Array, *, blocks: int, packed: bool) -> dict[str, Array]:
    """Sums over one batch [1, B, T]: nats and bytes of the targets that have bytes, nats and count of all."""
    model = merge(graph, weights)
    inputs_BT, targets_BT, segments_BT = (x[0] for x in (batch.inputs, batch.targets, batch.segments))
    x_BTD = model.hidden(inputs_BT, segments_BT if packed else None)
    nats_BT = token_nats(x_BTD, model.head.w[...], targets_BT, softcap=model.softcap, blocks=blocks)
    bytes_BT = jnp.where(targets_BT == IGNORED, 0, bytes_V[targets_BT])
    return {
        "nats": jnp.sum(jnp.where(bytes_BT > 0, nats_BT, 0)),
        "bytes": jnp.sum(bytes_BT),
        "all_nats": jnp.sum(nats_BT),
        "targets": jnp.sum(targets_BT != IGNORED),
    }
