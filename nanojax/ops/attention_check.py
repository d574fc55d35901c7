"""How far an attention backend is from the reference, forward and backward, on this device.

B batch, T tokens, N query heads, K key and value heads, H head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nanojax.ops.attention import AttentionFn, make_attention, reference_attention
from nanojax.ops.attention_request import Request

RESULTS = ("output", "dq", "dk", "dv")
# Largest deviation from the reference, of the largest value or of 1 if that is smaller. bf16 and fp16: two roundings, of the weights
# and of the result, to 8 and 11 bits, and sums of such terms. fp32: another order of the same sums.
TOLERANCES = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 3e-5}
# Programs here run once: trying out which kernel is fastest for a product, or a fusion, takes XLA longer than all the rest. No backend's
# own kernel is chosen that way. CPUs take these options as well, to no effect.
COMPILER_OPTIONS: dict[str, bool | int] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Worst(NamedTuple):
    """Where a result is furthest from the reference."""

    share: float
    """Of what is tolerated; infinity where one is not finite."""
    place: tuple[int, ...]
    """Index of the value."""
    got: float
    want: float
    beyond: int
    """Values that are further off than is tolerated."""
    size: int
    """Values in all."""


def draw(request: Request, seed: int = 0) -> tuple[Array, Array, Array, Array, Array | None]:
    """(q, k, v, cotangent of the output, segments or None), normal numbers; rows are cut at different places.

    The first row has as many documents as may be, one-token documents among them, the others fewer and fewer, the last only one.
    """
    rng = np.random.default_rng(seed)
    b, t, n, k, h = request.rows, request.tokens, request.heads, request.kv_heads, request.head_dim
    arrays = [jnp.asarray(rng.standard_normal((b, t, heads, h)), request.dtype) for heads in (n, k, k, n)]
    if request.documents is None:
        return arrays[0], arrays[1], arrays[2], arrays[3], None
    begins_BT = np.zeros((b, t), np.int32)
    for row, count in enumerate(np.linspace(min(request.documents, t), 1, b).astype(int)):
        begins_BT[row, rng.choice(np.arange(1, t), count - 1, replace=False)] = 1
    return arrays[0], arrays[1], arrays[2], arrays[3], jnp.asarray(1 + np.cumsum(begins_BT, axis=1), jnp.int32)


def with_gradients(attention: AttentionFn, window: int | None) -> Callable[..., tuple[Array, ...]]:
    """(q, k, v, cotangent, segments) -> (output, dq, dk, dv)."""

    def run(q, k, v, cotangent, segments):
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, window=window, segments_BT=segments), q, k, v)
        return out, *vjp(cotangent)

    return run


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def reference(window: int | None, *inputs):
    """What `with_gradients` makes of the reference."""
    with jax.default_matmul_precision("highest"):  # GPUs would multiply float32 as TF32
        return with_gradients(reference_attention, window)(*inputs)


def prepared(name: str, request: Request) -> Callable[[], dict[str, Worst]]:
    """Compile a backend and the reference for each window of a request. The function made runs them and says where each result is worst:
    `dq, window 17`.

    Raises whatever the backend raises.
    """
    inputs = draw(request)
    *floats, segments = inputs
    exact = (*(np.asarray(x, np.float32) for x in floats), segments)  # cast on the host: nothing to compile
    programs: dict[int | None, tuple[Any, Any]] = {}
    for window in dict.fromkeys(request.windows):
        run = jax.jit(with_gradients(make_attention(name, request.documents), window), compiler_options=COMPILER_OPTIONS)
        programs[window] = run.lower(*inputs).compile(), reference.lower(window, *exact).compile()

    def measure() -> dict[str, Worst]:
        found = {}
        for window, (program, truth) in programs.items():
            for result, got, want in zip(RESULTS, program(*inputs), truth(*exact), strict=True):
                if got.dtype != jnp.dtype(request.dtype) or got.shape != want.shape:
                    raise ValueError(f"{name} gave {got.dtype}{list(got.shape)} where {jnp.dtype(request.dtype)}{list(want.shape)} was due")
                worst = worst_of(np.asarray(got, np.float64), np.asarray(want, np.float64), str(got.dtype))
                found[f"{result}, window {window}"] = worst
        return found

    return measure


def prepared_all(cases: Sequence[tuple[str, Request]]) -> list[Callable[[], dict[str, Worst]]]:
    """`prepared` of many (backend, request), compiled in threads; what a backend raises then is raised when its function is called.

    cuDNN's come one by one, and nothing runs before all are done: where XLA compiles a call of cuDNN it records a CUDA graph, and what
    another thread asks of CUDA meanwhile breaks both.
    """

    def later(name: str, request: Request) -> Callable[[], dict[str, Worst]]:
        try:
            return prepared(name, request)
        except Exception as error:  # whatever a kernel raises is the finding
            found = error

        def fail() -> dict[str, Worst]:
            raise found

        return fail

    alone = {i: later(*case) for i, case in enumerate(cases) if case[0] == "cudnn"}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {i: pool.submit(later, *case) for i, case in enumerate(cases) if i not in alone}
    return [alone[i] if i in alone else futures[i].result() for i in range(len(cases))]


def share(found: dict[str, Worst]) -> float:
    """The largest deviation, as a share of what is tolerated: above 1 a backend is wrong. NaN counts as infinity."""
    return max(worst.share for worst in found.values())


def worst_of(got: np.ndarray, want: np.ndarray, dtype: str) -> Worst:
    """Where |got - want| is largest, over max(1, largest |want|) times the tolerance of the type; infinity where either is not finite."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        shares = np.abs(got - want) / (TOLERANCES[dtype] * max(1.0, np.abs(want).max()))
    shares[~np.isfinite(shares)] = math.inf
    place = tuple(map(int, np.unravel_index(shares.argmax(), shares.shape)))
    return Worst(float(shares[place]), place, float(got[place]), float(want[place]), int((shares > 1).sum()), shares.size)


def small(request: Request) -> Request:
    """A case of the same kind that takes a moment: head size, ratio of heads, documents and one window, on two short rows."""
    group = request.heads // request.kv_heads
    windows = [window for window in request.windows if window is not None]
    return dataclasses.replace(
        request,
        rows=2,
        tokens=min(request.tokens, 256),
        heads=2 * group,
        kv_heads=2,
        windows=(None, min(windows[0], 100)) if windows and None in request.windows else (min(windows[0], 100),) if windows else (None,),
    )


def self_test(name: str, request: Request) -> float:
    """`share` of a small case of a request's kind. Raises ValueError, naming backend and error, where it is wrong or fails."""
    case = small(request)
    try:
        found = share(prepared(name, case)())
    except Exception as error:  # whatever a kernel raises is the finding
        what = (str(error).splitlines() or [""])[0]
        raise ValueError(f"attn_impl={name} failed its self-test: {type(error).__name__}: {what:.200}; try another --attn-impl") from error
    if not found <= 1:
        raise ValueError(
            f"attn_impl={name} failed its self-test: {found:.3g} times the tolerated deviation from the reference "
            f"({case.heads} heads, {case.kv_heads} kv, of {case.head_dim}); try another --attn-impl"
        )
    return found
