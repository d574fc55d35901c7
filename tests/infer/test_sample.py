"""`nanojax sample` on a run that is there."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import cast

import jax
import numpy as np
import pytest
from exporting import FORMATS, runs  # noqa: F401  # fixture
from generating import BYTES
from training import config, presets, start, straight  # noqa: F401  # fixtures

from nanojax.checkpoint import Checkpoints
from nanojax.errors import UserError
from nanojax.infer import sample as sample_module
from nanojax.infer.engine import Engine, Piece
from nanojax.infer.load import Source
from nanojax.infer.params import SamplingParams
from nanojax.infer.sample import SEPARATOR, SampleCommand
from nanojax.infer.sample import main as sample_main
from nanojax.model import merge
from nanojax.program import make_program


@pytest.fixture(scope="module")
def sample(straight):
    """sample(*flags): what is printed, known from the first time."""

    @functools.cache
    def run(*flags: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            sample_main([str(straight.folder.path), "--prompt", "ba ko", "--tokens", "30", *flags])
        return out.getvalue()

    return run


def test_a_sample_begins_with_its_prompt_and_follows_its_seed(sample):
    one, again, other = sample("--seed", "3"), sample.__wrapped__("--seed", "3"), sample("--seed", "4")
    assert one.startswith("ba ko")
    assert len(one) > len("ba ko\n")
    assert one == again
    assert one != other


def test_temperature_zero_takes_the_likeliest_token_of_the_full_forward_pass(straight, config, capsys):
    """Up to the end of the context of 64 tokens, which is told."""
    sample_main([str(straight.folder.path), "--prompt", "ba ko", "--tokens", "80", "--temperature", "0"])
    text, said = capsys.readouterr()
    assert "the text ends where the context does, at seq_len=64 tokens" in said
    tokenizer = straight.folder.tokenizer()
    program = make_program(config, jax.devices()[:1])
    checkpoints = Checkpoints(straight.folder.checkpoints)
    weights = program.phases[0].prepare(checkpoints.restore_params(program.shapes.params, program.shardings.params))
    checkpoints.close()
    ids = [tokenizer.bos, *tokenizer.encode("ba ko")]
    forward = jax.jit(lambda weights, tokens_BT: merge(program.graph, weights)(tokens_BT))
    with jax.set_mesh(program.mesh):
        while len(ids) < 65:
            row = np.array([ids + [0] * (64 - len(ids))], np.int32)
            ids.append(int(forward(weights, row)[0, len(ids) - 1, : tokenizer.n_vocab].argmax()))
    assert text == tokenizer.decode(ids[1:]) + "\n"


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_on_a_gpu_an_export_in_4_bits_is_sampled_as_it_is_stored(runs, format, capsys):
    groups = {"int4_group": 64} if format == "int4" else {}
    folder = runs.export(precision=format, **groups)
    capsys.readouterr()
    sample_main([str(folder), "--prompt", "ba ko", "--tokens", "9", "--temperature", "0"])
    text, said = capsys.readouterr()
    assert said.startswith(f"nanojax: {format}, exported, by fused kernels")
    assert text.startswith("ba ko")
    assert len(text) > len("ba ko\n")


def test_several_samples_are_those_of_consecutive_seeds(sample):
    one, two = (sample("--seed", seed) for seed in ("3", "4"))
    assert sample("--seed", "3", "--n", "2") == one + SEPARATOR + "\n" + two


def test_many_samples_are_made_in_groups(monkeypatch):
    groups = []

    class Stub:
        tokenizer = BYTES

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

        def generate(self, prompts: list[list[int]], rows: list[SamplingParams]) -> list[Piece]:
            groups.append([row.seed for row in rows])
            return [Piece([ord("a") + row.seed], "tokens") for row, ids in zip(rows, prompts, strict=True) if ids == list(b"p")]

    monkeypatch.setattr(sample_module, "ROWS", 2)
    found = sample_module.samples(cast(Engine, Stub()), SampleCommand(run="run", prompt="p", n=5, seed=3))
    assert "".join(found) == f"\n{SEPARATOR}\n".join(["pd", "pe", "pf", "pg", "ph"]) + "\n"
    assert groups == [[3, 4], [5, 6], [7]]


def test_samples_that_do_not_fit_into_memory_are_told_in_a_line(straight, monkeypatch):
    def load(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Source, "load", load)
    with pytest.raises(UserError, match=r"the devices are out of memory .*; try fewer samples with --n"):
        sample_main([str(straight.folder.path), "--n", "2"])


def test_a_top_k_of_one_is_the_likeliest_token_too(sample):
    assert sample("--top-k", "1", "--seed", "5") == sample("--temperature", "0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n", "0"], "n=0 must be at least 1; try 1"),
        (["--seed", "2147483647", "--n", "2"], "seed=2147483647 and n=2 the last is 2147483648; try --seed 2147483646"),
        (["--top-p", "0"], "top_p=0.0 must be above 0"),
        (["--min-p", "1"], "min_p=1.0 must be at least 0"),
        (["--tokens", "-1"], "tokens=-1 must be at least 0"),
        (["--prompt", "ba ko " * 100], "a prompt must fit seq_len=64"),
    ],
    ids=str,
)
def test_wrong_flags_are_refused_in_one_line_and_nothing_is_printed(straight, capsys, flags, words):
    with pytest.raises(UserError) as refused:
        sample_main([str(straight.folder.path), *flags])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not capsys.readouterr().out
