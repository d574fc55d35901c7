"""`nanojax sample` on a run that is there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from training import config, presets, start, straight  # noqa: F401  # fixtures

from nanojax.checkpoint import Checkpoints
from nanojax.infer.load import open_source
from nanojax.infer.sample import SampleCommand, generate
from nanojax.infer.sample import main as sample_main
from nanojax.model import merge
from nanojax.program import make_program


def sample(straight, capsys, *flags) -> str:
    sample_main([str(straight.folder.path), "--prompt", "ba ko", "--tokens", "30", *flags])
    return capsys.readouterr().out


def test_a_sample_begins_with_its_prompt_and_follows_its_seed(straight, capsys):
    one, again, other = (sample(straight, capsys, "--seed", seed) for seed in ("3", "3", "4"))
    assert one.startswith("ba ko")
    assert len(one) > len("ba ko\n")
    assert one == again
    assert one != other


def test_temperature_zero_takes_the_likeliest_token_of_the_full_forward_pass(straight, config):
    """Also beyond the model's window, where the model sees the last 64 tokens."""
    command = SampleCommand(run="it", prompt="ba ko", tokens=80, temperature=0.0, seed=1)
    tokenizer = straight.folder.tokenizer()
    added = list(generate(open_source(straight.folder.path), command))
    ids = [tokenizer.bos, *tokenizer.encode("ba ko"), *added]
    assert len(ids) > 66, "the text must leave the window"
    program = make_program(config, jax.devices()[:1])
    checkpoints = Checkpoints(straight.folder.checkpoints)
    params = checkpoints.restore_params(program.shapes.params, program.shardings.params)
    checkpoints.close()
    with jax.set_mesh(program.mesh):
        model = merge(program.graph, program.phases[0].prepare(params))
        windows = np.array([ids[:64], *(ids[n : n + 64] for n in range(1, len(ids) - 63))], np.int32)
        logits = np.asarray(model(jnp.asarray(windows)))[..., : tokenizer.n_vocab]
    first = len(ids) - len(added)
    inside = logits[0, first - 1 :].argmax(-1).tolist()
    outside = logits[1:, -1].argmax(-1).tolist()
    expected = inside + outside
    assert expected[: len(added)] == added


def test_a_top_k_of_one_is_the_likeliest_token_too(straight, capsys):
    assert sample(straight, capsys, "--top-k", "1", "--seed", "5") == sample(straight, capsys, "--temperature", "0")
