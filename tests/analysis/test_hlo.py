"""FLOPs and bytes of programs, against sums worked by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from nanojax.analysis.hlo import loops_without_a_count, read_program

# As an H200's compiler writes them: a cuBLAS product and an attention within a loop of three, a fusion that slices and one that updates.
GPU = """HloModule jit_step

%fused_slice (p0: bf16[8,64,32], p1: s32[]) -> f32[64,32] {
  %p0 = bf16[8,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %flat = bf16[64,32]{1,0} bitcast(%cut)
  ROOT %wide = f32[64,32]{1,0} convert(%flat), metadata={op_name="jit(step)/jvp(block_2)/ffn/convert"}
}

%fused_update (p0.1: f32[8,64], p1.1: f32[1,64], p2.1: s32[]) -> f32[8,64] {
  %p0.1 = f32[8,64]{1,0} parameter(0)
  %p1.1 = f32[1,64]{1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %new = f32[8,64]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %zero.1)
}

%fused_scatter (p0.3: bf16[8,64], p1.3: s32[8,2], p2.3: bf16[8]) -> bf16[8,64] {
  %p0.3 = bf16[8,64]{1,0} parameter(0)
  %p1.3 = s32[8,2]{1,0} parameter(1)
  %p2.3 = bf16[8]{0} parameter(2)
  ROOT %set = bf16[8,64]{1,0} scatter(%p0.3, %p1.3, %p2.3), update_window_dims={}, inserted_window_dims={0,1}
}

%fused_call (p0.2: bf16[8,16,32], p1.2: bf16[32,64]) -> bf16[16,64] {
  %p0.2 = bf16[8,16,32]{2,1,0} parameter(0)
  %p1.2 = bf16[32,64]{1,0} parameter(1)
  %flat.1 = bf16[16,32]{1,0} bitcast(%p0.2)
  ROOT %inner = (bf16[16,64]{1,0}, s8[4096]{0}) custom-call(%flat.1, %p1.2), custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
}

%body (arg: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %arg = (s32[], bf16[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[16,32]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[32,64]{1,0} constant({...})
  %mm = (bf16[16,64]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
  %q = bf16[2,5,4,16]{3,2,1,0} constant({...})
  %sdpa = (bf16[2,4,5,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="a/rematted_computation/b"}
  %dw = bf16[32,128]{1,0} constant({...})
  %kept = bf16[32,256]{1,0} constant({...})
  %dy = bf16[32,32]{1,0} constant({...})
  %ended = bf16[32,256]{1,0} custom-call(%dy, %dw, %kept), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/jit(wrapper)/down_backward/mpmd_map"}
  %seen = f32[8]{0} constant({...})
  %found = f32[100]{0} constant({...})
  %again = (bf16[32,256]{1,0}, f32[1]{0}) custom-call(%seen, %found, %kept), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{0}: (2, {})}, metadata={op_name="jit(step)/round_again/pallas_call"}
  %looked = f32[2]{0} custom-call(%kept), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/jit(_call_seen)/see/pallas_call"}
  %parts = bf16[8,16,32]{2,1,0} constant({...})
  %address_computation = bf16[16,64]{1,0} fusion(%parts, %w), kind=kCustom, calls=%fused_call
  ROOT %out = (s32[], bf16[16,32]{1,0}) tuple(%i, %x)
}

%condition (arg.1: (s32[], bf16[16,32])) -> pred[] {
  %arg.1 = (s32[], bf16[16,32]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: bf16[8,64,32], b: f32[8,64], c: f32[1,64], n: s32[]) -> f32[64,32] {
  %a = bf16[8,64,32]{2,1,0} parameter(0)
  %b = f32[8,64]{1,0} parameter(1)
  %c = f32[1,64]{1,0} parameter(2)
  %n = s32[] parameter(3)
  %start = (s32[], bf16[16,32]{1,0}) tuple(%n, %n)
  %loop = (s32[], bf16[16,32]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %update = f32[8,64]{1,0} fusion(%b, %c, %n), kind=kLoop, calls=%fused_update
  %sum = (f32[8,64]{1,0}, f32[8,64]{1,0}) all-reduce-start(%update), to_apply=%add, metadata={op_name="jit(step)/psum"}
  %done = f32[8,64]{1,0} all-reduce-done(%sum)
  %places = s32[8,2]{1,0} constant({...})
  %logits = bf16[8,64]{1,0} constant({...})
  %of_targets = bf16[8]{0} constant({...})
  %one_each = bf16[8,64]{1,0} fusion(%logits, %places, %of_targets), kind=kInput, calls=%fused_scatter
  ROOT %loop_convert_fusion.1 = f32[64,32]{1,0} fusion(%a, %n), kind=kLoop, calls=%fused_slice
}
"""  # noqa: E501  # an instruction is a line


def test_operations_of_a_gpu_program_by_hand():
    ops = {op.name: op for op in read_program(GPU)}
    assert " ".join(ops) == "mm sdpa ended again looked address_computation update sum done one_each loop_convert_fusion.1"
    mm, sdpa, cut = ops["mm"], ops["sdpa"], ops["loop_convert_fusion.1"]
    assert (mm.flops, mm.times, mm.target) == (2 * 16 * 64 * 32, 3, "__cublas$lt$matmul")
    assert mm.bytes == 2 * (16 * 32 + 32 * 64 + 16 * 64)  # without its scratch
    assert sdpa.flops == 2 * 2 * 2 * 4 * 16 * (5 * 6 / 2)  # two products of two FLOPs, batch 2, 4 heads of 16, 15 pairs
    assert sdpa.recomputed
    assert not mm.recomputed
    assert ops["ended"].flops == 2 * 32 * 128 * 32  # not of what is read at its end, were there as many rows as are summed over
    assert ops["again"].bytes == 4 * (8 + 100)  # it looks whether there is anything to do, which is rare
    assert ops["looked"].bytes == 2 * 32 * 256 // 64 + 4 * 2  # at one token of 64
    wrapping = ops["address_computation"]
    assert (wrapping.wrapped, wrapping.target, wrapping.flops, mm.wrapped) == ("inner", mm.target, mm.flops, "")
    assert cut.bytes == 64 * 32 * (2 + 4) + 4  # the slice, the result, the index
    assert cut.scope == "jit(step)/jvp(block_2)/ffn/convert"
    assert ops["update"].bytes == 2 * 4 * 64 + 4  # what is written in, not what it is written into
    assert ops["one_each"].bytes == 2 * 2 * 8 + 4 * 2 * 8  # eight numbers read and written, and where
    assert [op.name for op in ops.values() if op.collective] == ["sum", "done"]
    assert ops["done"].bytes == 0
    assert loops_without_a_count(GPU) == 0


def test_products_in_loops_count_once_a_turn_whatever_compiles_them():
    def f(w, xs):
        return jax.lax.scan(lambda carry, x: (carry + jnp.tanh(x @ w), None), jnp.zeros((8, 16)), xs)[0]

    text = jax.jit(f).lower(jnp.ones((32, 16)), jnp.ones((7, 8, 32))).compile().as_text()
    assert text
    ops = read_program(text)
    assert sum(op.flops * op.times for op in ops) == 7 * 2 * 8 * 16 * 32


def test_a_gradient_has_three_times_the_products():
    def f(w, x):
        return jnp.sum(jnp.square(x @ w))

    text = jax.jit(jax.grad(f, argnums=(0, 1))).lower(jnp.ones((32, 16)), jnp.ones((8, 32))).compile().as_text()
    assert text
    assert sum(op.flops * op.times for op in read_program(text)) == 3 * 2 * 8 * 16 * 32


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("HloModule nothing\n")
