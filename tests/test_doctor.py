"""`nanojax doctor`: what it says of a machine, and when it ends in failure."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from nanojax import doctor
from nanojax.errors import NanoJaxError
from nanojax.ops import attention
from nanojax.ops.attention import BACKENDS, reference_attention
from nanojax.ops.attention_check import small


@pytest.fixture
def quick(monkeypatch):
    """One group, of one case; the whole table takes a CPU half a minute."""
    monkeypatch.setattr(doctor, "HEADS", {"MQA": (2, 1)})
    monkeypatch.setattr(doctor, "DOCUMENTS", (3,))
    monkeypatch.setattr(doctor, "SHAPES", ((16, 9, 4),))


def test_a_good_machine_is_told_in_a_line_a_group(quick, capsys):
    doctor.main([])
    said = capsys.readouterr().out
    assert "1 x cpu (cpu)" in said
    assert all(f"{library} " in said for library in doctor.LIBRARIES)
    assert "te  not run: te runs on NVIDIA GPUs, and the device is a cpu\n" in said
    assert "cudnn  not run: cudnn runs on NVIDIA GPUs, and the device is a cpu\n" in said
    (line,) = (line for line in said.splitlines() if "MQA" in line)
    assert "xla  MQA, 3 documents a row: ok: 1 cases, at most 0." in line


def wrong(*qkv, window=None, segments_BT=None):
    return reference_attention(*qkv, window=window)


def failing(*qkv, **sight):
    raise RuntimeError("out of plans\nand of patience")


@pytest.mark.parametrize(("backend", "words"), [(wrong, "WRONG: 1 cases, at most "), (failing, "FAILED: RuntimeError: out of plans\n")])
def test_a_backend_that_is_wrong_or_fails_is_named_and_exits_1(quick, monkeypatch, capsys, backend, words):
    monkeypatch.setattr(attention, "BACKENDS", {**BACKENDS, "xla": backend})
    with pytest.raises(NanoJaxError, match="these do not: xla, MQA, 3 documents a row; choose another") as caught:
        doctor.main([])
    assert caught.value.exit_code == 1
    assert words in capsys.readouterr().out


def test_what_is_refused_is_not_run_and_says_why():
    found = doctor.examine("te", doctor.groups(jax.devices()[0], jnp.float32)["MHA, one document"])
    assert (found.served, found.good) == (0, True)
    assert str(found) == "not run: te runs on NVIDIA GPUs, and the device is a cpu"


def test_the_table_holds_each_value_of_one_thing_with_each_of_another():
    cases = [case for cases in doctor.groups(jax.devices()[0], jnp.float32).values() for case in cases]
    assert len(cases) == 24
    for a, b in itertools.combinations(("head_dim", "tokens", "windows", "documents", "kv_heads"), 2):
        pairs = {(getattr(case, a), getattr(case, b)) for case in cases}
        assert len(pairs) == len({x for x, _ in pairs}) * len({y for _, y in pairs}), (a, b)
    assert {case.tokens % 2 for case in cases} == {0, 1}
    assert all(small(case).head_dim == case.head_dim for case in cases)
