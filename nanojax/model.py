"""The GPT, in Flax NNX.

Letters: B batch, T tokens, D model, F feed-forward, N query heads, K key and value heads, H head, V vocabulary. Kernels are [in, out].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nanojax.config import ModelConfig
from nanojax.mesh import parts, place
from nanojax.ops.attention import AttentionFn
from nanojax.ops.dot import dot as plain_dot
from nanojax.ops.elementwise import PLAIN, Elementwise, project
from nanojax.ops.norm import Normed, rms_norm
from nanojax.ops.rope import rope_table, rotate
from nanojax.vocabulary import look_up

Dot = Callable[..., Array]
Attend = Callable[[Array, Array, Array], Array]
"""(q_BTNH, k_BTKH, v_BTKH) -> y_BTNH: what a layer sees, its window, documents and cache, is the caller's."""


def scaled_normal(key: Array, shape: tuple[int, int]) -> Array:
    """Normal with std min(1, sqrt(out / in)) / sqrt(in). Yang et al. 2023, arXiv:2310.17813, equation 2 with both norms of order 1."""
    fan_in, fan_out = shape
    return jax.random.normal(key, shape, jnp.float32) * min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5


def zeros(key: Array, shape: tuple[int, int]) -> Array:
    """The projections back into the residual stream and the head start at zero: every block starts as the identity."""
    del key
    return jnp.zeros(shape, jnp.float32)


class Linear(nnx.Module):
    """A bias-free product with a [in, out] kernel, fp32."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str, str], *, dot: Dot, name: str, key: Array, init=scaled_normal):
        self.w = nnx.Param(init(key, shape), out_sharding=axes)
        self.key: nnx.Variable | None = nnx.data(None)
        self.ready: Any = nnx.data(None)
        """What was made of the matrix before, if it was; of several that are multiplied as one, the first has it of all."""
        self.dot = functools.partial(dot, name=name)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        key = None if self.key is None else jax.random.wrap_key_data(self.key[...])
        return self.dot(x, self.w.get_value(), key=key, **({} if self.ready is None else {"ready": self.ready}))


class RMSNorm(nnx.Module):
    """The gain of an RMSNorm, or none: the norm itself is part of what lies between products (ops/elementwise.py)."""

    def __init__(self, size: int, *, learnable: bool):
        self.gain = nnx.Param(jnp.ones(size, jnp.float32), out_sharding=("gain",)) if learnable else None

    @property
    def weight(self) -> Array | None:
        """The gain, if there is one."""
        return None if self.gain is None else self.gain[...]


class Attention(nnx.Module):
    """Causal self-attention with grouped queries, norms on queries and keys, and rotary positions."""

    def __init__(self, c: ModelConfig, *, dot: Dot, key: Array, elementwise: Elementwise = PLAIN):
        k_q, k_k, k_v, k_o = jax.random.split(key, 4)
        queries, keys = c.n_head * c.head_dim, c.kv_heads * c.head_dim
        self.q = Linear((c.width, queries), ("embed", "heads"), dot=dot, name="q", key=k_q)
        self.k = Linear((c.width, keys), ("embed", "kv_heads"), dot=dot, name="k", key=k_k)
        self.v = Linear((c.width, keys), ("embed", "kv_heads"), dot=dot, name="v", key=k_v)
        self.o = Linear((queries, c.width), ("heads", "embed"), dot=dot, name="o", key=k_o, init=zeros)
        learnable = c.qk_norm and c.norm == "learnable"
        self.q_norm = RMSNorm(c.head_dim, learnable=learnable)
        self.k_norm = RMSNorm(c.head_dim, learnable=learnable)
        self.project = elementwise.project if c.qk_norm else functools.partial(project, turn=only_rotate)
        self.head_dim = c.head_dim

    def __call__(self, x_BTD: Float[Array, "B T D"] | Normed, rope, attend: Attend) -> Float[Array, "B T D"]:
        products, gains = (self.q, self.k, self.v), (self.q_norm.weight, self.k_norm.weight)
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, products, gains, rope, self.head_dim)
        with jax.named_scope("attend"):
            y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
        with jax.named_scope("out"):
            return self.o(y_BTNH.reshape(*y_BTNH.shape[:2], -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv:2002.05202, equation 6."""

    def __init__(self, c: ModelConfig, *, dot: Dot, key: Array, elementwise: Elementwise = PLAIN):
        k_gate, k_up, k_down = jax.random.split(key, 3)
        self.gate = Linear((c.width, c.hidden), ("embed", "ffn"), dot=dot, name="gate", key=k_gate)
        self.up = Linear((c.width, c.hidden), ("embed", "ffn"), dot=dot, name="up", key=k_up)
        self.down = Linear((c.hidden, c.width), ("ffn", "embed"), dot=dot, name="down", key=k_down, init=zeros)
        self.feed_forward = elementwise.feed_forward

    def __call__(self, x_BTD: Float[Array, "B T D"] | Normed) -> Float[Array, "B T D"]:
        return self.feed_forward(x_BTD, self.gate, self.up, self.down)


