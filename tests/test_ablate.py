"""Ablations: what is changed, what is left out and why, and how gaps are counted."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from nanojax.config import Config
from nanojax.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "scripts/bench"))

import ablate
import study

BASE = Config(model=dataclasses.replace(Config().model, depth=2, d_model=512, head_dim=64, seq_len=128, vocab_size=512))


def test_a_variant_changes_one_thing():
    found = ablate.variants(BASE)
    assert found["base"] == BASE
    assert {name for name in found if name.startswith("8 heads")} == {"8 heads, 4 kv", "8 heads, 2 kv", "8 heads, 1 kv"}
    for name, config in found.items():
        assert isinstance(config, Config)
        changed = [
            (part, key)
            for part, fields in config.to_dict().items()
            for key, value in fields.items()
            if value != BASE.to_dict()[part][key] and key != "int4_group"
        ]
        assert len(changed) == (name != "base"), name


def test_sizes_that_do_not_divide_and_devices_that_do_not_serve_are_said():
    odd = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, d_model=448, head_dim=64))
    found = ablate.variants(odd)
    assert "must be a multiple of the 256" in str(found["int4 g256"])
    assert ablate.refusal(found["int4 g256"]) == str(found["int4 g256"])
    assert "te runs on NVIDIA GPUs" in (ablate.refusal(found["te"]) or "")
    assert "compute capability 9.0" in (ablate.refusal(found["fp8"]) or "")
    assert ablate.refusal(found["relu2"]) is None


def test_gaps_are_to_the_base_of_the_same_seed():
    found = [
        dict(variant=name, seed=seed, bpb=bpb) for name, seed, bpb in (("base", 0, 1.0), ("base", 1, 2.0), ("x", 0, 1.1), ("x", 1, 1.9))
    ]
    assert ablate.gaps(found, "x") == pytest.approx([10, -5])
    assert ablate.spread([10.0, -5.0], 1) == "2.5 ± 10.6"


@pytest.mark.parametrize(
    ("changed", "words"),
    [(dict(share="2"), "share=2 must be i/n"), (dict(share="3/3"), "i below n"), (dict(seeds=0), "seeds=0"), (dict(tokens=5), "50 steps")],
)
def test_studies_that_cannot_be_are_refused(changed, words, tmp_path):
    with pytest.raises(UserError, match=words):
        study.Study(out=str(tmp_path), **changed)


def test_a_folder_keeps_to_one_study(tmp_path):
    one = study.Study(out=str(tmp_path), minutes=0)
    study.require_same(dataclasses.replace(one, depth=3), "ablate", tmp_path)  # of which no run was made
    study.require_same(one, "ablate", tmp_path)()
    study.require_same(dataclasses.replace(one, seeds=9, share="1/2"), "ablate", tmp_path)
    with pytest.raises(UserError, match=r"holds the runs of another study, changed are depth 8 -> 4; give another --out"):
        study.require_same(dataclasses.replace(one, depth=4), "ablate", tmp_path)
    with pytest.raises(UserError, match=r"script ablate -> fp4_study"):
        study.require_same(one, "fp4_study", tmp_path)


def test_a_study_goes_on_where_it_was_even_after_a_torn_line(tmp_path, capsys):
    one, ran = study.Study(out=str(tmp_path), seeds=2), []

    def run(name: str, seed: int) -> dict:
        ran.append((name, seed))
        return dict(variant=name, seed=seed, bpb=1.0, step_ms=1.0)

    assert len(study.carry_out(one, "x", ["a"], run, 0.0)) == 2
    file = tmp_path / "results-0.jsonl"
    file.write_text(file.read_text()[:-9])
    found = study.carry_out(dataclasses.replace(one, minutes=1e12), "x", ["a", "b"], run, 0.0)
    assert ran[2:] == [("b", 0), ("a", 1), ("b", 1)]
    assert [(r["variant"], r["seed"]) for r in found] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert "cut off" in capsys.readouterr().out
    (tmp_path / "study.json").unlink()
    with pytest.raises(UserError, match="another study"):
        study.carry_out(one, "x", ["a"], run, 0.0)
