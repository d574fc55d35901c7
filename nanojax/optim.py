"""The optimizer: Muon for the matrices of the blocks, AdamW for the rest, one schedule over both."""

from __future__ import annotations

import collections
import functools
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from nanojax.config import OptimConfig
from nanojax.mesh import dealt_out

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
Axes = Mapping[str, tuple[str, ...]]
"""Name of parameter -> its logical axes."""
NOWHERE: Axes = {}


def optimizer(
    c: OptimConfig, *, steps: int, batch_tokens: int, d_model: int, ns_dtype: jnp.dtype, axes: Axes | None = None
) -> optax.GradientTransformation:
    """The whole chain, from summed gradients to the update that is added to the parameters.

    `c` gives learning rates at its reference batch and width; here they meet the run's. `axes`: of parameters that are cut over devices.
    """
    batch_scale = (batch_tokens / c.reference_batch) ** 0.5 if c.reference_batch else 1.0
    width_scale = (d_model / 768) ** -0.5

    def adamw(lr: float, decay: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(*c.betas, eps=c.eps), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(lr * batch_scale)
        )

    groups: dict[Hashable, optax.GradientTransformation] = {
        "matrix": optax.chain(scale_by_muon(c, ns_dtype, axes or {}), optax.scale_by_learning_rate(c.matrix_lr * batch_scale)),
        "embedding": adamw(c.embedding_lr * width_scale, c.weight_decay),
        "head": adamw(c.head_lr * width_scale, c.weight_decay),
        "gain": adamw(c.gain_lr, 0.0),
    }
    return optax.chain(
        optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(),
        optax.partition(groups, label),
        optax.scale_by_schedule(schedule(c, steps)),
    )


def label(params: dict[str, Any]) -> dict[str, str]:
    """Name of parameter -> its group."""

    def group(name: str, leaf: Any) -> str:
        if name == "embedding":
            return "embedding"
        if name == "head.w":
            return "head"
        return "matrix" if leaf.ndim == 2 else "gain"

    return {name: group(name, leaf) for name, leaf in params.items()}


def schedule(c: OptimConfig, steps: int) -> optax.Schedule:
    """Multiplier of every learning rate: linear warm-up, flat, linear warm-down over the last share of the run."""
    warmdown = max(1, round(c.warmdown * steps))

    def multiplier(step: ArrayLike) -> Array:
        step = jnp.asarray(step)
        rise = (step + 1) / max(1, c.warmup_steps)
        left = jnp.clip((steps - step) / warmdown, 0, 1)
        return jnp.minimum(1.0, jnp.minimum(rise, left + (1 - left) * c.final_lr))

    return multiplier


class MuonState(NamedTuple):
    """Updates so far, and the momentum of each matrix."""

    step: Array
    momentum: Any


def scale_by_muon(c: OptimConfig, ns_dtype: jnp.dtype, axes: Axes = NOWHERE) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, out / in)). Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    Kernels are [in, out], the transpose of the source's, so the factor reads the axes the other way round.
    """
    low, high = c.momentum

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        m = low + (high - low) * jnp.minimum(1.0, state.step / max(1, c.momentum_warmup))
        momentum = jax.tree.map(lambda b, g: m * b + (1 - m) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda b, g: m * b + (1 - m) * g, momentum, updates)
        return orthogonalise_all(nesterov, c.ns_steps, ns_dtype, axes), MuonState(state.step + 1, momentum)

    return optax.GradientTransformation(init, update)


def orthogonalise_all(tree: Any, steps: int, dtype: jnp.dtype, axes: Axes = NOWHERE) -> Any:
    """Each [in, out] matrix orthogonalised and scaled; matrices of one shape go through together, as one batch.

    Those with `axes` are cut over devices in the same way, and each device takes whole ones of them: an iteration on parts would
    bring them together three times.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    found = [leaf for _, leaf in leaves]
    alike: dict[tuple, list[int]] = collections.defaultdict(list)
    for i, (path, leaf) in enumerate(leaves):
        alike[leaf.shape, axes.get(getattr(path[-1], "key", ""))].append(i)
    for ((fan_in, fan_out), cut), members in alike.items():
        stack = jnp.stack([found[i] for i in members]).astype(dtype)
        all_of = functools.partial(orthogonalise, steps=steps)
        stack = dealt_out(all_of, stack, cut) if cut else all_of(stack)
        for i, matrix in zip(members, stack.astype(jnp.float32) * max(1.0, fan_out / fan_in) ** 0.5, strict=True):
            found[i] = matrix
    return jax.tree.unflatten(structure, found)


def orthogonalise(x_LIO: Float[Array, "L I O"], steps: int) -> Float[Array, "L I O"]:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix: singular values end near 1, vectors stay.

    X <- a X + (b A + c A A) X with A = X X^T, after X / (||X||_F + 1e-7), on the side where A is small.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x_LIO.shape[1] > x_LIO.shape[2]
    x = x_LIO.mT if tall else x_LIO
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    x = (x / (norm + 1e-7).astype(x.dtype)).astype(x.dtype)

    def iterate(x: Array, _: None) -> tuple[Array, None]:
        gram = x @ x.mT
        return a * x + (b * gram + c * (gram @ gram)) @ x, None

    x, _ = jax.lax.scan(iterate, x, None, length=steps)
    return x.mT if tall else x