class ReLU2(nnx.Module):
    """down(relu(up(x)) ** 2). So et al. 2021, arXiv:2109.08668, section 4."""

    def __init__(self, c: ModelConfig, *, dot: Dot, key: Array, elementwise: Elementwise = PLAIN):
        del elementwise
        k_up, k_down = jax.random.split(key)
        self.up = Linear((c.width, c.hidden), ("embed", "ffn"), dot=dot, name="up", key=k_up)
        self.down = Linear((c.hidden, c.width), ("ffn", "embed"), dot=dot, name="down", key=k_down, init=zeros)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jnp.square(jax.nn.relu(self.up(x_BTD))))


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each on a normalised input and added to the stream.

    The last sum of a layer is left to the next one, which norms it in the same pass: what goes in and out is a stream and what is to be
    added to it, or None.
    """

    def __init__(self, c: ModelConfig, *, dot: Dot, key: Array, elementwise: Elementwise = PLAIN):
        k_attention, k_ffn = jax.random.split(key)
        self.norm_1 = RMSNorm(c.width, learnable=c.norm == "learnable")
        self.attention = Attention(c, dot=dot, key=k_attention, elementwise=elementwise)
        self.norm_2 = RMSNorm(c.width, learnable=c.norm == "learnable")
        self.ffn = {"swiglu": SwiGLU, "relu2": ReLU2}[c.ffn](c, dot=dot, key=k_ffn, elementwise=elementwise)
        # Only what is multiplied as one can make its norm itself: what is written for several is written at once.
        read, written = elementwise.add_and_read, elementwise.add_and_norm
        self.before_attention, self.before_ffn = read if c.qk_norm else written, read if c.ffn == "swiglu" else written

    def __call__(self, x_BTD: Array, y_BTD: Array | None, rope, attend: Attend) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        with jax.named_scope("attention"):
            x_BTD, h_BTD = self.before_attention(x_BTD, y_BTD, self.norm_1.weight)
            y_BTD = self.attention(h_BTD, rope, attend)
        with jax.named_scope("ffn"):
            x_BTD, h_BTD = self.before_ffn(x_BTD, y_BTD, self.norm_2.weight)
            return x_BTD, self.ffn(h_BTD)


def make_blocks(block: Callable[..., Block], depth: int, key: Array) -> list[Block]:
    """`depth` blocks, their parameters drawn in a loop: a model's worth of separate draws takes XLA a minute to compile for a GPU."""
    graphs = []

    def draw(k: Array) -> nnx.State:
        graph, state = nnx.split(block(key=k), nnx.Param)
        graphs.append(graph)
        return state

    stacked = jax.lax.map(draw, jax.random.split(key, depth))
    return [nnx.merge(graphs[0], jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(depth)]


class GPT(nnx.Module):
    """Decoder-only transformer. Parameters are fp32; activations are in `compute_dtype`.

    It gets the attention, the matrix product and what lies between them as functions and never reads the name of a backend or a format.
    """

    def __init__(
        self,
        c: ModelConfig,
        *,
        attention: AttentionFn,
        key: Array,
        compute_dtype: jnp.dtype = jnp.float32,
        dot: Dot = plain_dot,
        elementwise: Elementwise = PLAIN,
        remat: bool = False,
    ):
        k_embed, k_head, k_blocks = jax.random.split(key, 3)
        self.embedding = nnx.Param(jax.random.normal(k_embed, (c.vocab_size, c.width), jnp.float32), out_sharding=("vocab", "embed"))
        self.blocks = nnx.List(make_blocks(functools.partial(Block, c, dot=dot, elementwise=elementwise), c.depth, k_blocks))
        self.norm = RMSNorm(c.width, learnable=c.norm == "learnable")
        self.head = Linear((c.width, c.vocab_size), ("embed", "vocab"), dot=dot, name="head", key=k_head, init=zeros)
        self.embed_norm = rms_norm if c.embed_norm else identity
        self.add_and_norm = elementwise.add_and_norm
        self.head_dim, self.rope_base, self.softcap = c.head_dim, c.rope_base, c.softcap
        self.attention, self.windows = attention, c.windows
        self.compute_dtype, self.remat = compute_dtype, remat

    def hidden(self, tokens_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """What the head reads: the last block's output, normalised."""
        return self.from_embeddings(self.embed(tokens_BT), segments_BT)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding, in the compute dtype."""
        with jax.named_scope("embed"):
            # From the fp32 table, so that its gradient, a scatter-add with many collisions, is summed in fp32.
            if parts("embed") > 1:
                return place(look_up(self.embedding[...], tokens_BT, self.compute_dtype), "batch", "tokens", None)
            table_VD = place(self.embedding[...], "vocab", None)
            return place(table_VD[tokens_BT].astype(self.compute_dtype), "batch", "tokens", None)

    def from_embeddings(self, x_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """`hidden` of rows that are embedded already."""
        attends = [functools.partial(self.attention, window=window, segments_BT=segments_BT) for window in self.windows]
        return self.through_blocks(x_BTD, jnp.arange(x_BTD.shape[1]), attends)

    def through_blocks(self, x_BTD: Float[Array, "B T D"], positions: Int[Array, "*B T"], attends: Sequence[Attend]) -> Array:
        """Embedded rows [B, T, D] through every block, each with its own attention, and the last norm; tokens are at `positions`."""
        rope = rope_table(positions, self.head_dim, self.rope_base)
        x_BTD, y_BTD = self.embed_norm(x_BTD), None
        for i, (block, attend) in enumerate(zip(self.blocks, attends, strict=True)):
            layer = layer_of(rope, attend)
            with jax.named_scope(f"block_{i}"):
                x_BTD, y_BTD = (nnx.remat(layer) if self.remat else layer)(block, x_BTD, y_BTD)
                if self.remat:  # what is kept of a layer is what it is given
                    x_BTD, y_BTD = x_BTD + y_BTD, None
        with jax.named_scope("final_norm"):
            return self.add_and_norm(x_BTD, y_BTD, self.norm.weight)[1]

    def __call__(self, tokens_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """All logits, in float32. Training does not come here: its loss never makes them all (ops/xent.py)."""
        return self.logits(self.hidden(tokens_BT, segments_BT))

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Of `hidden`'s output, in float32."""
        logits = self.head(x).astype(jnp.float32)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def layer_of(rope: tuple[Array, Array], attend: Attend) -> Callable[[Block, Array, Array | None], tuple[Array, Array]]:
    """(block, x_BTD, y_BTD) -> (x_BTD, y_BTD), for rematerialisation, which takes no function among its arguments."""

    def layer(block: Block, x_BTD: Array, y_BTD: Array | None) -> tuple[Array, Array]:
        return block(x_BTD, y_BTD, rope, attend)

    return layer


def identity(x: Array) -> Array:
    """What stands in for a norm that is switched off."""
    return x


def only_rotate(x_BTNH: Array, gain: Array | None, rope: tuple[Array, Array]) -> Array:
    """What turns queries and keys where they have no norm."""
    del gain
    return rotate(x_BTNH, rope)


def split(build: Callable[[], GPT]) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """(graph, shapes, logical axes) of the model that `build` makes, without making its arrays.

    Parameters are a flat dict from here on: 'blocks.0.attention.q.w' -> array, the names that checkpoints and exports carry.
    """
    made = []

    def trace() -> dict[str, Array]:
        model = build()
        made.append(nnx.split(model, nnx.Param))
        return parameters(model)

    # Not nnx.eval_shape, which wants logical axes to be mesh axes when a mesh is set.
    shapes = jax.eval_shape(trace)
    graph, state = made[0]
    return graph, shapes, {name_of(path): leaf.get_metadata()["out_sharding"] for path, leaf in nnx.to_flat_state(state)}


def parameters(model: GPT) -> dict[str, Array]:
    """Name -> array."""
    return {name_of(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def merge(graph: nnx.GraphDef, params: dict[str, Array]) -> GPT:
    """The model with these parameters; the inverse of `split` and `parameters`."""
    flat = ((tuple(int(part) if part.isdigit() else part for part in name.split(".")), nnx.Param(leaf)) for name, leaf in params.items())
    return nnx.merge(graph, nnx.from_flat_state(flat))


def give_keys(model: GPT, key: Array, rounds: Mapping[str, Any]) -> None:
    """Let the products with these parameters draw, each from a part of `key` of its own, and give them what was made of theirs before."""
    for i, (path, module) in enumerate(nnx.iter_modules(model) if rounds else ()):
        if isinstance(module, Linear) and (name := name_of((*path, "w"))) in rounds:
            module.key = nnx.Variable(jax.random.key_data(jax.random.fold_in(key, i)))
            module.ready = nnx.data(rounds[name])


def name_of(path: Sequence[Any]) -> str:
    """The path of a parameter in the module tree, as one name."""
    return ".".join(map(str, path))
