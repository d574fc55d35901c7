"""The command line: what parses, what is refused and with which words, and how soon the help is there."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest

from nanojax import config as configs
from nanojax.cli import FLAT, POSITIONAL, flags, load_preset, parse, split_preset
from nanojax.config import Config, ModelConfig
from nanojax.errors import UserError
from nanojax.ranks import Ranks
from nanojax.train import TrainCommand, read_command

ROOT = Path(__file__).parents[1]
HELP_SECONDS = 1.0  # alone it takes 0.3 s; other tests run on the other cores


def command(*argv: str) -> TrainCommand:
    return parse(TrainCommand, argv, prog="nanojax train", description="Train.")


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        command(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def help_text() -> str:
    run = subprocess.run([sys.executable, "-m", "nanojax", "train", "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    return run.stdout


def test_flags_reach_their_sections():
    config = command(
        "--depth", "4", "--remat", "--optim.matrix-lr", "0.5", "--data.packing", "concat", "--tokenizer", "gpt2", "--steps=7"
    ).config
    assert config.model.depth == 4
    assert config.train.remat
    assert config.train.steps == 7
    assert config.optim.matrix_lr == 0.5
    assert config.data.packing == "concat"
    assert config.data.tokenizer == "gpt2"


def test_without_flags_nothing_differs_from_the_default():
    assert command() == TrainCommand()


def test_underscores_serve_as_hyphens():
    assert command("--seq_len", "1024", "--optim.matrix_lr=0.5").config == command("--seq-len", "1024", "--optim.matrix-lr", "0.5").config


def test_none_and_pairs_can_be_given():
    optim = command("--optim.clip", "None", "--optim.betas", "0.9", "0.99").config.optim
    assert (optim.clip, optim.betas) == (None, (0.9, 0.99))


def test_flags_override_the_preset_and_leave_the_rest_of_it():
    made, name = read_command([str(ROOT / "configs/tiny.py"), "--depth", "2"])
    preset = load_preset(ROOT / "configs/tiny.py")
    assert name == "tiny"
    assert made.config == dataclasses.replace(preset, model=dataclasses.replace(preset.model, depth=2))


def test_a_switch_of_the_preset_can_be_turned_off():
    on = TrainCommand(config=command("--remat").config)
    off = parse(TrainCommand, ["--no-remat"], prog="nanojax train", description="", default=on)
    assert off.config == Config()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seqlen", "3"], "unknown option --seqlen; did you mean --seq-len?"),
        (["--model.depth", "3"], "unknown option --model.depth; did you mean --depth?"),
        (["--matrix-lr=1"], "unknown option --matrix-lr; did you mean --optim.matrix-lr?"),
        (["--xyzzy"], "unknown option --xyzzy; see nanojax train --help"),
        (["--depth", "three"], "--depth"),
        (["--depth"], "Missing value for argument '--depth'"),
        (["--ffn", "gelu"], "'gelu' for argument '--ffn'. Expected one of ('swiglu', 'relu2')"),
        (["--optim.betas", "0.9"], "--optim.betas"),
        (["--head-dim", "33"], "head_dim=33 must be even"),
        (["--optim.clip", "-1"], "optim.clip=-1.0 must be above 0"),
        (["stray"], "stray"),
    ],
    ids=str,
)
def test_a_wrong_call_is_answered_in_one_line(argv, words):
    assert words in refused(*argv)


def test_the_help_lists_every_flag_that_is_known_and_no_other(help_text):
    listed = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z]", re.sub(r"\(default:.*?\)", "", help_text, flags=re.DOTALL)))
    listed -= {"--help", "--debug"}
    own = set(flags(TrainCommand))
    assert own >= {"--depth", "--tokenizer", "--no-remat", "--optim.clip", "--print-config"}
    assert listed == own


def test_the_help_tells_what_every_field_is(help_text):
    def letters(text: str) -> str:
        return re.sub(r"[\s│]+", "", text)

    for part in (configs.ModelConfig, configs.TrainConfig, configs.OptimConfig, configs.DataConfig, TrainCommand, Ranks):
        source = Path(sys.modules[part.__module__].__file__ or "").read_text()
        body = source.split(f"class {part.__name__}:")[1].split("\n@dataclass")[0].split("\n\ndef ")[0]
        told = re.findall(r'^    (\w+): .*\n    """(.*?)"""', body, flags=re.MULTILINE)
        nested = sum("FLAT" in str(field.type) for field in dataclasses.fields(part))  # those have flags of their own instead
        assert len(told) >= len(dataclasses.fields(part)) - max(1, nested)  # or one whose words take two lines
        for name, words in told:
            assert letters(words) in letters(help_text), name


def test_help_answers_at_once():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nanojax", "train", "--help"], capture_output=True, check=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    assert min(times) < HELP_SECONDS


@pytest.mark.parametrize(
    "argv", [["train", "--help"], ["train", "configs/tiny.py", "--print-config"], ["train", "--seqlen", "3"], []], ids=str
)
def test_neither_help_nor_a_refusal_imports_jax(argv):
    program = f"""
import sys
from nanojax.__main__ import dispatch
try:
    dispatch({argv!r})
except (SystemExit, ValueError):
    pass
print(sorted({{"jax", "flax", "optax", "orbax", "grain", "numpy"}} & set(sys.modules)), file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stderr.strip() == "[]"


def test_prefixes_positionals_and_switches_of_any_command_are_known():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        rate: float = 1.0
        on_top: bool = False

    @dataclasses.dataclass(frozen=True)
    class Command:
        run: Annotated[str, POSITIONAL]
        inner: Inner = dataclasses.field(default_factory=Inner)
        flat: Annotated[ModelConfig, FLAT] = dataclasses.field(default_factory=ModelConfig)

    # type hints of local classes are resolved where they are defined
    Command.__annotations__.update(run=Annotated[str, POSITIONAL], inner=Inner, flat=Annotated[ModelConfig, FLAT])
    Inner.__annotations__.update(rate=float, on_top=bool)
    found = flags(Command)
    assert found[:3] == ["--inner.rate", "--inner.on-top", "--inner.no-on-top"]
    assert "--depth" in found
    assert "--run" not in found
    made = parse(Command, ["runs/x", "--inner.rate", "2", "--inner.on-top", "--depth", "3"], prog="x", description="")
    assert (made.run, made.inner, made.flat.depth) == ("runs/x", Inner(2.0, True), 3)


def test_a_call_without_a_preset_takes_the_default():
    assert split_preset(["--depth", "3"]) == (Config(), ["--depth", "3"])
    assert split_preset([]) == (Config(), [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\n", "a preset must assign .* has config=None"),
        ("config = 3\n", "has config=3"),
        ("config = 1 / 0\n", "raised ZeroDivisionError: division by zero"),
        ("config = (\n", "raised SyntaxError"),
        ("from nanojax.config import *\nconfig = Config(model=ModelConfig(depth=0))\n", "depth=0 must be above 0"),
        ("from nanojax.config import *\nconfig = Config(model=ModelConfig(dept=0))\n", "raised TypeError: .*'dept'"),
    ],
    ids=["none", "not-a-config", "raises", "syntax", "refused", "misspelt"],
)
def test_a_preset_that_cannot_serve_is_named_with_what_is_wrong(tmp_path, source, words):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(UserError, match=words) as caught:
        load_preset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_preset_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"'configs/tinny.py' is none; try configs/tiny.py"):
        split_preset(["configs/tinny.py"])
    with pytest.raises(UserError, match="a preset is a Python file"):
        split_preset(["configs"])
