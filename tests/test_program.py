"""Programs: the phases of a run that leaves 4 bits before its end, the full recipe, and a format of one's own."""

from __future__ import annotations

import dataclasses
import os
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.checks import MESH_AXES
from nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from nanojax.data.loader import Batch
from nanojax.errors import StorageError, UserError
from nanojax.mesh import batch_sharding
from nanojax.ops.attention_request import Request
from nanojax.ops.kernels.head import loss_head
from nanojax.ops.xent import PLAIN_HEAD
from nanojax.precision import Rounding, prepare_weights
from nanojax.program import keep_compiled_programs, make_program, out_of_memory_told
from nanojax.run_kind import RunKind
from nanojax.site import head_of, request_of
from nanojax.sizes import resolve

MODEL = ModelConfig(depth=2, d_model=32, head_dim=16, d_ffn=64, seq_len=16, vocab_size=128)
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(steps=10, batch_tokens=64, micro_batch=2, loss_blocks=2),
    optim=OptimConfig(warmup_steps=1, reference_batch=None),
)


def program_of(**train):
    return make_program(resolve(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **train)), 128), jax.devices()[:1])


def batch(seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 128, (2, 2, 17)).astype(np.int32)
    return Batch(*map(jnp.asarray, (tokens[..., :-1], tokens[..., 1:], np.ones((2, 2, 16), np.int32))))


@pytest.fixture(scope="module")
def full():
    return program_of(fp4_recipe="full", steps=12)


def run(program, batches: list[Batch], seed: int = 0) -> list[float]:
    """Losses of steps on these batches."""
    with jax.set_mesh(program.mesh):
        state, found = program.init(jax.random.key(seed)), []
        for each in batches:
            state, metrics = program.phases[0].train_step(state, each)
            found.append(float(metrics["loss"]))
    return found


def test_a_run_has_one_phase_or_two_and_steps_know_theirs():
    whole = program_of(precision="nvfp4")
    assert len(whole.phases) == 1
    assert {whole.phase(step).precision for step in range(11)} == {"nvfp4"}
    program = program_of(precision="nvfp4", fp4_until=0.7)
    assert [program.phase(step).precision for step in range(11)] == 8 * ["nvfp4"] + 3 * ["fp32"]
    assert "up to step 7" in program.facts["precision"]


@pytest.fixture(scope="module")
def quick():
    """One microbatch of one block, which compiles soonest."""
    model = dataclasses.replace(MODEL, depth=1)
    train = dataclasses.replace(CONFIG.train, batch_tokens=32)
    return make_program(resolve(dataclasses.replace(CONFIG, model=model, train=train), 128), jax.devices()[:1])


def test_the_first_step_runs_what_the_check_compiled(quick):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None)
    with jax.set_mesh(quick.mesh):
        compiled.clear()
        assert quick.check_step(quick.compile_step()) == "attention: compiled step calls no fused kernel"
        assert len(compiled) == 1
        state = quick.init(jax.random.key(0))
        tokens = Batch(*(jax.device_put(x[:1], batch_sharding(quick.mesh)) for x in batch()))
        compiled.clear()
        new, _ = quick.phases[0].train_step(state, tokens)
        again, _ = quick.phases[0].train_step(new, tokens)
    assert not compiled
    assert quick.phases[0].train_step._cache_size() == 1
    assert state.params["head.w"].is_deleted(), "donated"
    assert int(again.step) == 2


def test_the_header_names_the_kernels_that_a_model_gets():
    """As if on a GPU: nothing is compiled."""
    site = dataclasses.replace(program_of(), no_kernels=None)
    assert site.facts["elementwise"] == "kernels: norms, rotation, SwiGLU, loss; else XLA"
    hopper = dataclasses.replace(site.request, platform="gpu", capability="9.0", rows=64)
    sizes = dataclasses.replace(site.config.model, d_model=64, d_ffn=128, seq_len=32)
    within = dataclasses.replace(site, request=hopper, config=dataclasses.replace(site.config, model=sizes))
    assert within.kernels == ["norms", "rotation", "SwiGLU (in products)", "loss"]
    for changes in (
        dict(precision="fp8"),
        dict(request=dataclasses.replace(hopper, rows=1)),
        dict(request=dataclasses.replace(hopper, capability="10.0")),
    ):
        assert dataclasses.replace(within, **changes).kernels == ["norms", "rotation", "SwiGLU", "loss"]
    other = dataclasses.replace(CONFIG.model, qk_norm=False)
    site = dataclasses.replace(site, precision="fp8", config=dataclasses.replace(site.config, model=other))
    assert site.facts["elementwise"] == "kernels: norms, SwiGLU, loss; else XLA"
    assert program_of().facts["elementwise"] == "XLA: kernels run on NVIDIA GPUs, and the device is a cpu"
    cut: Any = jax.sharding.AbstractMesh((1, 1, 1, 2), MESH_AXES)
    assert dataclasses.replace(program_of(), mesh=cut).kernels == ["norms", "rotation"]


