"""Faults on demand: how they are written, when they strike, and what each of them does."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.errors import UserError
from nanojax.faults import IN_STEP, KINDS, Fault, Faults, parse_faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nan_grad@step=7", Fault("nan_grad", 7, 7)),
        ("nan_loss@step=7..", Fault("nan_loss", 7)),
        (" spike_grad@batch=7..12 , x=1e3 ", Fault("spike_grad", 7, 12, "batch", x=1e3)),
        ("slow@rank=1", Fault("slow", rank=1, x=2.0)),
        ("stall", Fault("stall", x=math.inf)),
        ("crash@step=3,resumed=0", Fault("crash", 3, 3, resumed=False)),
    ],
)
def test_an_entry_says_what_when_and_where(text, fault):
    assert parse_faults(text) == (fault,)
    assert parse_faults(str(fault)) == (fault,), "and is said in words that mean the same"


def test_entries_are_separated_by_semicolons_and_nothing_is_no_fault():
    assert [fault.kind for fault in parse_faults("crash@step=3; slow@rank=1,x=3;")] == ["crash", "slow"]
    assert parse_faults("") == parse_faults(" ; ") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nan_grads@step=7", r"of the kinds nan_loss, .*; given 'nan_grads@step=7', choose"),
        ("nan_grad@", "each at most once and with a value; given 'nan_grad@', try nan_grad@step=7"),
        ("nan_grad@step", "each at most once"),
        ("nan_grad@steps=7", "each at most once"),
        ("nan_grad@step=7,step=8", "each at most once"),
        ("nan_grad@step=7,batch=8", "and not both"),
        ("nan_grad@step=0", "a number from 1 on"),
        ("nan_grad@step=-1", "a number from 1 on"),
        ("nan_grad@step=7..6", "try nan_grad@step=7..12"),
        ("nan_grad@step=7..8..9", "a number from 1 on"),
        ("nan_grad@step=1e3", "a number from 1 on"),
        ("nan_grad@step=7,rank=1", "those of all processes together"),
        ("nan_grad@step=7,x=2", "no x= for nan_grad"),
        ("slow@rank=-1", "a whole number from 0 on as rank=; .*, try slow@rank=1"),
        ("slow@x=0", "above 0 as x="),
        ("slow@x=nan", "above 0 as x="),
        ("slow@x=1e999", "above 0 as x="),
        ("slow@x=1.2.3", "above 0 as x="),
        ("slow@x=.", "above 0 as x="),
        ("crash@resumed=yes", "0 or 1 as resumed="),
    ],
)
def test_an_entry_that_is_wrong_is_refused_in_a_line(text, words):
    with pytest.raises(UserError, match=words) as refused:
        parse_faults(text)
    assert "\n" not in str(refused.value)


def test_without_the_variable_nothing_is_meant_and_the_step_takes_no_factors():
    faults = Faults.from_environment(resumed=False, environment={})
    params = {"w": object()}
    assert (faults.facts, faults.in_step, faults.factors(1, 1), faults.before_step(1, 1, params)) == ({}, False, (), params)


def test_a_wrong_specification_ends_the_run_before_jax_is_imported(tmp_path):
    code = (
        "import sys\nfrom nanojax.train import main\nfrom nanojax.errors import UserError\n"
        "try:\n    main([])\nexcept UserError as error:\n    print(error, 'jax' in sys.modules)"
    )
    env = os.environ | {"NANOJAX_FAULT": "nan@step=1"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.startswith("NANOJAX_FAULT takes entries like")
    assert said.endswith("False\n")


def test_a_process_has_the_faults_of_its_rank_and_of_its_beginning():
    environment = {"NANOJAX_FAULT": "slow@step=2,rank=1; crash@step=9,resumed=0"}
    begun, resumed = (Faults.from_environment(resumed=r, environment=environment) for r in (False, True))
    assert [entry.kind for entry in begun.entries] == ["slow", "crash"]
    assert [entry.kind for entry in resumed.entries] == ["slow"]
    assert begun.meant("slow", 2, 2) is None, "this is rank 0"
    begun.rank = 1
    assert begun.meant("slow", 2, 2) is not None
    assert begun.meant("slow", 3, 3) is None
    assert begun.facts == {"FAULTS": "on purpose, by NANOJAX_FAULT: slow@step=2,rank=1,x=2; crash@step=9,resumed=0"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nan_loss", (math.nan, 1)),
        ("nan_grad", (1, math.nan)),
        ("inf_grad", (1, math.inf)),
        ("spike_grad", (1, 1e4)),
        ("spike_loss@x=3", (3, 1)),
        ("spike_loss@x=3;spike_grad@x=5", (3, 5)),
        ("crash@step=1; nan_grad@step=2", (1, 1)),
    ],
)
def test_factors_of_loss_and_gradient(text, expected):
    (factors,) = Faults(parse_faults(text)).factors(1, 1)
    np.testing.assert_array_equal(factors, np.array(expected, np.float32))


def test_steps_come_again_after_a_roll_back_and_batches_do_not():
    by_step, by_batch = (Faults(parse_faults(f"nan_grad@{counts}=7")) for counts in ("step", "batch"))
    assert all(np.isnan(faults.factors(7, 7)[0][1]) for faults in (by_step, by_batch))
    assert np.isnan(by_step.factors(7, 30)[0][1])
    assert by_batch.factors(7, 30)[0][1] == 1


def test_what_strikes_the_host_strikes_a_number_once():
    faults = Faults(parse_faults("io_error@step=3..4"))
    struck = []
    for step in (2, 3, 4, 3, 5):
        try:
            faults.in_save(step)
        except OSError:
            struck.append(step)
    assert struck == [3, 4]


def test_a_save_takes_longer():
    faults = Faults(parse_faults("slow_save@step=3,x=0.05"))
    began = time.monotonic()
    faults.in_save(2)
    assert time.monotonic() - began < 0.05
    faults.in_save(3)
    assert time.monotonic() - began >= 0.05


def test_data_is_late_or_cannot_be_read():
    faults = Faults(parse_faults("slow_data@step=1,x=0.05; data_error@batch=2"))
    began = time.monotonic()
    faults.before_batch(1, 1)
    assert time.monotonic() - began >= 0.05
    with pytest.raises(OSError, match="the data, by NANOJAX_FAULT"):
        faults.before_batch(2, 2)


def test_a_process_sleeps_or_takes_longer_from_step_to_step():
    began = time.monotonic()
    Faults(parse_faults("stall@step=1,x=0.15")).before_step(1, 1, {})
    assert time.monotonic() - began >= 0.15
    slow = Faults(parse_faults("slow@x=3"))
    slow.before_step(1, 1, {})
    time.sleep(0.05)
    began = time.monotonic()
    slow.before_step(2, 2, {})
    assert time.monotonic() - began >= 0.1, "twice what the step took, on top of it"


@pytest.mark.parametrize(("kind", "number"), [("crash", signal.SIGKILL), ("sigterm", signal.SIGTERM)])
def test_a_process_gets_a_signal(kind, number):
    code = f"from nanojax.faults import *\nFaults(parse_faults('{kind}@step=2')).before_step(2, 2, {{}})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -number


def test_one_value_of_a_parameter_becomes_infinite():
    params = {"gain": jnp.ones(3), "w": jnp.ones((2, 3))}
    faults = Faults(parse_faults("inf_param@step=2"))
    assert faults.before_step(1, 1, params) is params
    spoiled = faults.before_step(2, 2, params)
    np.testing.assert_array_equal(spoiled["gain"], [np.inf, 1, 1])
    assert spoiled["w"] is params["w"]


def test_a_bit_that_shall_flip_in_one_copy_needs_copies():
    with pytest.raises(UserError, match=r"needs a parameter that several devices have a copy of, .*; try --mesh data=2"):
        Faults(parse_faults("bitflip_param@step=2")).before_step(2, 2, {"w": jax.device_put(jnp.ones(3), jax.devices()[0])})


def test_every_kind_is_told_and_those_in_the_step_are_known():
    assert set(IN_STEP) < set(KINDS)
    assert all(words for words, _ in KINDS.values())


def test_a_fault_of_a_process_that_there_is_not_is_refused():
    faults = Faults(parse_faults("nan_grad@step=2; crash@step=3,rank=1"))
    faults.require_ranks(2)
    with pytest.raises(UserError, match=r"takes ranks from 0 to 0 in this run, given crash@step=3,rank=1"):
        faults.require_ranks(1)
