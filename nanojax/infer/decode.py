"""What the engine compiles: reading a piece of the prompts, and the loop that makes tokens.

B batch, T tokens, N tokens of a stride, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nanojax.infer.sampling import Controls, draw, likeliest
from nanojax.model import GPT, merge
from nanojax.ops.attention import AttentionFn
from nanojax.ops.cache import Cache, cached_attention, write

NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A batch on its way."""

    caches: tuple[Cache, ...]
    """One a layer."""
    logits_BV: Array
    """Of each row's next token, when its prompt is read."""
    length_B: Array
    """Tokens of each row that its caches hold, or will when its prompt is read."""
    token_B: Array
    """The last that each row has added, not in its caches; NO_TOKEN where a row was done before."""
    made_B: Array
    """Tokens that each row has added."""
    done_B: Array


class Asked(NamedTuple):
    """What a batch is to be continued with; constant while it is."""

    controls: Controls
    budget_B: Int[Array, " B"]
    """Most tokens that a row adds."""
    stop_V: Bool[Array, " V"]
    """Tokens that end a row."""


class Path(NamedTuple):
    """How a model's tokens are computed: what it holds its weights in, and what makes one more of each row."""

    weights: Any
    plain: Callable[[Any], dict[str, Array]]
    """These weights by the model's own names, for prompts."""
    one_token: Callable[..., tuple[Float[Array, "B V"], tuple[Cache, ...]]]
    """(weights, token_B, position_B, valid_B, caches) -> (logits, caches with the valid tokens in them)."""
    words: str


def plain_path(graph: nnx.GraphDef, weights: dict[str, Array], words: str) -> Path:
    """The model's own products, and attention by XLA: on every device, in every type."""

    def one_token(weights: dict[str, Array], token_B: Array, position_B: Array, valid_B: Array, caches: tuple[Cache, ...]):
        gpt = model_of(graph, weights)
        x_BTD, caches = forward(gpt, token_B[:, None], position_B[:, None], valid_B[:, None], caches)
        return gpt.logits(x_BTD[:, 0]), caches

    return Path(weights, lambda weights: weights, one_token, words)


def read(gpt: GPT, state: State, tokens_BT: Int[Array, "B T"], start: Int[Array, ""], attention: AttentionFn | None = None) -> State:
    """The state with one more piece of every prompt in its caches, from position `start` on; the first one's `attention` is training's."""
    b, t = tokens_BT.shape
    positions_BT = jnp.broadcast_to(start + jnp.arange(t)[None], (b, t))
    valid_BT = positions_BT < state.length_B[:, None]
    x_BTD, caches = forward(gpt, tokens_BT, positions_BT, valid_BT, state.caches, attention)
    last_B = state.length_B - 1 - start
    x_BD = x_BTD[jnp.arange(b), jnp.clip(last_B, 0, t - 1)]
    ends_B = (last_B >= 0) & (last_B < t)
    logits_BV = jnp.where(ends_B[:, None], gpt.logits(x_BD)[:, : state.logits_BV.shape[1]], state.logits_BV)
    return dataclasses.replace(state, caches=caches, logits_BV=logits_BV)


def choose(state: State, asked: Asked, drawn: str) -> State:
    """The state with one more token of each row, by its logits. `drawn` says what the rows need: `likeliest` where all have temperature 0,
    `free` where none leaves tokens out, `filtered`."""
    if drawn == "likeliest":
        token_B = likeliest(state.logits_BV)
    else:
        token_B = draw(state.logits_BV, asked.controls, state.made_B, filters=drawn == "filtered")
    made_B = state.made_B + ~state.done_B
    done_B = state.done_B | asked.stop_V[token_B] | (made_B >= asked.budget_B)
    return dataclasses.replace(state, token_B=jnp.where(state.done_B, NO_TOKEN, token_B), made_B=made_B, done_B=done_B)


def add(
    one_token: Callable, weights: Any, state: State, asked: Asked, *, count: int, drawn: str, early: bool
) -> tuple[State, Int[Array, "B N"]]:
    """(state, tokens) after `count` more tokens; NO_TOKEN where a row was done. `drawn` as of `choose`.

    `early`: stop when all rows are done. On a GPU the host would have to look after every token, which costs more than it saves.
    """

    def body(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        n, state, tokens_BN = carry
        logits_BV, caches = one_token(weights, state.token_B, state.length_B, ~state.done_B, state.caches)
        logits_BV, length_B = logits_BV[:, : state.logits_BV.shape[1]], state.length_B + ~state.done_B
        state = choose(dataclasses.replace(state, caches=caches, logits_BV=logits_BV, length_B=length_B), asked, drawn)
        return n + 1, state, jax.lax.dynamic_update_slice(tokens_BN, state.token_B[:, None], (0, n))

    def more(carry: tuple[Array, State, Array]) -> Array:
        n, state, _ = carry
        return (n < count) & ~jnp.all(state.done_B) if early else n < count

    none_BN = jnp.full((len(asked.budget_B), count), NO_TOKEN, jnp.int32)
    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state, none_BN))[1:]


def forward(
    gpt: GPT,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    caches: tuple[Cache, ...],
    alone: AttentionFn | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
    """(what the head reads, caches with the valid tokens in them). `gpt` has no rematerialisation, which would trace the writing apart.

    `alone`, for tokens that nothing comes before: attention among them, so that the caches are only written.
    """
    written: list[Cache] = []

    def attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, *, cache: Cache, window: int | None) -> Array:
        if alone is not None:
            written.append(write(cache, k_BTKH, v_BTKH, positions_BT, valid_BT))
            return alone(q_BTNH, k_BTKH, v_BTKH, window=window)
        y_BTNH, new = cached_attention(q_BTNH, k_BTKH, v_BTKH, cache, positions_BT, valid_BT, window)
        written.append(new)
        return y_BTNH

    attends = [functools.partial(attention, cache=cache, window=window) for cache, window in zip(caches, gpt.windows, strict=True)]
    x_BTD = gpt.through_blocks(gpt.embed(tokens_BT), positions_BT, attends)
    return x_BTD, tuple(written)


def model_of(graph: nnx.GraphDef, weights: dict[str, Array]) -> GPT:
    """The model, without rematerialisation: there is no backward pass."""
    gpt = merge(graph, weights)
    gpt.remat = False
    return gpt
