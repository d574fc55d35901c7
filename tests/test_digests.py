"""Digests of arrays: any bit, any two values that change places."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.digests import digests_of, in_words


def words(x: np.ndarray) -> list[str]:
    """The four sums of an array."""
    text = in_words(digests_of({"x": jnp.asarray(x)}))["x"]
    return [text[n : n + 8] for n in range(0, 32, 8)]


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, jnp.bfloat16])
def test_a_bit_that_flips_changes_every_sum(dtype):
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    before = words(x)
    for bit in range(0, 8 * x.nbytes, 3):
        content = bytearray(x.tobytes())
        content[bit // 8] ^= 1 << bit % 8
        after = words(np.frombuffer(bytes(content), x.dtype).reshape(x.shape))
        assert all(a != b for a, b in zip(before, after, strict=True)), bit


def test_values_that_change_places_change_it_and_equal_arrays_have_equal_ones():
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    assert words(x) == words(x.copy())
    assert len({tuple(words(y)) for y in (x, x[::-1], x[:, ::-1], x.reshape(4, 3).T)}) == 4


def test_by_hand_the_digest_of_nothing_and_of_zeros_is_zero():
    assert words(np.zeros((2, 3), np.float32)) == words(np.zeros(0, np.float32)) == ["00000000"] * 4