@pytest.mark.parametrize(
    ("changes", "model", "train", "mesh", "ended"),
    [
        ({}, {}, {}, (1, 1, 1, 1), True),
        (dict(precision="fp8"), {}, {}, (1, 1, 1, 1), True),
        ({}, dict(softcap=None), {}, (1, 1, 1, 1), False),
        ({}, dict(softcap=50.0), {}, (1, 1, 1, 1), False),
        ({}, {}, dict(precision="fp8_head"), (1, 1, 1, 1), False),  # a head in 8 bits
        ({}, {}, dict(loss_blocks=32), (1, 1, 1, 1), False),  # blocks of less than a tile
        (dict(no_kernels="asked for"), {}, {}, (1, 1, 1, 1), False),
        ({}, {}, {}, (1, 1, 1, 2), False),  # a part of the vocabulary
        ({}, {}, {}, (1, 1, 2, 1), True),
        ({}, {}, dict(loss_blocks=16), (1, 1, 1, 1), True),
        ({}, {}, dict(loss_blocks=16), (1, 1, 2, 1), False),  # a block is of half the tokens then
        ({}, {}, {}, (2, 1, 1, 1), True),  # rows are a device's own
    ],
)
def test_the_heads_product_ends_in_the_loss_where_the_header_says_so(changes, model, train, mesh, ended):
    """As if on a GPU: nothing is compiled. 64 rows of 32 tokens on a device."""
    site = dataclasses.replace(program_of(), no_kernels=None)
    request = dataclasses.replace(site.request, platform="gpu", capability="9.0", rows=64)
    sizes = dataclasses.replace(site.config.model, **(dict(d_model=64, d_ffn=128, seq_len=32, softcap=15.0) | model))
    config = dataclasses.replace(site.config, model=sizes, train=dataclasses.replace(CONFIG.train, **train))
    devices: Any = jax.sharding.AbstractMesh(mesh, MESH_AXES)
    site = dataclasses.replace(site, request=request, config=config, mesh=devices, **changes)
    if site.no_kernels is None:
        assert ("loss (in the head's product)" in site.kernels) == ended
    assert (head_of(site) is loss_head(15.0)) == ended


def test_a_capped_loss_is_trained_where_no_product_ends_in_it():
    model = dataclasses.replace(MODEL, depth=1, softcap=15.0)
    program = make_program(resolve(dataclasses.replace(CONFIG, model=model), 128), jax.devices()[:1])
    assert head_of(program) is PLAIN_HEAD
    losses = run(program, [batch()] * 2)
    assert losses[1] < losses[0]


def test_a_step_that_lacks_the_kernel_of_its_backend_is_refused(quick):
    program = dataclasses.replace(quick, attention="te")
    with jax.set_mesh(quick.mesh), pytest.raises(UserError, match="attn_impl=te must call te_fused_attn_forward_ffi"):
        program.check_step(quick.compile_step())


def test_the_self_test_takes_the_runs_own_kind_of_attention(quick):
    assert re.fullmatch(r"attention: xla is at \d+% of the tolerated deviation", quick.self_test())
    program = dataclasses.replace(quick, attention="te", request=dataclasses.replace(quick.request, head_dim=64))
    with pytest.raises(UserError, match="attn_impl=te failed its self-test: ModuleNotFoundError"):
        program.self_test()


def test_attention_is_asked_for_what_one_device_has_to_do():
    model = dataclasses.replace(MODEL, window=4, window_pattern="SL", n_kv_head=1)
    data = DataConfig(mask_documents=True, max_documents=5)
    config = dataclasses.replace(CONFIG, model=model, data=data)
    request = make_program(resolve(config, 128), jax.devices()[:1]).request
    assert request == Request(
        platform="cpu", dtype=jnp.float32, rows=2, tokens=16, heads=2, kv_heads=1, head_dim=16, windows=(4, None), documents=5
    )
    assert program_of().request.documents is None
    # Over context: whole rows, a share of the heads, and of those of keys as many copies as are needed.
    mesh: Any = SimpleNamespace(size=2, shape=dict(tensor=1, context=2), devices=np.array(jax.devices()[:1]))
    assert request_of(config, mesh, rows=2) == dataclasses.replace(request, heads=1, kv_heads=1)


def test_each_phase_prepares_and_trains_in_its_own_precision():
    program = program_of(precision="mxfp4", fp4_until=0.5)
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        name = "blocks.0.attention.q.w"
        first, last = (phase.prepare(state.params)[name] for phase in program.phases)
        want = prepare_weights({name: state.params[name]}, rounding=Rounding("mxfp4"), dtype=jnp.float32)[name]
        np.testing.assert_array_equal(first, want)
        np.testing.assert_array_equal(last, state.params[name])
        assert (np.asarray(first) != np.asarray(last)).mean() > 0.5


