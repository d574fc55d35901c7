"""Models of random weights to generate with, a tokenizer of bytes, and what the full forward pass says of their tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nanojax.config import Config, ModelConfig, TrainConfig
from nanojax.infer.load import Model
from nanojax.mesh import replicated
from nanojax.model import merge
from nanojax.ops.fp4 import QuantizedArray
from nanojax.ops.packed import CODES, PackedMatrix, for_kernels, span, unpacked
from nanojax.program import make_program
from nanojax.sizes import resolve
from nanojax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

BYTES = Tokenizer("bytes", SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})
SIZES = dict(depth=2, d_model=32, head_dim=8, n_kv_head=2, d_ffn=48, seq_len=64, vocab_size=BYTES.n_vocab)


jitted_unpacked = jax.jit(functools.partial(unpacked, dtype=jnp.float32))


def make_model(seed: int = 0, train: dict | None = None, **model) -> Model:
    """A tiny model with SIZES but for `model`, fp32, its random matrices large enough that every token matters."""
    config = Config(model=ModelConfig(**(SIZES | model)), train=TrainConfig(steps=1, loss_blocks=1, **(train or {})))
    program = make_program(resolve(config, BYTES.n_vocab), jax.devices()[:1])
    rng, weights = np.random.default_rng(seed), {}
    for name, leaf in sorted(program.shapes.params.items()):
        noise = rng.standard_normal(leaf.shape)
        weights[name] = jnp.asarray(1 + 0.3 * noise if leaf.ndim == 1 else noise / leaf.shape[0] ** 0.5, jnp.float32)
    return Model(program, jax.device_put(weights, replicated(program.mesh)), 0, "fp32")


def full_logits(model: Model, rows: list[list[int]]) -> list[np.ndarray]:
    """Of each row [T, V], by one whole forward pass over all, which no cache is in."""
    longest = max(map(len, rows))
    padded = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    forward = jax.jit(lambda weights, tokens_BT: merge(model.program.graph, weights)(tokens_BT))
    with jax.set_mesh(model.program.mesh):
        logits = np.asarray(forward(model.weights, padded))[..., : BYTES.n_vocab]
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def packed(q: QuantizedArray) -> PackedMatrix:
    """Codes [in, out] as the words of a matrix, by numpy."""
    codes_OWC = np.asarray(q.codes).T.reshape(q.codes.shape[1], -1, CODES).astype(np.uint32)
    words_OW = (codes_OWC << (4 * np.arange(CODES, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)
    scales_OG = np.ascontiguousarray(np.asarray(q.scales).T)
    scales_OG = scales_OG if q.format == "int4" else scales_OG.view(np.uint8)
    words_OW = for_kernels(words_OW, span(len(q.codes), scales_OG.shape[1]), q.format)
    return PackedMatrix(jnp.asarray(words_OW), jnp.asarray(scales_OG), q.global_scale, q.format)
