"""A model whose tokens are cut over `context`, beside data, fsdp and tensor: eight devices compute what one does, by kernels too."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight import answer, measured
from flax import nnx
from jax.sharding import NamedSharding

from nanojax import vocabulary
from nanojax.checks import parse_mesh
from nanojax.config import Config, DataConfig, ModelConfig, TrainConfig
from nanojax.mesh import batch_sharding, make_mesh, per_device, per_shard, spec
from nanojax.ops.attention import make_attention
from nanojax.ops.attention_check import RESULTS, draw, reference, with_gradients, worst_of
from nanojax.ops.attention_request import Request
from nanojax.sizes import resolve

B, T, V = 8, 32, 128
MODEL = dict(depth=2, d_model=64, head_dim=8, n_kv_head=2, d_ffn=96, seq_len=T, vocab_size=V, softcap=15.0)
# Name -> (mesh, changes of the model, rows of several documents, backend, remat, elementwise work by kernels).
QUICK = {"a window within a shard": ("fsdp=2,context=2,tensor=2", dict(depth=1, window=5, window_pattern="S"), True, "xla", True, False)}
SLOW = {
    "windows in a layer of two": ("fsdp=2,context=2,tensor=2", dict(window=5, window_pattern="SL"), True, "reference", False, False),
    "windows over shards": ("data=2,context=4", dict(window=20, window_pattern="S"), True, "reference", False, False),
    "a head each": ("context=8", {}, False, "xla", False, False),
    "kernels": ("data=2,fsdp=2,context=2", {}, False, "xla", True, True),
    "kernels beside tensor": ("data=2,context=2,tensor=2", {}, False, "xla", False, True),
    "work within a product": ("data=2,fsdp=2,context=2", {}, False, "xla", False, "within a product"),
}


# In the process with eight devices ----------------------------------------------------------------------------------------------------


def computed(mesh: str, model: dict, packed: bool, backend: str, remat: bool, kernels: bool | str) -> tuple[dict, str]:
    """(loss, logits and gradients by name, compiled text) of random weights on random rows."""
    from nanojax.data.loader import Batch
    from nanojax.model import merge, split
    from nanojax.ops.elementwise import PLAIN
    from nanojax.ops.elementwise import kernels as by_kernels
    from nanojax.ops.kernels import feed_forward, wgmma
    from nanojax.ops.products import PLAIN_PRODUCTS
    from nanojax.ops.xent import total_nats
    from nanojax.program import build_model, make_program
    from nanojax.step import microbatch_nats

    train = TrainConfig(steps=1, batch_tokens=B * T, mesh=mesh, loss_blocks=2, attn_impl=backend, remat=remat)
    config = Config(model=ModelConfig(**(MODEL | model)), train=train, data=DataConfig(mask_documents=packed))
    program = make_program(resolve(config, V), jax.devices()[:1] if mesh == "data=1" else None)
    assert (program.attention, program.rows) == (backend, B)
    spread, whole = functools.partial(per_device, mesh=program.mesh), program.mesh.shape["tensor"] == 1
    within = kernels == "within a product"
    if within:  # written out: this model is smaller than a tile
        feed_forward.serves, wgmma.multiply = (lambda *_: True), wgmma.multiply_reference
    between = by_kernels(spread, PLAIN_PRODUCTS, whole=whole, hopper=1 if within else None, interpret=True) if kernels else PLAIN
    with nnx.use_eager_sharding(False):
        graph = split(lambda: build_model(program, between, jax.random.key(0)))[0]

    rng, params = np.random.default_rng(0), {}
    for name, leaf in sorted(program.shapes.params.items()):  # random: at the start head, o and down are zero, and hide most mistakes
        draw = rng.standard_normal(leaf.shape).astype(np.float32)
        params[name] = jax.device_put(1 + 0.3 * draw if leaf.ndim == 1 else draw / leaf.shape[0] ** 0.5, program.shardings.params[name])
    tokens = rng.integers(V, size=(1, B, T + 1)).astype(np.int32)
    starts = np.sort(rng.choice(np.arange(1, T), (1, B, 3), replace=True))[..., None]
    segments = 1 + (starts <= np.arange(T)).sum(axis=2).astype(np.int32)
    batch = jax.device_put((tokens[..., :-1], tokens[..., 1:], segments), batch_sharding(program.mesh))

    def run(params, inputs, targets, segments):
        micro = Batch(inputs[0], targets[0], segments[0])
        total = vocabulary.per_device(functools.partial(total_nats, blocks=2, of_logits=between.nats_and_gradient), program.mesh)
        loss, grads = jax.value_and_grad(lambda w: microbatch_nats(graph, w, micro, jax.random.key(0), total=total, packed=packed))(params)
        return {"loss": loss, "logits": merge(graph, params)(micro.inputs, micro.segments if packed else None), **grads}

    with jax.set_mesh(program.mesh):
        compiled = jax.jit(run).lower(params, *batch).compile()
        return {name: np.asarray(x, np.float64) for name, x in compiled(params, *batch).items()}, compiled.as_text() or ""


def measure(kind: str) -> dict:
    """For each case of a kind: how far each result is from one device's, as a share of the largest value, and the collectives."""
    found = {}
    for name, (mesh, *how, kernels) in {"quick": QUICK, "slow": SLOW}[kind].items():
        got, text = computed(mesh, *how, kernels)
        want, _ = computed("data=1", *how, False)
        assert len(got) == len(want) > 12
        off = {key: float(np.abs(got[key] - want[key]).max() / np.abs(want[key]).max()) for key in want}
        found[name] = {"off": off, "collectives": sorted(set(re.findall(r" (all-to-all|all-gather|all-reduce|[\w-]+permute)\(", text)))}
    return found