@pytest.mark.parametrize("remat", [False, True])
def test_weights_are_quantised_once_a_step_and_in_no_microbatch(remat):
    program = program_of(precision="nvfp4", remat=remat)
    assert program.accumulation == 2
    with jax.set_mesh(program.mesh):
        whole = jax.make_jaxpr(program.phases[0].train_step)(program.shapes, batch())
    step = whole.jaxpr.eqns[0].params["jaxpr"].jaxpr
    (microbatches,) = (e for e in step.eqns if e.primitive.name == "scan" and e.params["length"] == 2)
    inside, outside = (roundings(j) for j in (microbatches.params["jaxpr"].jaxpr, step))
    assert inside == 0
    assert outside > 0


def roundings(jaxpr) -> int:
    """How often a jaxpr, with all that it calls, rounds to an integer: quantising does, and nothing else in a step."""
    subs = [leaf for e in jaxpr.eqns for leaf in jax.tree.leaves(e.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))]
    inner = [sub.jaxpr if hasattr(sub, "jaxpr") else sub for sub in subs if hasattr(sub, "jaxpr") or hasattr(sub, "eqns")]
    return sum(e.primitive.name == "round" for e in jaxpr.eqns) + sum(map(roundings, inner))


def test_the_full_recipe_learns_leaves_its_last_blocks_and_repeats_by_seed(full):
    assert full.config.train.fp4_skip_last == 1
    assert "nvfp4_2d but for block 1, activations and gradients too" in full.facts["precision"]
    losses = run(full, 12 * [batch()])  # one batch again and again
    assert losses == run(full, 12 * [batch()])
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_the_full_recipe_is_near_the_plain_one_and_not_the_same(full):
    losses = run(full, 12 * [batch()])
    plain = run(program_of(precision="nvfp4_2d", fp4_skip_last=1, steps=12), 12 * [batch()])
    assert plain[-1] != losses[-1]
    assert plain[-1] == pytest.approx(losses[-1], rel=0.3)  # 4-bit activations and gradients: near, and not the same


@pytest.mark.slow
def test_the_full_recipe_draws_the_same_under_rematerialisation(full):
    again = program_of(fp4_recipe="full", steps=12, remat=True)
    batches = [batch(), batch(1), batch(2)]
    np.testing.assert_allclose(run(again, batches), run(full, batches), rtol=1e-4)  # fp32, fused apart


def test_a_format_of_ones_own_takes_the_place_of_the_configs():
    def halves(params):
        return {name: w * 0.5 if name.endswith("q.w") else w for name, w in params.items()}

    program = make_program(resolve(CONFIG, 128), jax.devices()[:1], prepare=halves)
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        ready = program.phases[0].prepare(state.params)
    np.testing.assert_array_equal(ready["blocks.1.attention.q.w"], 0.5 * state.params["blocks.1.attention.q.w"])
    np.testing.assert_array_equal(ready["blocks.1.attention.k.w"], state.params["blocks.1.attention.k.w"])


def test_fp8_trains_in_8_bits_and_is_evaluated_without():
    program = program_of(precision="fp8")
    assert "fp8 (e4m3, gradients e5m2; evaluated in bf16)" in program.facts["precision"]
    losses = run(program, 12 * [batch()])
    assert losses[-1] < losses[0] - 0.5
    assert losses != run(program_of(), 12 * [batch()])
    with jax.set_mesh(program.mesh):
        params = program.init(jax.random.key(0)).params
        weights = program.phases[0].prepare(params)
        step = program.phases[0].train_step.lower(program.shapes, batch()).as_text()
        evaluation = program.eval_step.lower(weights, jax.tree.map(lambda x: x[:1], batch()), jnp.ones(128)).as_text()
    # Seven matrices a block, two blocks: forward both operands are in E4M3, backward one of each product is, and the other, dy, in E5M2.
    barriers = "".join(re.findall("optimization_barrier.*", step))
    assert barriers.count("f8E4M3FN") == (2 + 2) * 7 * 2
    assert barriers.count("f8E5M2") == 2 * 7 * 2
    assert "f8E" not in evaluation
    bf16 = prepare_weights(params, rounding=Rounding("bf16"), dtype=jnp.float32)
    for name, w in weights.items():
        np.testing.assert_array_equal(w, bf16[name])


