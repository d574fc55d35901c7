"""Sharding: eight virtual CPU devices compute what one computes, and each holds its share."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from eight import answer, measured
from flax import nnx
from jax.sharding import PartitionSpec as P

from nanojax.analysis.collectives import groups_of
from nanojax.checks import MESH_AXES
from nanojax.cli import load_preset
from nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from nanojax.errors import UserError
from nanojax.mesh import (
    RULES,
    batch_sharding,
    check_divisible,
    make_mesh,
    moment_shardings,
    parameter_shardings,
    per_shard,
    place,
    replicated,
    require_sharded,
)
from nanojax.model import GPT, split
from nanojax.ops.attention import reference_attention
from nanojax.sizes import resolve

STEPS = 20
SIZES = dict(depth=2, d_model=64, head_dim=16, n_kv_head=2, d_ffn=128, seq_len=64, vocab_size=512)


# In the process with eight devices ----------------------------------------------------------------------------------------------------


def tiny(mesh: str) -> Config:
    """Two microbatches a step, everything in fp32 (which CPUs take by themselves), Newton-Schulz too."""
    return Config(
        model=ModelConfig(**SIZES),
        train=TrainConfig(
            steps=STEPS, batch_tokens=1024, micro_batch=8 if mesh == "data=1" else 2, mesh=mesh, loss_blocks=2, compute_dtype="fp32"
        ),
        optim=OptimConfig(warmup_steps=5, reference_batch=None),
        data=DataConfig(packing="concat"),
    )


def batches(sharding):
    """STEPS batches [2, 8, 64] of a sequence that can be learnt: the next token is a fixed permutation of the last, now and then not."""
    from nanojax.data.loader import Batch

    rng = np.random.default_rng(0)
    follows = rng.permutation(512)
    for _ in range(STEPS):
        tokens = np.empty((2, 8, 65), np.int32)
        tokens[..., 0] = rng.integers(512, size=(2, 8))
        for t in range(64):
            tokens[..., t + 1] = np.where(rng.random((2, 8)) < 0.1, rng.integers(512, size=(2, 8)), follows[tokens[..., t]])
        segments = np.ones((2, 8, 64), np.int32)
        yield Batch(*(jax.device_put(x, sharding) for x in (tokens[..., :-1], tokens[..., 1:], segments)))


def train(mesh: str, devices) -> dict:
    """Losses and what can be read off the program."""
    from nanojax.program import make_program

    program = make_program(tiny(mesh), devices)
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        losses, caches = [], []
        for batch in batches(batch_sharding(program.mesh)):
            state, metrics = program.phases[0].train_step(state, batch)
            losses.append(float(metrics["loss"]))  # waits: queued steps deadlock the rendezvous of virtual devices
            caches.append(program.phases[0].train_step._cache_size())
        text = program.phases[0].train_step.lower(state, batch).compile().as_text()
    specs = {name: str(x.sharding.spec) for name, x in state.params.items()}
    moments = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.moments):
        moments[jax.tree_util.keystr(path)] = [getattr(path[-1], "key", None), str(leaf.sharding.spec), leaf.ndim]
    share = {}
    leaves = [*state.params.values(), *jax.tree.leaves(state.moments)]
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            share[str(shard.device)] = share.get(str(shard.device), 0) + shard.data.nbytes
    return {
        "losses": losses,
        "cache_sizes": caches,
        "specs": specs,
        "moments": moments,
        "share": [n / sum(leaf.nbytes for leaf in leaves) for n in share.values()],
        "collectives": collectives(text, program.mesh) if program.mesh.size > 1 else {},
        "crossing": crossing(text, program.mesh) if program.mesh.size > 1 else [],
        "held_back": {name: wrong for name, wrong in misplaced(state, program).items() if wrong},
    }


def misplaced(state, program) -> dict[str, list[str]]:
    """Leaves that do not lie as the program's table of shardings says."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(program.shardings), strict=True)
    return {"state": [jax.tree_util.keystr(p) for (p, leaf), s in pairs if not leaf.sharding.is_equivalent_to(s, leaf.ndim)]}