# In pytest -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(cache_dir):
    """found(kind): what is measured of its cases, once."""
    return functools.cache(lambda kind: measured(__file__, cache_dir, kind))


def check(results: dict, case: str) -> None:
    off, collectives = results[case]["off"], results[case]["collectives"]
    worst = max(off, key=off.__getitem__)
    print(f"{case}: {worst} is {off[worst]:.1e} of its largest value away; {', '.join(collectives)}")
    assert off[worst] < 2e-5, worst  # float32 through two layers, its sums in another order
    assert off["loss"] < 1e-6
    assert "all-to-all" in collectives, "no device traded tokens for heads"
    assert "involuntary" not in results["stderr"].lower(), "XLA gave up on a sharding"


@pytest.mark.slow
def test_loss_logits_and_gradients_are_those_of_one_device(found):
    check(found("quick"), *QUICK)


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first waits for all
@pytest.mark.parametrize("case", SLOW)
def test_they_are_in_other_ways_too(found, case):
    check(found("slow"), case)


TE = pytest.mark.te


@pytest.mark.multigpu
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "context"])
@pytest.mark.parametrize(
    ("name", "kv_heads", "window", "documents"),
    [
        ("cudnn", 4, None, None),
        ("cudnn", 1, 100, None),
        pytest.param("te", 4, None, None, marks=TE),
        pytest.param("te", 1, 100, None, marks=TE),
        pytest.param("te", 2, None, 5, marks=TE),
        pytest.param("te", 1, 200, 5, marks=TE),
    ],
)
def test_fused_attention_over_two_gpus_agrees_with_the_reference(axis, name, kv_heads, window, documents):
    if jax.device_count() < 2:
        pytest.skip("it needs two GPUs, and -m te asks for it where there is one")
    kv_heads = max(kv_heads, 2 if axis == "tensor" else 1)  # which cuts heads of keys, and copies none
    shape = dict(rows=2, tokens=256, heads=4, kv_heads=kv_heads, head_dim=128)
    fused_over_two(Request(platform="gpu", dtype=jnp.bfloat16, documents=documents, **shape), axis, name, window)


def fused_over_two(request: Request, axis: str, name: str, window: int | None) -> None:
    """Forward and backward, under rematerialisation, on the first two devices."""
    mesh = make_mesh({axis: 2}, jax.devices()[:2])
    inputs = draw(request)
    exact = [x if x is None or x.dtype == jnp.int32 else x.astype(jnp.float32) for x in inputs]
    want = reference(window, *exact)
    heads = ("heads", "kv_heads", "kv_heads", "heads")
    cut = [
        None if x is None else jax.device_put(x, NamedSharding(mesh, spec(("batch", "tokens", *of))))
        for x, of in zip(inputs, [*((h,) for h in heads), ()], strict=True)
    ]

    def attention(*qkv, **sight):
        return jax.checkpoint(functools.partial(per_shard(make_attention(name, request.documents), mesh), **sight))(*qkv)

    with jax.set_mesh(mesh):
        got = jax.jit(with_gradients(attention, window))(*cut)
    for result, a, b in zip(RESULTS, got, want, strict=True):
        worst = worst_of(np.asarray(a, np.float64), np.asarray(b, np.float64), str(a.dtype))
        assert worst.share <= 1, (result, worst)


def test_context_is_an_axis_like_the_others():
    mesh = make_mesh(parse_mesh("context=1"), jax.devices()[:1])
    assert batch_sharding(mesh).spec == jax.sharding.PartitionSpec(None, ("data", "fsdp"), "context")


if __name__ == "__main__":
    answer(measure)
