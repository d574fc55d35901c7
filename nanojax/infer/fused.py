"""A model laid out for one token at a time: five kernels a layer, each of which reads its matrix once, in bf16 or in 4 bits.

B rows, D model, V vocabulary, Y all heads that the projections make, H head size. Matrices are [out, in].
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nanojax.config import ModelConfig
from nanojax.infer.decode import Path
from nanojax.ops.attention_request import Request
from nanojax.ops.cache import Cache
from nanojax.ops.kernels.decode_attention import NewTokens, decode_attention
from nanojax.ops.kernels.matvec import AS_IS, MOST_ROWS, MOST_ROWS_PACKED, Around, Feed, Matrix, feed_of, matmul, matvec, most_rows
from nanojax.ops.norm import rms_norm
from nanojax.ops.packed import PackedMatrix, stacked
from nanojax.ops.rope import rope_table

STACKS = {"qkv": ("attention.q", "attention.k", "attention.v"), "o": ("attention.o",), "up": ("ffn.gate", "ffn.up"), "down": ("ffn.down",)}
"""Which matrices of a block are one here, one above the other."""
DTYPE = jnp.bfloat16
WORDS = f"fused kernels up to {MOST_ROWS} rows of a matrix in bf16 and {MOST_ROWS_PACKED} of a packed one"


class Layer(NamedTuple):
    """One block's weights."""

    qkv: Matrix
    o: Matrix
    up: Matrix
    """All gates above all ups, where there are gates."""
    down: Matrix
    norms: tuple[Array, Array]
    """Gains, of ones where the model has none."""
    qk_norms: tuple[Array, Array] | None


class FusedWeights(NamedTuple):
    """A model's weights."""

    embedding_VD: Array
    layers: tuple[Layer, ...]
    norm_D: Array
    head: Matrix


def refusal(request: Request) -> str | None:
    """Why the kernels cannot serve a model that asks this of its attention, or None when they can."""
    if request.platform not in ("gpu", "cuda"):
        return f"the kernels for single tokens run on NVIDIA GPUs, and the device is a {request.platform}"
    if request.capability is not None and float(request.capability) < 8:
        return f"the kernels for single tokens take compute capability 8.0 or more, given {request.capability}"
    if request.dtype != DTYPE:
        return f"the kernels for single tokens take bf16, and activations are {jnp.dtype(request.dtype).name}"
    if request.head_dim & (request.head_dim - 1):
        return f"the kernels for single tokens take head sizes that are powers of two, given {request.head_dim}"
    return None


def fuse(left: dict[str, Any], c: ModelConfig, dtype: DTypeLike = DTYPE) -> FusedWeights:
    """The weights, [in, out] or packed, laid out in `dtype`. The dictionary is emptied on the way, which frees what only it held."""

    def matrix(names: list[str]) -> Matrix:
        parts = [left.pop(name) for name in names]
        if isinstance(parts[0], PackedMatrix):
            return stacked(parts) if len(parts) > 1 else parts[0]
        return upright(parts, dtype)

    def gain(name: str, size: int) -> Array:
        return left.pop(name).astype(jnp.float32) if c.norm == "learnable" else jnp.ones(size, jnp.float32)

    layers = []
    for i in range(c.depth):
        stacks = {key: matrix([f"blocks.{i}.{n}.w" for n in names if f"blocks.{i}.{n}.w" in left]) for key, names in STACKS.items()}
        norms = (gain(f"blocks.{i}.norm_1.gain", c.width), gain(f"blocks.{i}.norm_2.gain", c.width))
        heads = [gain(f"blocks.{i}.attention.{n}_norm.gain", c.head_dim) for n in ("q", "k")] if c.qk_norm else None
        layers.append(Layer(**stacks, norms=norms, qk_norms=(heads[0], heads[1]) if heads else None))
        jax.block_until_ready(layers[-1])  # what is only on its way still holds the matrices that it is made of
    return FusedWeights(left.pop("embedding").astype(dtype), tuple(layers), gain("norm.gain", c.width), matrix(["head.w"]))


# Without tuning: to time ways of turning a matrix, XLA would hold it three times more.
@functools.partial(jax.jit, static_argnums=1, compiler_options={"xla_gpu_autotune_level": 0})
def upright(parts: list[Array], dtype: DTypeLike) -> Array:
    """Matrices [in, out] as one [outs, in]."""
    return jnp.concatenate([part.astype(dtype).T for part in parts])