def collectives(hlo: str, mesh) -> dict[str, list[str]]:
    """Kind of collective -> the mesh axes that its groups of devices span, each combination once."""
    found: dict[str, set[str]] = {}
    for kind, _, axes in crossing(hlo, mesh):
        found.setdefault(kind, set()).add(axes)
    return {kind: sorted(axes) for kind, axes in found.items()}


def crossing(hlo: str, mesh) -> list[tuple[str, str, str]]:
    """(kind, scope, mesh axes that a group spans) of each collective and each kind of group in it."""
    found = set()
    for line in hlo.splitlines():
        match = re.search(r"= .*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line)
        if match is None:
            continue
        scope = re.search(r'op_name="([^"]*)"', line)
        for group in groups_of(line, mesh.size):
            at = np.array(np.unravel_index(group, mesh.devices.shape))  # XLA numbers devices in the order of the mesh
            axes = [axis for n, axis in enumerate(MESH_AXES) if len(set(at[n])) > 1]
            found.add((match[1], scope[1] if scope else "", "+".join(axes) or "none"))
    return sorted(found)


def per_shard_attention() -> dict:
    """Attention called on each device with its own rows and heads: how far from the whole, and what a device sees of it."""
    from jax.sharding import NamedSharding

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rng, seen = np.random.default_rng(0), set()
    q, k, v, cotangent = (rng.standard_normal((8, 12, heads, 16)).astype(np.float32) for heads in (4, 2, 2, 4))
    segments = (1 + np.cumsum(rng.random((8, 12)) < 0.3, axis=1)).astype(np.int32)

    def seen_reference(q, k, v, **sight):
        seen.add(str((q.shape, k.shape, sight["segments_BT"].shape)))
        return reference_attention(q, k, v, **sight)

    def with_gradients(attention):
        def run(q, k, v, cotangent, segments):
            out, vjp = jax.vjp(jax.checkpoint(lambda *qkv: attention(*qkv, window=5, segments_BT=segments)), q, k, v)
            return out, *vjp(cotangent)

        return jax.jit(run)

    want = with_gradients(reference_attention)(q, k, v, cotangent, segments)
    heads, rows = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), NamedSharding(mesh, P(("data", "fsdp")))
    placed = [*(jax.device_put(x, heads) for x in (q, k, v, cotangent)), jax.device_put(segments, rows)]
    with jax.set_mesh(mesh):
        step = with_gradients(per_shard(seen_reference, mesh))
        got = step(*placed)
        text = step.lower(*placed).compile().as_text()
    off = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(got, want, strict=True)]
    return {"off": off, "seen": sorted(seen), "collectives": collectives(text, mesh), "specs": [str(x.sharding.spec) for x in got]}


def measure() -> dict:
    """Everything that the tests below look at."""
    runs = {"one": train("data=1", jax.devices()[:1]), "eight": train("data=2,fsdp=2,tensor=2", jax.devices())}
    return runs | {"per_shard": per_shard_attention()}


# In pytest -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(cache_dir):
    return measured(__file__, cache_dir)


def test_eight_devices_lose_what_one_loses(runs):
    one, eight = runs["one"]["losses"], runs["eight"]["losses"]
    assert len(one) == len(eight) == STEPS
    assert one[-1] < 0.8 * one[0], "nothing was learnt, so nothing was compared"
    np.testing.assert_allclose(eight, one, rtol=1e-5)  # fp32 sums in another order, carried through 20 updates


def test_attention_per_shard_is_attention_and_devices_say_nothing_to_each_other(runs):
    found = runs["per_shard"]
    assert max(found["off"]) < 1e-5, found["off"]  # the same sums in float32
    assert found["seen"] == ["((2, 12, 2, 16), (2, 12, 1, 16), (2, 12))"]
    assert set().union(*found["collectives"].values()) <= {"none"}  # sums over context, which is one device
    assert len({spec.replace(", None", "") for spec in found["specs"]}) == 1, found["specs"]


def test_on_one_device_attention_is_called_as_it_is(mesh):
    def attention(*qkv, **sight):
        raise AssertionError("not called here")

    assert per_shard(attention, mesh) is attention


