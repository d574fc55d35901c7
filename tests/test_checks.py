"""Values: what is read from text, and the arithmetic behind remedies."""

from __future__ import annotations

from nanojax.checks import nearest_divisor, parse_mesh, round_up


def test_a_mesh_is_read_by_axis():
    assert parse_mesh("") == {}
    assert parse_mesh("data=2, tensor = 4") == {"data": 2, "tensor": 4}


def test_round_up_and_nearest_divisor_by_hand():
    assert [round_up(x, 256) for x in (1, 256, 256.1, 2048.0)] == [256, 256, 512, 2048]
    assert [nearest_divisor(12, k) for k in (1, 5, 7, 12, 100)] == [1, 4, 6, 12, 12]
