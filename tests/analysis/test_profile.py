"""Where time goes, on kernels laid out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from nanojax.analysis.hlo import Op
from nanojax.analysis.profile import (
    ATTENTION,
    COMMUNICATING,
    COPIES,
    ELEMENTWISE,
    IDLE,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    UNKNOWN,
    group_of,
    make_profile,
    part_of,
)
from nanojax.analysis.report import comparison, report
from nanojax.analysis.trace import Kernel, main_module, own_times

STEP = "jit_train_step"


def kernel(name: str, start: float, end: float, op: str = "", module: str = STEP) -> Kernel:
    return Kernel(name, op, module, 1e6 * start, 1e6 * end)


def op(name: str, scope: str, opcode: str = "fusion", flops: float = 0.0, size: int = 0) -> Op:
    return Op(name, opcode, "", scope, flops, size, 1)


# Two steps of ten ms each but for the last, whose idle end nobody sees.
KERNELS = [
    kernel("nvjet_a", 0, 4, "dot.1"),
    kernel("ncclAllReduce", 3, 6, "all-reduce.1"),  # hidden until 4
    kernel("loop_add_fusion_2", 7, 8, "loop_add_fusion.2"),
    kernel("fused", 8, 9, "strange.9"),
    kernel("nvjet_a", 10, 14, "dot.1"),
    kernel("MemcpyH2D", 12, 13),
    kernel("ncclAllReduce", 13, 16, "all-reduce.1"),
    kernel("loop_add_fusion_2", 17, 18, "loop_add_fusion.2"),
    kernel("fused", 18, 19, "strange.9"),
    kernel("other", 19, 19.5, "add.1", module="jit_other"),
    kernel("nvjet_a", 19.5, 20, "dot.1"),
]
OPS = [
    op("dot.1", "jit(train_step)/jvp(block_0)/ffn/dot_general", "dot", flops=8e9, size=int(4e6)),
    op("all-reduce.1", "jit(train_step)/psum", "all-reduce"),
    op("loop_add_fusion.2", "jit(train_step)/transpose(jvp(block_1))/attention/rope/add"),
]


def test_each_instant_is_put_down_to_one_kernel():
    nested = [kernel("while", 0, 10), kernel("inner", 2, 5), kernel("after", 6, 7), kernel("beyond", 9, 12)]
    assert [t / 1e6 for t in own_times(nested)] == pytest.approx([5, 3, 1, 3])
    beside = [kernel("nccl", 0, 6), kernel("compute", 2, 4), kernel("MemcpyD2H", 3, 5)]
    assert [t / 1e6 for t in own_times(beside)] == pytest.approx([3, 2, 1])


def test_rows_and_idle_time_make_up_the_wall_time():
    profile = make_profile(KERNELS, OPS, steps=2)
    assert profile.wall == pytest.approx(10e-3)
    assert profile.idle + sum(row.seconds for row in profile.rows) == pytest.approx(profile.wall)
    ms = {group: 1e3 * profile.seconds(group) for group in (PRODUCTS, COMMUNICATING, ELEMENTWISE, UNKNOWN, OTHER, COPIES, IDLE)}
    assert ms == pytest.approx(
        {PRODUCTS: (4 + 4 + 0.5) / 2, COMMUNICATING: 2, ELEMENTWISE: 1, UNKNOWN: 1, OTHER: 0.25, COPIES: 0, IDLE: 3 / 2}
    )
    assert 1e3 * profile.hidden == pytest.approx((1 + 1 + 1) / 2)  # the first ms of each all-reduce, and the copy
    product = profile.by("part")["block/ffn"]
    assert (product.count, product.flops, product.bytes) == pytest.approx((1.5, 12e9, 6e6))
    assert set(profile.by("part")) == {"block/ffn", "backward: block/attention/rope", ""}


def test_without_a_program_kernels_are_grouped_by_their_names():
    names = {"nvjet_x": PRODUCTS, "cudnn_sdpa_y": ATTENTION, "loop_z_fusion": ELEMENTWISE, "ncclA": COMMUNICATING, "what": UNKNOWN}
    kernels = [kernel(name, i, i + 1) for i, name in enumerate(names)]
    profile = make_profile(kernels, [])
    assert profile.steps == 1
    assert {row.name: row.group for row in profile.rows} == names


def test_an_operation_of_two_kernels_counts_its_flops_once_by_their_times():
    kernels = [kernel("gemm", 0, 3, "dot.1"), kernel("splitKreduce", 3, 4, "dot.1")]
    assert {row.name: row.flops for row in make_profile(kernels, OPS, steps=1).rows} == {"gemm": 6e9, "splitKreduce": 2e9}


def test_a_kernel_that_an_operation_runs_twice_does_not_make_it_two_executions():
    kernels = [kernel("Memset", 0, 1, "dot.1"), kernel("Memset", 1, 2, "dot.1"), kernel("sdpa", 2, 8, "dot.1")]
    kernels += [kernel(k.name, k.start / 1e6 + 10, k.end / 1e6 + 10, k.op) for k in kernels]
    assert {row.name: row.flops for row in make_profile(kernels, OPS, steps=2).rows} == {"Memset": 2e9, "sdpa": 6e9}


def test_an_operation_of_another_program_that_has_the_same_name_takes_nothing():
    kernels = [kernel("gemm", 10 * n, 10 * n + 4, "dot.1") for n in range(3)]
    kernels.insert(1, kernel("loop_add_fusion", 5, 6, "dot.1", module="jit_other"))
    assert {row.name: row.flops for row in make_profile(kernels, OPS, steps=3).rows} == {"gemm": 8e9, "loop_add_fusion": 0}


def test_a_kernel_is_known_by_the_call_that_its_operation_wraps():
    wrapping = dataclasses.replace(OPS[0], name="address_computation", wrapped="custom-call.7")
    assert make_profile([kernel("gemm", 0, 3, "custom-call.7")], [wrapping], steps=1).seconds(PRODUCTS) == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(train_step)/while/body/eval_jaxpr/transpose(jvp(block_11))/ffn/jit(silu)/add_any", "backward: block/ffn"),
        ("jit(train_step)/jvp(block_0)/attention/attend/dot_product_attention_fwd", "block/attention/attend"),
        ("jit(train_step)/optimizer/while/body/dot_general", "optimizer"),
        ("jit(train_step)/while/body/add", ""),
    ],
)
def test_model_parts_are_the_named_scopes(scope, part):
    assert part_of(scope) == part


def test_the_optimizers_products_are_its_own_and_attentions_too():
    assert group_of(op("a", "jit(train_step)/optimizer/dot_general", "dot", flops=1)) == OPTIMIZER
    assert group_of(op("a", "jit(train_step)/jvp(block_0)/attention/attend/dot_general", "dot", flops=1)) == ATTENTION


def test_the_program_is_the_step_where_there_is_one():
    assert main_module([kernel("a", 0, 9, module="jit_evaluate"), kernel("b", 9, 10)]) == STEP
    assert main_module([kernel("a", 0, 9, module="x"), kernel("b", 9, 10, module="y")]) == "x"


def test_the_tables_say_what_they_measure():
    profile = make_profile(KERNELS, OPS, steps=2)
    lines = {line.split("  ")[0]: line.split()[-5:] for line in report(profile, None, 3).splitlines()}
    assert lines["matrix products"] == ["4.25", "42.5%", "2", "2.82", "1.412"]
    assert "a step" in lines
    slower = make_profile([*KERNELS[:-1], kernel("nvjet_a", 19.5, 26, "dot.1")], OPS, steps=2)
    changed = comparison(profile, slower, ("a", "b"), 5)
    assert [line.split()[-1] for line in changed.splitlines() if line.startswith(("matrix products", "a step"))] == ["+3.00", "+3.00"]
