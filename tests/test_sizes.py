"""Arithmetic on configs: batch, steps, bytes, and batches that cannot be dealt out."""

from __future__ import annotations

import dataclasses
import re

import jax
import pytest

from nanojax.config import Config, ModelConfig, TrainConfig
from nanojax.errors import UserError
from nanojax.program import make_program
from nanojax.sizes import count_parameters, micro_batch, resolve, state_bytes, step_bytes


def resolved(depth: int = 12, vocab_size: int = 32_768, model: dict | None = None, **train) -> Config:
    return resolve(Config(model=ModelConfig(depth=depth, **(model or {})), train=TrainConfig(**train)), vocab_size)


@pytest.mark.parametrize(("depth", "batch", "steps"), [(4, 2**18, 860), (12, 2**19, 2520), (20, 2**20, None), (24, 2**20, 8352)])
def test_batch_and_steps_are_nanochats(depth, batch, steps):
    # nanochat.md, section 1.5, whose scaling parameters are ours where 8D/3 is a multiple of 256 (12, 24)
    config = resolved(depth)
    assert config.batch_tokens == batch
    if depth in (12, 24):
        assert config.steps == steps


def test_steps_by_hand():
    # 12 layers of 12 * 768**2 and a head of 32,768 * 768: 110,100,480 scaling parameters; times 12 over 2**19
    assert count_parameters(ModelConfig(depth=12)).scaling == 110_100_480
    assert resolved(12).steps == round(12 * 110_100_480 / 2**19) == 2520
    assert resolved(12, tokens_per_param=1.0).steps == 210
    assert resolved(12, batch_tokens=2**20).steps == 1260
    assert resolved(12, steps=7).steps == 7


def test_a_run_has_at_least_one_step():
    assert resolved(1, batch_tokens=2**30, tokens_per_param=1e-6).steps == 1


def test_a_derived_batch_holds_whole_rows():
    config = resolved(model=dict(seq_len=1000))
    assert config.batch_tokens % 1000 == 0
    assert 2**19 <= config.batch_tokens < 2**19 + 1000


def test_the_vocabulary_is_padded_to_full_tiles():
    assert [resolved(vocab_size=v).model.vocab_size for v in (1, 128, 129, 32_768, 50_257)] == [128, 128, 256, 32_768, 50_304]


def test_resolving_fills_every_size_in_and_twice_is_once():
    config = resolved(12)
    assert (config.model.d_model, config.model.n_kv_head, config.model.d_ffn) == (768, 6, 2048)
    assert resolve(config, 32_768) == config


def test_what_is_given_is_kept():
    config = resolved(4, model=dict(d_model=128, head_dim=32, n_kv_head=2, d_ffn=100), steps=3, batch_tokens=4096)
    assert (config.model.d_model, config.model.n_kv_head, config.model.d_ffn, config.steps, config.batch_tokens) == (128, 2, 100, 3, 4096)


def test_bytes_of_the_state_are_those_of_its_arrays(tiny_config):
    model = tiny_config(vocab_size=128)
    config = resolve(Config(model=model, train=TrainConfig(steps=1, batch_tokens=12, loss_blocks=1)), 128)
    shapes = make_program(config, jax.devices()[:1]).shapes
    arrays = jax.tree.leaves((shapes.params, shapes.moments))
    assert state_bytes(model) == sum(x.size * 4 for x in arrays if x.ndim)  # without the counters


def test_bytes_of_a_step_by_hand(tiny_config):
    # 2 layers of 7680, head and embedding 32 * 64 each, gains 224 (test_model.py): fp32 gradients of all, bf16 copies of matrices and head
    assert step_bytes(tiny_config()) == 4 * (2 * 7680 + 2 * 2048 + 224) + 2 * (2 * 7680 + 2048)


@pytest.mark.parametrize(
    ("batch_tokens", "replicas", "rows"),
    [(2**19, 1, 32), (2**19, 8, 32), (2**19, 16, 16), (2048, 1, 1), (2048 * 34, 1, 17), (2048 * 37, 1, 1)],
)
def test_rows_of_a_microbatch_are_the_most_that_divide_the_share(batch_tokens, replicas, rows):
    assert micro_batch(resolved(batch_tokens=batch_tokens), replicas) == rows


def test_long_rows_come_fewer_at_a_time():
    assert micro_batch(resolved(model=dict(seq_len=2**14), batch_tokens=2**19), 1) == 4  # 65,536 tokens
    assert micro_batch(resolved(model=dict(seq_len=2**18), batch_tokens=2**19), 1) == 1


def remedy(call) -> tuple[str, int]:
    """(flag, value) that a refusal proposes."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    found = re.search(r"try --(\S+) (\d+)$", str(caught.value))
    assert found, caught.value
    return found[1].replace("-", "_"), int(found[2])


def test_rows_that_devices_cannot_share_are_refused_with_a_batch_that_they_can():
    config = resolved(batch_tokens=2048 * 10)
    flag, value = remedy(lambda: micro_batch(config, 4))
    assert (flag, value) == ("batch_tokens", 2048 * 12)
    mended = dataclasses.replace(config, train=dataclasses.replace(config.train, **{flag: value}))
    assert micro_batch(mended, 4) == 3


@pytest.mark.parametrize(("given", "better"), [(5, 4), (12, 8), (64, 16)])
def test_a_microbatch_that_does_not_divide_is_refused_with_the_nearest_that_does(given, better):
    config = resolved(batch_tokens=2048 * 32, micro_batch=given)
    flag, value = remedy(lambda: micro_batch(config, 2))
    assert (flag, value) == ("micro_batch", better)
    mended = dataclasses.replace(config, train=dataclasses.replace(config.train, **{flag: value}))
    assert micro_batch(mended, 2) == better


def test_the_full_recipe_leaves_fifteen_percent_of_the_blocks_and_weight_rounding_none():
    def skipped(depth: int, **train) -> int | None:
        return resolve(Config(model=ModelConfig(depth=depth), train=TrainConfig(**train)), 1000).train.fp4_skip_last

    assert [skipped(depth, fp4_recipe="full") for depth in (1, 2, 12, 20)] == [0, 1, 2, 3]
    assert skipped(12, precision="nvfp4") == skipped(12) == 0
    assert skipped(12, fp4_recipe="full", fp4_skip_last=5) == 5
