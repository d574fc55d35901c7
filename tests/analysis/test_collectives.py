"""Bytes and partners of collectives, against sums worked by hand."""

from __future__ import annotations

import pytest

from nanojax.analysis.collectives import arrays, groups_of, read_collectives, sent
from nanojax.analysis.hlo import read_program

HOSTS = [0, 0, 0, 0, 1, 1, 1, 1]
# Two hosts of four: a gather under a product, in a loop of three; one that nothing is done under; one that XLA made synchronous; a sum.
PROGRAM = """HloModule jit_step

%body (arg: (s32[], bf16[4,32])) -> (s32[], bf16[4,32]) {
  %arg = (s32[], bf16[4,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %part = bf16[4,32]{1,0} get-tuple-element(%arg), index=1
  %begun = ((bf16[4,32]{1,0}, bf16[2,8]{1,0}), (bf16[16,32]{1,0}, bf16[8,8]{1,0})) all-gather-start(%part, %i), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %product = bf16[16,16]{1,0} dot(%part, %part), lhs_contracting_dims={1}
  %ended = (bf16[16,32]{1,0}, bf16[8,8]{1,0}) all-gather-done(%begun)
  ROOT %out = (s32[], bf16[4,32]{1,0}) tuple(%i, %part)
}

%condition (arg.1: (s32[], bf16[4,32])) -> pred[] {
  %arg.1 = (s32[], bf16[4,32]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[64], b: bf16[4,32]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %b = bf16[4,32]{1,0} parameter(1)
  %start = (s32[], bf16[4,32]{1,0}) tuple(%a, %b)
  %loop = (s32[], bf16[4,32]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %scatter-start = ((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %free = f32[64]{0} bitcast(%a)
  %scatter-done = f32[16]{0} reduce-scatter-done(%scatter-start)
  %sync-start = ((f32[16]{0}), f32[64]{0}) all-gather-start(%scatter-done), replica_groups=[2,4]<=[8], backend_config={"is_sync":true}
  %work = f32[64]{0} add(%a, %a)
  %sync-done = f32[64]{0} all-gather-done(%sync-start)
  ROOT %sum = f32[64]{0} all-reduce(%work), replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, to_apply=%add, metadata={op_name="jit(step)/psum"}
}
"""  # noqa: E501  # an instruction is a line


def test_collectives_of_a_program_by_hand():
    gather, scatter, sync, total = found = read_collectives(read_program(PROGRAM), HOSTS)
    assert [c.kind for c in found] == ["all-gather", "reduce-scatter", "all-gather", "all-reduce"]
    assert (gather.times, gather.group, gather.hosts, gather.far) == (3, 4, 1, 0)
    assert gather.near == 2 * (16 * 32 + 8 * 8) * 3 / 4  # the results, not the operands beside them; a quarter was there
    assert gather.sent == 3 * gather.near
    assert scatter.near == 4 * 16 * 3  # each sends all but its own quarter of 64 numbers
    assert sync.near == 4 * 64 * 3 / 4
    assert (total.group, total.hosts, total.scope) == (8, 2, "jit(step)/psum")
    assert total.near + total.far == 2 * 4 * 64 * 7 / 8
    assert arrays(found) == {"all-gather": 3 * 2 + 1, "all-reduce": 1, "reduce-scatter": 1}


def test_only_what_is_computed_under_counts_as_meanwhile():
    gather, scatter, sync, total = read_collectives(read_program(PROGRAM), HOSTS)
    ops = read_program(PROGRAM)
    assert gather.done is not None
    assert [ops[gather.start].name, ops[gather.done].name] == ["begun", "ended"]
    assert scatter.done is None, "a bitcast is nothing that is computed"
    assert sync.done is None, "XLA says that it waits"
    assert total.done is None


@pytest.mark.parametrize(
    ("kind", "hosts", "bytes_"),
    [
        ("all-gather", [0, 0, 0, 0], (75, 0)),
        ("all-gather", [0, 1, 2, 3], (0, 75)),
        ("reduce-scatter", [0, 0, 1, 1], (150, 150)),  # of each host one device sends to the next, and both do so with their halves
        ("all-reduce", [0, 0], (100, 0)),
        ("all-to-all", [0, 0, 1, 1], (25, 50)),
        ("collective-permute", [0, 0], (100, 0)),
        ("collective-permute", [0, 1], (0, 100)),
    ],
)
def test_bytes_that_a_device_sends_of_results_of_a_hundred(kind, hosts, bytes_):
    assert sent(kind, 100, hosts) == bytes_


def test_the_reader_of_device_groups_knows_every_notation_of_xla():
    known = {
        "{{0,1},{2,3}}, to_apply=z": [[0, 1], [2, 3]],
        "{}, to_apply=z": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "[4,2]<=[8], dimensions={0}": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "[4,2]<=[2,2,2]T(0,2,1), dimensions={0}": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}, to_apply=z": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": [[0, 2, 4, 6], [1, 3, 5, 7]],
        # ids [[0, 4], [1, 5], [2, 6], [3, 7]] as [2, 2, 2]: axis_1 pairs 0 with 1 and 4 with 5.
        "mesh['axis_0'=2,'axis_1'=2,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}": [[0, 1], [4, 5], [2, 3], [6, 7]],
    }
    for text, groups in known.items():
        assert groups_of(f"x = f32[2] all-reduce(y), replica_groups={text}", 8) == groups
    assert groups_of("x = f32[2] collective-permute(y), source_target_pairs={{0,4},{1,5}}", 8) == [[0, 4], [1, 5]]
    with pytest.raises(ValueError, match="not known"):
        groups_of("x = f32[2] all-reduce(y), replica_groups=something", 8)