def test_a_head_in_fp8_is_multiplied_in_8_bits_where_it_is_asked_for():
    """Twice forward, and each with dy back, in the loop over blocks."""
    steps = []
    for precision in ("fp8", "fp8_head"):
        program = program_of(precision=precision, loss_blocks=1)
        assert ("block matrices and the head fp8" in program.facts["precision"]) == (precision == "fp8_head")
        with jax.set_mesh(program.mesh):
            step = program.phases[0].train_step.lower(program.shapes, batch()).as_text()
        steps.append("".join(re.findall("optimization_barrier.*", step)))
    assert steps[1].count("f8E4M3FN") - steps[0].count("f8E4M3FN") == 2 + 2
    assert steps[1].count("f8E5M2") - steps[0].count("f8E5M2") == 2
    losses = run(program, 12 * [batch()])
    assert losses[-1] < losses[0] - 0.5
    with pytest.raises(UserError, match=r"seq_len=16 must be a multiple of 16 times loss_blocks=2 .* try --seq-len 32"):
        program_of(precision="fp8_head", loss_blocks=2)


def test_what_reads_the_same_is_multiplied_as_one_by_kernels_alone():
    site = dataclasses.replace(program_of(), no_kernels=None)
    apart = dataclasses.replace(site.config, model=dataclasses.replace(CONFIG.model, qk_norm=False))
    assert site.together == ("attention", "ffn")
    assert dataclasses.replace(site, config=apart).together == ("ffn",)
    assert dataclasses.replace(site, no_kernels="asked for").together == ()


def test_fp8_is_refused_where_no_device_multiplies_it():
    program = program_of(precision="fp8")
    with pytest.raises(
        UserError, match=r"NVIDIA GPUs of compute capability 9.0 or later, and the device is a cpu; choose --precision bf16"
    ):
        program.compile_step()


@pytest.mark.gpu
def test_an_fp8_step_on_a_gpu_multiplies_in_8_bits():
    program = program_of(precision="fp8")
    compiled = program.compile_step().as_text() or ""
    # Of a block: q, k, v, o, gates with ups, down; of q, k, v together, of o, of gates with ups and of down two backward each. XLA may
    # merge those of q, k and v, where they are small.
    assert (6 + 8 - 3) * 2 <= compiled.count('custom_call_target="__cublas$lt$matmul$f8"') <= (6 + 8) * 2
    losses = run(program, 12 * [batch()])
    assert losses[-1] < losses[0] - 0.5


def test_a_cache_that_cannot_be_written_is_refused_before_anything_compiles(tmp_path):
    (tmp_path / "file").touch()
    kept = jax.config.jax_compilation_cache_dir
    with pytest.raises(StorageError, match=r"cannot write to the cache .*file: Not a directory; free space there, or .* --data\.cache"):
        keep_compiled_programs(str(tmp_path / "file"))
    assert jax.config.jax_compilation_cache_dir == kept


@pytest.mark.parametrize(
    "words", ["RESOURCE_EXHAUSTED: Out of memory while", "INTERNAL: Error dispatching: Out of memory allocating 9 bytes."]
)
def test_a_device_without_memory_left_is_told_in_a_line(words):
    with pytest.raises(UserError, match=r"the devices are out of memory \(.*\); buy more"), out_of_memory_told("buy more"):
        raise jax.errors.JaxRuntimeError(f"{words}\nand more")


@pytest.mark.gpu
def test_products_are_those_of_cublas_on_a_gpu():
    """As the flags have it."""
    x = jnp.ones((1024, 1024), jnp.bfloat16)
    text = jax.jit(lambda x: jnp.sin(jnp.sin(x @ x) @ x), compiler_options=RunKind().options("gpu")).lower(x).compile().as_text()
    assert "__cublas$" in text
    assert "__triton_gemm" not in text


def test_a_deterministic_program_has_its_flags_on_gpus_and_te_may_choose_only_what_repeats(monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    deterministic = RunKind(deterministic=True)
    make_program(resolve(CONFIG, 128), jax.devices()[:1])
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "1"
    make_program(resolve(CONFIG, 128), jax.devices()[:1], run=deterministic)
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert deterministic.options("gpu")["xla_gpu_deterministic_ops"] is True
    assert deterministic.options("gpu").items() >= RunKind().options("gpu").items()
    assert "xla_gpu_deterministic_ops" not in RunKind().options("gpu")
    assert deterministic.options("cpu") == {}
    assert list(deterministic.facts) == ["determinism"]


@pytest.mark.parametrize("kind", [RunKind(deterministic=True), RunKind(profiled=True)], ids=["deterministic", "profiled"])
def test_every_flag_of_xla_is_known_to_this_jaxlib(kind):
    assert set(kind.options("gpu", fsdp=8)) - set(kind.options("gpu")) == {"xla_gpu_reduce_scatter_combine_threshold_bytes"}
    assert kind.options("gpu", fsdp=2) == kind.options("gpu")
    for name, value in kind.options("gpu", fsdp=8).items():  # those of GPUs are parsed on CPUs as well
        jax.jit(lambda x: x + 1, compiler_options={name: value})(1.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_flag": True})(1.0)
