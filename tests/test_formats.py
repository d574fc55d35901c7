"""The table of formats, against what their sources say."""

from __future__ import annotations

import pytest

from nanojax.formats import FORMATS, block_shape, stored_bytes_per_weight


def test_bytes_of_a_weight_by_hand():
    assert stored_bytes_per_weight("nvfp4") == stored_bytes_per_weight("nvfp4_2d") == 0.5 + 1 / 16
    assert stored_bytes_per_weight("mxfp4") == 0.5 + 1 / 32
    assert [stored_bytes_per_weight("int4", group) for group in (64, 128, 256)] == [0.5 + 4 / 64, 0.5 + 4 / 128, 0.5 + 4 / 256]
    assert stored_bytes_per_weight("int4") == stored_bytes_per_weight("int4", FORMATS["int4"].block)


def test_blocks_lie_along_the_contraction_axis_and_square_ones_along_both():
    assert block_shape((64, 48), "nvfp4", 0) == (16, 1)
    assert block_shape((48, 64), "mxfp4", -1) == (1, 32)
    assert block_shape((2, 3, 128), "int4", 2, 64) == (1, 1, 64)
    assert block_shape((64, 48), "nvfp4_2d", 0) == block_shape((64, 48), "nvfp4_2d", 1) == (16, 16)


@pytest.mark.parametrize("block", [0, -64])
def test_a_group_is_one_or_more(block):
    with pytest.raises(ValueError, match=rf"given {block}; only int4 takes others, of one or more"):
        block_shape((64, 64), "int4", 0, block)
