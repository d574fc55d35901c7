"""Configs: derived sizes, refusals with remedies, the trip through JSON, and what every preset comes to."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
from pathlib import Path

import pytest

from nanojax import config as module
from nanojax.cli import load_preset
from nanojax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, nanochat
from nanojax.errors import UserError
from nanojax.sizes import resolve

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "configs").glob("*.py"))
PARTS = (ModelConfig, TrainConfig, OptimConfig, DataConfig)
CHANGED = Config(
    model=ModelConfig(depth=3, softcap=15.0, window=7, n_kv_head=1, ffn="relu2"),
    train=TrainConfig(steps=5, mesh="data=2,fsdp=2", remat=True, precision="bf16", compute_dtype="bf16"),
    optim=OptimConfig(betas=(0.9, 0.99), momentum=(0.5, 0.6), clip=None, reference_batch=None),
    data=DataConfig(path="texts", glob="**/*.py", mask_documents=True, max_documents=9, packing="concat"),
)


def four_bit(precision: str, int4_group: int = 128, fp4_recipe: str = "weights", **model) -> Config:
    return Config(
        model=ModelConfig(depth=2, **(dict(head_dim=64) | model)),
        train=TrainConfig(precision=precision, int4_group=int4_group, fp4_recipe=fp4_recipe),
    )


@pytest.mark.parametrize("config", [Config(), CHANGED, resolve(CHANGED, 1000)], ids=["default", "changed", "resolved"])
def test_a_config_survives_json(config):
    back = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)  # so no tuple came back as a list


def test_a_saved_config_may_lack_fields_that_came_later():
    assert Config.from_dict({"model": {"depth": 3}}) == Config(model=ModelConfig(depth=3))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"modle": {}}, "given also ['modle']"),
        ({"model": {"dept": 3}}, "section model: .*'dept'"),
        ({"model": {"depth": "three"}}, "section model"),
        ({"train": {"steps": -1}}, "steps=-1 must be above 0"),
    ],
    ids=str,
)
def test_a_saved_config_that_does_not_fit_is_refused_in_one_line(saved, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")) as caught:
        Config.from_dict(saved)
    assert "\n" not in str(caught.value)


def test_all_of_config_stays_small_enough_to_read():
    assert sum(len(dataclasses.fields(part)) for part in PARTS) <= 61


def test_every_field_says_what_it_is():
    tree = ast.parse(inspect.getsource(module))
    for part in PARTS:
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == part.__name__).body
        told = {
            field.target.id
            for field, after in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        }
        assert told == {field.name for field in dataclasses.fields(part)}, part.__name__


def test_configs_are_frozen_and_given_by_name():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.depth = 3  # pyright: ignore[reportAttributeAccessIssue]  # what is tested
    with pytest.raises(TypeError):
        ModelConfig(3)  # pyright: ignore[reportCallIssue]  # what is tested


@pytest.mark.parametrize(
    ("depth", "head_dim", "width", "heads", "hidden"),
    [
        (12, 128, 768, 6, 2048),
        (20, 128, 1280, 10, 3584),
        (24, 128, 1536, 12, 4096),
        (32, 128, 2048, 16, 5632),
        (3, 128, 256, 2, 768),
        (4, 32, 256, 8, 768),
    ],
)
def test_depth_sets_the_rest_by_hand(depth, head_dim, width, heads, hidden):
    c = ModelConfig(depth=depth, head_dim=head_dim)
    assert (c.width, c.n_head, c.kv_heads, c.hidden) == (width, heads, heads, hidden)
    assert ModelConfig(depth=depth, head_dim=head_dim, ffn="relu2").hidden == 4 * width


def test_a_pattern_says_which_layers_have_the_window_and_ends_long():
    def windows(depth: int, pattern: str) -> tuple:
        return ModelConfig(depth=depth, window=8, window_pattern=pattern).windows

    assert windows(6, "SSSL") == (8, 8, 8, None, 8, None)
    assert windows(5, "SL") == (8, None, 8, None, None)
    assert windows(3, "S") == (8, 8, 8)
    assert ModelConfig(depth=3).windows == (None, None, None)


def test_a_window_beyond_the_row_spans_the_row():
    assert [ModelConfig(depth=1, seq_len=100, window=w).spans[0] for w in (None, 5, 100, 101)] == [100, 5, 100, 100]


def test_the_nanochat_block_takes_changes():
    c = nanochat(20, vocab_size=65_536, softcap=None)
    assert (c.depth, c.vocab_size, c.softcap, c.norm, c.ffn, c.rope_base, c.kv_heads) == (20, 65_536, None, "fixed", "relu2", 10_000.0, 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(depth=0), "depth=0 must be above 0"),
        (lambda: ModelConfig(head_dim=33), "head_dim=33 must be even (RoPE rotates its halves); try 34"),
        (lambda: ModelConfig(d_model=1000), "d_model=1000 must be a multiple of head_dim=128; try --d-model 1024"),
        (lambda: ModelConfig(n_kv_head=4), "n_head=6 must be a multiple of n_kv_head=4; try --n-kv-head 3"),
        (lambda: ModelConfig(n_kv_head=12), "n_head=6 must be a multiple of n_kv_head=12; try --n-kv-head 6"),
        (lambda: ModelConfig(window_pattern="SSXL", window=4), "window_pattern='SSXL' must be made of S and L; try SSSL"),
        (lambda: ModelConfig(window_pattern="SL"), "window_pattern=SL needs a window; add --window 512"),
        (
            lambda: ModelConfig(window=8, window_pattern="LLLL"),
            "window=8 is for layers that are S, and window_pattern=LLLL makes none of depth=12",
        ),
        (lambda: ModelConfig(depth=1, window=8, window_pattern="SL"), "window_pattern=SL makes none of depth=1, the last being L"),
        (lambda: ModelConfig(window=0), "window=0 must be above 0"),
        (lambda: ModelConfig(softcap=float("inf")), "softcap=inf must be above 0"),
        (lambda: ModelConfig(rope_base=1.0), "rope_base=1.0 must be above 1; try 100000"),
        (lambda: OptimConfig(matrix_lr=float("nan")), "optim.matrix_lr=nan must be above 0"),
        (lambda: OptimConfig(weight_decay=-0.1), "optim.weight_decay=-0.1 must be at least 0"),
        (lambda: OptimConfig(warmdown=1.5), "optim.warmdown=1.5 must lie between 0 and 1"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "optim.betas=(0.9, 1.0) must lie in [0, 1); the default is (0.8, 0.95)"),
        (lambda: DataConfig(val_fraction=1.0), "data.val_fraction=1.0 must lie between 0 and 1; try 0.02"),
        (lambda: DataConfig(max_documents=1, mask_documents=True), "data.max_documents=1 must be at least 2"),
        (lambda: DataConfig(max_documents=9), "data.max_documents=9 is for documents hidden from each other; add --data.mask-documents"),
        (lambda: DataConfig(glob="*.py"), "data.glob='*.py' needs a folder to search; add --data.path DIR"),
        (lambda: TrainConfig(compute_dtype="bf16", precision="fp32"), "precision=fp32 needs fp32 activations"),
        (lambda: TrainConfig(mesh="data=2,model=2"), "given 'model=2'; try --mesh data=2,fsdp=2"),
        (lambda: TrainConfig(mesh="data=0"), "given 'data=0'"),
        (
            lambda: Config(train=TrainConfig(batch_tokens=5000)),
            "batch_tokens=5000 must be a multiple of seq_len=2048; try --batch-tokens 6144",
        ),
        (lambda: TrainConfig(fp4_head=True), "fp4_head=True needs a 4-bit precision, given auto; add --precision, one of int4, nvfp4"),
        (lambda: TrainConfig(precision="bf16", fp4_skip_last=2), "fp4_skip_last=2 needs a 4-bit precision, given bf16"),
        (lambda: TrainConfig(fp4_until=0.5), "fp4_until=0.5 needs a 4-bit precision, given auto"),
        (lambda: TrainConfig(precision="nvfp4", fp4_until=0.0), "fp4_until=0.0 must be above 0 and at most 1, the whole run; try 0.82"),
        (lambda: TrainConfig(precision="nvfp4", int4_group=64), "int4_group=64 needs precision=int4, given nvfp4"),
        (lambda: TrainConfig(precision="nvfp4", fp4_recipe="full"), "fp4_recipe=full has weights in nvfp4_2d, given precision=nvfp4"),
        (lambda: TrainConfig(precision="nvfp4", fp4_skip_first=-1), "fp4_skip_first=-1 must be at least 0"),
        (
            lambda: Config(model=ModelConfig(depth=4), train=TrainConfig(precision="nvfp4", fp4_skip_first=1, fp4_skip_last=3)),
            "fp4_skip_first=1 and fp4_skip_last=3 leave none of 4 blocks in 4 bits; skip fewer",
        ),
        (
            lambda: four_bit("int4", d_model=384, int4_group=256),
            "d_model=384 must be a multiple of the 256 that share a scale in int4; the nearest is --d-model 512, or --int4-group 128",
        ),
        (
            lambda: four_bit("mxfp4", d_ffn=1000),
            "d_ffn=1000 must be a multiple of the 32 that share a scale in mxfp4; the nearest is --d-ffn 992",
        ),
        (lambda: four_bit("nvfp4_2d", d_model=80, head_dim=40, n_kv_head=1), "n_kv_head * head_dim=40 must be a multiple of the 16"),
        (lambda: four_bit("auto", fp4_recipe="full", seq_len=40), "seq_len=40 must be a multiple of the 16"),
        (
            lambda: Config(train=TrainConfig(precision="fp8", compute_dtype="fp32")),
            "precision=fp8 needs bf16 activations, given compute_dtype=fp32; drop one of the two",
        ),
        (
            lambda: Config(model=ModelConfig(d_ffn=1000), train=TrainConfig(precision="fp8")),
            "d_ffn=1000 must be a multiple of 16 in fp8; the nearest is --d-ffn 992",
        ),
        (lambda: Config(train=TrainConfig(loss_blocks=7)), "seq_len=2048 must be a multiple of loss_blocks=7; try --loss-blocks 8"),
    ],
)
def test_bad_values_are_refused_in_one_line_with_rule_value_and_remedy(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "saved",
    [
        {"model": {"ffn": "gelu"}},
        {"model": {"norm": "layer"}},
        {"train": {"attn_impl": "flash"}},
        {"train": {"compute_dtype": "fp16"}},
        {"data": {"packing": "x"}},
    ],
    ids=str,
)
def test_a_choice_that_there_is_not_is_refused_wherever_it_is_made(saved):
    with pytest.raises(UserError):
        Config.from_dict(saved)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_comes_to_what_it_came_to_before(path, golden):
    preset = load_preset(path)
    golden(f"{path.stem}.txt", resolve(preset, preset.model.vocab_size).text())


def test_every_preset_with_a_golden_file_still_exists():
    texts = {path.stem: path.read_text() for path in (ROOT / "tests/golden").glob("*.txt")}
    assert {name for name, text in texts.items() if text.startswith("model.")} == {path.stem for path in PRESETS}


def test_the_text_names_every_field_once():
    lines = Config().text().splitlines()
    names = [line.split(" = ")[0] for line in lines]
    assert len(set(names)) == len(names) == sum(len(dataclasses.fields(part)) for part in PARTS)
    assert "model.depth = 12" in lines
    assert "optim.betas = (0.8, 0.95)" in lines
