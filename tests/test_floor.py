"""The bench of what a step would take at least: that its products are the step's."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from nanojax.config import Config, ModelConfig, TrainConfig
from nanojax.errors import UserError
from nanojax.site import choose_site
from nanojax.sizes import resolve

sys.path.append(str(Path(__file__).parents[1] / "scripts/bench"))

import floor

CONFIG = resolve(
    Config(
        model=ModelConfig(depth=3, d_model=64, head_dim=16, n_kv_head=2, d_ffn=96, seq_len=32, vocab_size=256),
        train=TrainConfig(batch_tokens=256, micro_batch=2, loss_blocks=2),
    ),
    256,
)


@pytest.mark.parametrize(("precision", "eight_bits"), [("bf16", 0), ("fp8", 14), ("fp8_head", 17)])
def test_the_products_of_a_microbatch_are_those_of_its_step(precision, eight_bits):
    """Six operations for each weight of a product and token: Kaplan et al. 2020, arXiv:2001.08361, section 2.1."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, precision=precision))
    site = choose_site(config, jax.devices()[:1])
    operations, eight = 0, 0
    for call, times in floor.product_calls(config, site):
        x, w, _ = call.args
        y = call()
        assert y.dtype == jnp.bfloat16
        sizes = round((x.size * w.size * y.size) ** 0.5)  # rows, columns and what is summed over are each in two of the three
        operations += times * 2 * sizes
        eight += x.dtype != jnp.bfloat16
    c, d = CONFIG.model, CONFIG.model.width
    weights = c.depth * (2 * d * d + 2 * d * 32 + 3 * d * 96) + d * 256
    assert operations == 6 * weights * site.rows * c.seq_len
    assert eight == eight_bits  # of blocks six forward, four twice back


def test_what_is_called_is_spread_over_a_microbatch():
    called = []
    floor.sustained([(lambda: called.append("product"), 4), (lambda: called.append("copy"), 2)], seconds=1e-3)
    assert called[:6] == ["product", "copy", "product", "product", "copy", "product"]


@pytest.mark.parametrize("asked", [1e6, 1.0])
def test_copies_say_what_they_move(asked):
    """To the nearest, and one at least."""
    ((copy, times),), moved = floor.copy_calls(CONFIG, rows=2, moved=asked)
    size = copy().nbytes
    assert moved == times * 2 * size
    assert times == 1 or abs(moved - asked) <= size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seconds 0", "--seconds is a finite time above 0, given 0"),
        ("--moved 10 -1", "--moved are finite numbers of GB above 0, given 10.0 -1.0; leave it out for none"),
        ("--moved nan", "--moved are finite numbers"),
        ("", "this asks what a GPU reaches at its power limit, and the device is a cpu"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        floor.main(words.split())