def test_every_moment_lies_as_its_parameter_does(runs):
    specs, moments = runs["eight"]["specs"], runs["eight"]["moments"]
    mine = {where: (name, spec) for where, (name, spec, ndim) in moments.items() if ndim}
    assert len(mine) >= len(specs)
    for where, (name, spec) in mine.items():
        assert spec == specs[name], where
    kinds = {where: name for where, (name, _) in mine.items()}
    assert {name for where, name in kinds.items() if ".momentum" in where} == {name for name in specs if re.search(r"blocks.*\.w", name)}
    adam = [name for where, name in kinds.items() if ".mu" in where or ".nu" in where]
    assert sorted(adam) == sorted(2 * [name for name in specs if not re.search(r"blocks.*\.w", name)])
    assert runs["eight"]["held_back"] == {}


def test_matrices_are_cut_over_both_fsdp_and_tensor(runs):
    whole = {name for name, spec in runs["eight"]["specs"].items() if "fsdp" not in spec or "tensor" not in spec}
    assert whole == {name for name in whole if "norm" in name}, "only the gains of the norms may be whole on every device"


def test_no_device_holds_more_than_its_share(runs):
    shares = runs["eight"]["share"]
    print(f"share of parameter and moment bytes of a device: {min(shares):.2%} to {max(shares):.2%} of 2 x 2 shards")
    assert len(shares) == 8
    assert max(shares) <= 0.30  # a quarter, and the gains, which are whole everywhere
    assert sum(shares) >= 1.99  # two replicas along data: nothing is missing


def test_the_step_talks_over_fsdp_and_tensor(runs):
    found = runs["eight"]["collectives"]
    print(found)
    gathers, sums = found.get("all-gather", []), [*found.get("all-reduce", []), *found.get("reduce-scatter", [])]
    assert any("fsdp" in axes for axes in gathers), f"no weight is gathered over fsdp: {found}"
    assert any("tensor" in axes for axes in sums), f"no partial product is summed over tensor: {found}"
    assert any("data" in axes for axes in sums), f"no gradient is summed over data: {found}"


def test_weights_and_gradients_cross_the_mesh_outside_the_loops_of_optimizer_and_loss(runs):
    found = runs["eight"]["crossing"]
    print(found)
    assert any("optimizer" in scope and kind == "all-to-all" for kind, scope, _ in found), "Muon's matrices are not dealt out"
    assert any("loss" in scope for _, scope, _ in found)
    in_loops = [each for each in found if re.search(r"(optimizer|jvp\(loss\)).*/while/", each[1])]
    # Each block of the loss sums its logits over tensor, which has parts of the vocabulary.
    assert not [each for each in in_loops if each[2] != "tensor"]


def test_the_step_compiles_once(runs):
    for run in ("one", "eight"):
        assert runs[run]["cache_sizes"] == [1] * STEPS


def test_xla_never_gives_up_on_a_sharding(runs):
    assert "Involuntary full rematerialization" not in runs["stderr"]
    assert "involuntary" not in runs["stderr"].lower()


def test_a_mesh_that_leaves_devices_over_is_refused():
    with pytest.raises(UserError, match=r"data=2,fsdp=2 makes 4, there are 1; try --mesh data=1"):
        make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:1])


def test_a_mesh_without_sizes_puts_all_devices_on_data():
    mesh = make_mesh({}, jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (dict(fsdp=3), r"d_model=64 must be a multiple of the mesh axis fsdp=3; try --mesh fsdp=2"),
        (dict(tensor=8), r"n_head=4 must be a multiple of the mesh axis tensor=8; try --mesh tensor=4"),
        (dict(tensor=4), r"n_kv_head=2 must be a multiple of the mesh axis tensor=4; try --mesh tensor=2"),
        (dict(tensor=3), r"n_head=4 must be a multiple of the mesh axis tensor=3; try --mesh tensor=2"),
        (dict(context=3), r"seq_len=64 must be a multiple of loss_blocks=8 times the mesh axis context=3; try --seq-len 72"),
        (dict(context=8), r"n_head=4 must be a multiple of the mesh axes tensor=1 times context=8, .*; try --mesh context=4"),
        (dict(tensor=2, context=4), r"n_head=4 must be a multiple of the mesh axes tensor=2 times context=4, .*; try --mesh context=2"),
    ],
)
def test_an_axis_that_cannot_be_cut_evenly_is_refused_with_a_remedy(mesh, words):
    axes = tuple(mesh.get(axis, 1) for axis in MESH_AXES)
    with pytest.raises(UserError, match=words):
        check_divisible(Config(model=ModelConfig(**SIZES)), jax.sharding.AbstractMesh(axes, MESH_AXES))