def plain(fused: FusedWeights, c: ModelConfig) -> dict[str, Any]:
    """The weights by the model's own names, [in, out] or packed: what prompts are read with."""
    made: dict[str, Any] = {"embedding": fused.embedding_VD, "head.w": part(fused.head)}
    queries, keys = c.n_head * c.head_dim, c.kv_heads * c.head_dim
    ends = {"qkv": (queries, queries + keys, queries + 2 * keys), "o": (c.width,), "up": (c.hidden, 2 * c.hidden), "down": (c.width,)}
    for i, layer in enumerate(fused.layers):
        for key, names in STACKS.items():
            known = names if key != "up" or c.ffn == "swiglu" else names[1:]  # without gates the ups are alone
            for name, begin, end in zip(known, (0, *ends[key]), ends[key], strict=False):
                made[f"blocks.{i}.{name}.w"] = part(getattr(layer, key), slice(begin, end))
        if c.norm == "learnable":
            made |= {f"blocks.{i}.norm_{n + 1}.gain": gain for n, gain in enumerate(layer.norms)}
            made |= {f"blocks.{i}.attention.{n}_norm.gain": gain for n, gain in zip("qk", layer.qk_norms or (), strict=False)}
    return made | ({"norm.gain": fused.norm_D} if c.norm == "learnable" else {})


def part(w: Matrix, outputs: slice = slice(None)) -> Any:
    """Some outputs of a matrix, [in, out] or packed."""
    if isinstance(w, PackedMatrix):
        return dataclasses.replace(w, words_OW=w.words_OW[outputs], scales_OG=w.scales_OG[outputs])
    return w[outputs].T


def path(weights: dict[str, Any], c: ModelConfig, *, words: str, dtype: DTypeLike = DTYPE, interpret: bool = False) -> Path:
    """For the engine, on a GPU, or anywhere with `interpret`. Takes the weights over, as `fuse` does."""

    def token(fused: FusedWeights, token_B: Array, position_B: Array, valid_B: Array, caches: tuple[Cache, ...]):
        return one_token(fused, c, token_B, position_B, valid_B, caches, interpret=interpret)

    return Path(fuse(weights, c, dtype), functools.partial(plain, c=c), token, words)


def one_token(
    fused: FusedWeights,
    c: ModelConfig,
    token_B: Int[Array, " B"],
    position_B: Int[Array, " B"],
    valid_B: Bool[Array, " B"],
    caches: tuple[Cache, ...],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """(logits in float32, caches with the valid tokens in them) of one more token of each row."""
    rows, dtype = len(token_B), fused.embedding_VD.dtype

    def feed(w: Matrix) -> Feed:
        return feed_of(w) if rows <= most_rows(w) else AS_IS

    def product(x_BI: Array, w: Matrix, around: Around, *, dtype: DTypeLike) -> Any:
        if rows <= most_rows(w):
            return matvec(x_BI, w, around, dtype=dtype, interpret=interpret)
        return matmul(x_BI, w, around, dtype=dtype)

    rope_2BC = jnp.stack([table_B1H[:, 0, : c.head_dim // 2] for table_B1H in rope_table(position_B[:, None], c.head_dim, c.rope_base)])
    x_BD = fused.embedding_VD[token_B]
    x_BD = rms_norm(x_BD) if c.embed_norm else x_BD
    fed_BD = feed(fused.layers[0].qkv).of(x_BD.astype(jnp.float32) * fused.layers[0].norms[0][None], dtype)
    following = [*((layer.norms[0], layer.qkv) for layer in fused.layers[1:]), (fused.norm_D, fused.head)]
    written, came_BK = [], jnp.zeros((rows, c.kv_heads), jnp.int32)
    for i, (layer, (next_gain, next_matrix)) in enumerate(zip(fused.layers, following, strict=True)):
        with jax.named_scope(f"block_{i}"):
            qkv_BYH = product(fed_BD, layer.qkv, Around(rms_of_BI=x_BD), dtype=dtype).reshape(rows, -1, c.head_dim)
            new = NewTokens(qkv_BYH, rope_2BC, position_B, valid_B, came_BK)
            y_BX, cache, came_BK = decode_attention(
                new, caches[i], layer.qk_norms, window=c.windows[i], feed=feed(layer.o), interpret=interpret
            )
            written.append(cache)
            add = Around(stream_BO=x_BD, gain_O=layer.norms[1], feed=feed(layer.up))
            x_BD, fed_BD = product(y_BX, layer.o, add, dtype=dtype)
            h_BF = product(fed_BD, layer.up, Around(rms_of_BI=x_BD, ffn=c.ffn, feed=feed(layer.down)), dtype=dtype)
            add = Around(stream_BO=x_BD, gain_O=next_gain, feed=feed(next_matrix))
            x_BD, fed_BD = product(h_BF, layer.down, add, dtype=dtype)
    with jax.named_scope("head"):
        logits_BV = product(fed_BD, fused.head, Around(rms_of_BI=x_BD), dtype=jnp.float32)
    return logits_BV if c.softcap is None else c.softcap * jnp.tanh(logits_BV / c.softcap), tuple(written)
