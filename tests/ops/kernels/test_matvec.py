"""Matrix-vector kernels against sums in float64: on a CPU interpreted, on a GPU as they are compiled."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generating import packed

from nanojax.ops.fp4 import dequantize, quantize
from nanojax.ops.kernels.matvec import GROWTH, Around, Cut, Feed, feed_of, matmul, matvec
from nanojax.ops.packed import PackedMatrix, for_kernels, stacked, unpacked

jitted_quantize, jitted_dequantize = jax.jit(quantize, static_argnames=("format", "block")), jax.jit(dequantize)
FORMATS = ("bf16", "int4", "nvfp4", "mxfp4")


def make(format: str, outputs: int, inputs: int, seed: int = 0):
    """(matrix, what it stands for [out, in] in float64)."""
    w_IO = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32) * 0.1
    if format == "bf16":
        w_OI = jnp.asarray(w_IO.T, jnp.bfloat16)
        return w_OI, np.asarray(w_OI, np.float64)
    q = jitted_quantize(w_IO, format, block=32 if format == "int4" else None)
    return packed(q), np.asarray(jitted_dequantize(q), np.float64).T


def wanted(x_BI, w_OI, around: Around) -> list[np.ndarray]:
    """By numpy in float64, the second of two only for a stream."""
    y_BO = np.asarray(x_BI, np.float64) @ w_OI.T
    if around.rms_of_BI is not None:
        y_BO /= np.sqrt(np.mean(np.asarray(around.rms_of_BI, np.float64) ** 2, axis=1, keepdims=True) + 1e-6)
    if around.ffn == "swiglu":
        gate_BO, up_BO = np.split(y_BO, 2, axis=1)
        y_BO = gate_BO / (1 + np.exp(-gate_BO)) * up_BO
    if around.ffn == "relu2":
        y_BO = np.maximum(y_BO, 0) ** 2
    if around.stream_BO is None:
        return [y_BO]
    new_BO = np.asarray(around.stream_BO, np.float64) + y_BO
    return [new_BO, new_BO * np.asarray(around.gain_O, np.float64)]


def surroundings(rows: int, outputs: int, inputs: int) -> list[Around]:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return [
        Around(),
        Around(rms_of_BI=normal(rows, inputs)),
        Around(rms_of_BI=normal(rows, inputs), ffn="swiglu"),
        Around(rms_of_BI=normal(rows, inputs), ffn="relu2"),
        Around(stream_BO=normal(rows, outputs), gain_O=normal(outputs)),
    ]


def check(format: str, sizes: tuple[int, int, int], tolerance: float, cut: Cut | None, *, interpret: bool, every: bool) -> None:
    """Of (rows, outputs, inputs), with all surroundings or two of them: they take long to compile."""
    rows, outputs, inputs = sizes
    w, w_OI = make(format, outputs, inputs)
    x_BI = jnp.asarray(np.random.default_rng(2).standard_normal((rows, inputs)), jnp.float32)
    given = feed_of(w).of(x_BI, jnp.float32 if interpret else jnp.bfloat16)
    arounds = surroundings(rows, outputs, inputs)
    arounds = arounds if every else arounds[2::2]
    made = jax.jit(lambda x, w: [matvec(x, w, around, dtype=jnp.float32, cut=cut, interpret=interpret) for around in arounds])(given, w)
    for got, around in zip(made, arounds, strict=True):
        for a, b in zip(got if isinstance(got, tuple) else [got], wanted(x_BI, w_OI, around), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


INTERPRETED = {"bf16": (3, 16, 88), "int4": (1, 48, 160), "nvfp4": (2, 16, 352), "mxfp4": (1, 48, 160)}


@pytest.mark.parametrize(
    ("format", "every"),
    [
        ("nvfp4", True),
        *((format, False) for format in ("bf16", "int4", "mxfp4")),
        *(pytest.param(format, True, marks=pytest.mark.slow) for format in ("bf16", "int4", "mxfp4")),
    ],
)
def test_a_product_and_what_surrounds_it_are_those_of_float64(format, every):
    """Inputs that no power of two divides are read in pieces of several sizes."""
    check(format, INTERPRETED[format], 1e-5, Cut(8, 16), interpret=True, every=every)  # sums of float32


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_the_compiled_kernels_agree_on_a_gpu(format):
    # E2M1 is multiplied in bf16: inputs, products and sums of four are rounded to 8 bits.
    tolerance = 1e-5 if format in ("bf16", "int4") else 1.5e-2
    for rows, outputs, inputs in ((1, 256, 1280), (2, 48, 1408), (8, 64, 736)):
        check(format, (rows, outputs, inputs), tolerance, None, interpret=False, every=rows == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_every_code_times_one_is_exact_on_a_gpu(format):
    """All sixteen codes in all eight places of a word, denormals of bf16 among them."""
    codes = (np.arange(16)[:, None] + np.arange(32)[None, :]) % 16  # a row has each code, each place each code
    words = (codes.reshape(16, 4, 8).astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)
    scales = jnp.full((16, 2), 0x38, jnp.uint8) if format == "nvfp4" else jnp.full((16, 1), 127, jnp.uint8)  # 1
    words = for_kernels(words, 16 if format == "nvfp4" else 32, format)
    w = PackedMatrix(jnp.asarray(words), scales, jnp.float32(1) if format == "nvfp4" else None, format)
    values = np.asarray(unpacked(w, jnp.float32)).T
    assert set(np.abs(values).ravel()) == {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    product = jax.jit(lambda x_BI: matvec(feed_of(w).of(x_BI, jnp.bfloat16), w, dtype=jnp.float32))
    for i in range(0, 32, 8):  # one input at a time, in each of the rows of a batch
        np.testing.assert_array_equal(product(jnp.eye(32)[i : i + 8]), values[:, i : i + 8].T)


@pytest.mark.parametrize("format", FORMATS)
def test_the_product_of_many_rows_is_that_of_the_kernel(format):
    w, w_OI = make(format, 32, 64)
    x_BI = jnp.asarray(np.random.default_rng(2).standard_normal((9, 64)), jnp.bfloat16).astype(jnp.float32)
    arounds = surroundings(9, 32, 64)
    made = jax.jit(lambda x, w: [matmul(x, w, around, dtype=jnp.float32) for around in arounds])(x_BI, w)
    for got, around in zip(made, arounds, strict=True):
        for a, b in zip(got if isinstance(got, tuple) else [got], wanted(x_BI, w_OI, around), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())  # inputs, and weights of packed formats, are bf16


def test_inputs_lie_by_their_place_in_a_span_and_outputs_are_written_there():
    x_BI, feed = jnp.arange(32.0)[None], Feed(16, 4.0)
    assert feed.of(x_BI, jnp.bfloat16)[0, :5].tolist() == [0, 64, 4, 68, 8]
    assert feed.of(x_BI, jnp.bfloat16).dtype == jnp.bfloat16
    assert jnp.zeros(32).at[feed.at(jnp.arange(32), 32)].set(4 * x_BI[0]).tolist() == feed.of(x_BI, jnp.float32)[0].tolist()
    assert Feed().of(x_BI, jnp.bfloat16).tolist() == x_BI.tolist()
    w, _ = make("bf16", 32, 64)
    x_BI = jnp.ones((2, 64))
    for around in (Around(), Around(stream_BO=jnp.zeros((2, 32)), gain_O=jnp.ones(32))):
        for product in (functools.partial(matvec, interpret=True), matmul):
            plain, moved = (product(x_BI, w, dataclasses.replace(around, feed=f), dtype=jnp.float32) for f in (Feed(), feed))
            plain, moved = (y if isinstance(y, tuple) else (y, y) for y in (plain, moved))
            np.testing.assert_array_equal(moved[1], feed.of(plain[1], jnp.float32))
            if around.stream_BO is not None:
                np.testing.assert_array_equal(moved[0], plain[0])


def test_each_kind_of_matrix_has_its_feed():
    words, scales = jnp.zeros((8, 8), jnp.int32), {"int4": 2, "nvfp4": 4, "mxfp4": 2}
    packed_ones = {format: PackedMatrix(words, jnp.zeros((8, n), jnp.uint8), None, format) for format, n in scales.items()}
    feeds = {format: feed_of(w) for format, w in {"bf16": jnp.zeros((8, 64), jnp.bfloat16), **packed_ones}.items()}
    assert feeds == {"bf16": Feed(1, 1.0), "int4": Feed(32, 1.0), "nvfp4": Feed(16, GROWTH), "mxfp4": Feed(32, GROWTH)}


def test_int4_scales_of_several_spans_are_each_where_they_belong():
    w_IO = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32) * np.repeat([1.0, 8.0], 128)[:, None].astype(np.float32)
    q = jitted_quantize(w_IO, "int4", block=128)
    w, x_BI = packed(q), jnp.asarray(np.random.default_rng(1).standard_normal((1, 256)), jnp.float32)
    got = matvec(feed_of(w).of(x_BI, jnp.float32), w, dtype=jnp.float32, interpret=True)
    np.testing.assert_allclose(got, np.asarray(x_BI, np.float64) @ np.asarray(jitted_dequantize(q), np.float64), atol=1e-4)


def test_packed_matrices_have_the_sizes_of_what_they_hold_and_stack():
    w, w_OI = make("nvfp4", 16, 32)
    assert w.shape == (16, 32)
    assert w.nbytes == 16 * 32 // 2 + 16 * 2 + 4
    both = stacked([w, w])
    np.testing.assert_array_equal(unpacked(both, jnp.float32), np.concatenate([w_OI, w_OI]).T)
