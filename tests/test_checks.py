"""Values: what is read from text, and the arithmetic behind remedies."""

from __future__ import annotations

import pytest

from nanojax.checks import nearest_divisor, parse_mesh, require_share, round_up
from nanojax.config import TrainConfig
from nanojax.errors import UserError
from nanojax.infer.params import SamplingParams


def test_a_mesh_is_read_by_axis():
    assert parse_mesh("") == {}
    assert parse_mesh("data=2, tensor = 4") == {"data": 2, "tensor": 4}


def test_round_up_and_nearest_divisor_by_hand():
    assert [round_up(x, 256) for x in (1, 256, 256.1, 2048.0)] == [256, 256, 512, 2048]
    assert [nearest_divisor(12, k) for k in (1, 5, 7, 12, 100)] == [1, 4, 6, 12, 12]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainConfig(steps=99_999_999_999), "steps=99999999999 must be below 2147483648; write a smaller number"),
        (lambda: TrainConfig(keep=1.5), "keep=1.5 must be one of these: int; write one of them"),  # pyright: ignore[reportArgumentType]
        (lambda: SamplingParams(seed=-1), "seed=-1 must be at least 0; try 0, the default"),
        (lambda: require_share("share", 2), "share=2 must lie between 0 and 1; leave it out for the default"),
    ],
    ids=["large", "type", "negative", "share"],
)
def test_a_refusal_has_the_number_in_full_and_a_remedy(make, words):
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == words