def test_feed_forward_and_vocabulary_must_divide_too():
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), MESH_AXES)
    check_divisible(Config(model=ModelConfig(**SIZES)), mesh)
    for name in ("d_ffn", "vocab_size"):
        with pytest.raises(UserError, match=rf"{name}=129 must be a multiple"):
            check_divisible(Config(model=ModelConfig(**(SIZES | {name: 129}))), mesh)


def test_the_table_covers_every_axis_that_the_model_names_and_no_more():
    """A name spelt wrong would be a KeyError at start; one that nothing bears is a leftover."""
    nanojax = Path(__file__).parents[1] / "nanojax"
    source, kernels = (nanojax / "model.py").read_text(), (nanojax / "ops/kernels/spread.py").read_text()
    named = set(re.findall(r"\"(embed|vocab|heads|kv_heads|ffn|gain|batch|tokens|rows)\"", source + kernels))
    for tuple_text in re.findall(r"(?:out_sharding=|Linear\(\(.*?\), )\(([^)]*)\)", source):
        named |= set(re.findall(r"\"(\w+)\"", tuple_text))
    table = dict(RULES)
    assert named == set(table)
    assert {axis for axes in table.values() if axes for axis in ([axes] if isinstance(axes, str) else axes)} <= set(MESH_AXES)
    assert table["batch"] == ("data", "fsdp")


def test_the_moments_of_a_parameter_are_found_by_its_name():
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 2), MESH_AXES)
    by_name = parameter_shardings({"w": ("embed", "ffn"), "gain": ("gain",)}, mesh)
    assert by_name["w"].spec == P("fsdp", "tensor")
    shape = jax.ShapeDtypeStruct((4, 4), np.float32)
    moments = {"count": jax.ShapeDtypeStruct((), np.int32), "mu": {"w": shape, "gain": jax.ShapeDtypeStruct((4,), np.float32)}}
    found = moment_shardings(moments, by_name, mesh)
    assert found["mu"]["w"].spec == P("fsdp", "tensor")
    assert found["mu"]["gain"].spec == P(None)
    assert found["count"].spec == P()


@pytest.mark.parametrize("preset", ["d12", "d20", "d32", "nanochat_d20"])
def test_no_more_than_a_fiftieth_of_a_preset_is_left_unsharded(preset):
    config = resolve(load_preset(f"configs/{preset}.py"), 2**15)
    with nnx.use_eager_sharding(False):
        _, shapes, axes = split(lambda: GPT(config.model, attention=reference_attention, key=jax.random.key(0)))
    assert sum(leaf.size for leaf in shapes.values()) > 1e8
    for sizes in ((1, 8, 1, 1), (8, 8, 1, 1), (2, 2, 1, 2), (8, 1, 1, 2), (8, 64, 1, 1)):
        mesh = jax.sharding.AbstractMesh(sizes, MESH_AXES)
        require_sharded(shapes, parameter_shardings(axes, mesh), mesh)
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 2:
            for name in ("head.w", "embedding"):
                with pytest.raises(UserError, match=rf"of the state .*, and \d+\.\d% are, most of it \['{name}'\]; give its axes"):
                    require_sharded(shapes, parameter_shardings(axes | {name: ("gain", "gain")}, mesh), mesh)


def test_moments_that_lie_whole_on_each_device_are_refused():
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1), MESH_AXES)
    by_name = parameter_shardings({"w": ("embed", "ffn")}, mesh)
    shapes = {"w": jax.ShapeDtypeStruct((64, 64), np.float32)}
    require_sharded((shapes, shapes), (by_name, by_name), mesh)
    with pytest.raises(UserError, match=r"fsdp=8,tensor=1, and 43.8% are, most of it \[1\]\['w'\]"):  # half of it, less an eighth
        require_sharded((shapes, shapes), (by_name, {"w": replicated(mesh)}), mesh)


def test_placing_without_a_mesh_changes_nothing():
    x = jax.numpy.ones((2, 2))
    assert place(x, "batch", None) is x


if __name__ == "__main__":
    answer(measure)
