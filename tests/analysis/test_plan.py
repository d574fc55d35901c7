"""What `nanojax plan` takes, on steps whose memory is a formula, and on steps compiled here."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from nanojax.analysis import plan
from nanojax.analysis.compiled import Memory
from nanojax.analysis.hlo import Op
from nanojax.analysis.plan import Trial, expected_seconds, micro_batches, require_fit, search
from nanojax.analysis.plan_command import main, parse_bytes
from nanojax.analysis.targets import GPUS, describe
from nanojax.config import Config, ModelConfig, TrainConfig
from nanojax.errors import UserError
from nanojax.program import make_program
from nanojax.sizes import resolve

SIZES = [1, 2, 4, 8, 16, 32]
CONFIG = Config(
    model=ModelConfig(depth=2, d_model=32, head_dim=16, d_ffn=64, seq_len=32, vocab_size=256),
    train=TrainConfig(batch_tokens=256, steps=4, loss_blocks=2),
)


def steps(plain, remat):
    """(what compiles a step of so many bytes, those compiled)."""
    compiled = []

    def run(rows: int, again: bool) -> Trial:
        compiled.append((rows, again))
        return Trial(rows, again, 1, Memory(0, (remat if again else plain)(rows), 0), ())

    return run, compiled


def taken_of(found: Trial | None) -> tuple | None:
    """(rows, rematerialised, peak) of what a search found."""
    return found and (found.micro_batch, found.remat, found.memory.peak)


@pytest.mark.parametrize(
    ("limit", "taken"),
    [
        (10_000, (32, False, 3300)),
        (1700, (16, False, 1700)),
        (299, (1, False, 200)),
        (199, (4, True, 140)),
        (110, (1, True, 110)),
        (104, None),
    ],
)
def test_the_largest_microbatch_without_rematerialisation_is_taken_else_with_it(limit, taken):
    run, _ = steps(lambda rows: 100 + 100 * rows, lambda rows: 100 + 10 * rows if rows < 8 else 1000)
    found = search(run, SIZES, limit, lambda _: None)
    assert taken_of(found) == taken


def test_few_steps_are_compiled_and_each_is_said_once():
    run, compiled = steps(lambda rows: 100 + 10 * rows, lambda rows: 1)
    said = []
    search(run, SIZES, 270, said.append)
    assert sorted(compiled) == [(1, False), (2, False), (16, False)]
    assert [t.micro_batch for t in said] == [1, 2, 16]


def test_memory_that_grows_faster_than_two_rows_foretell_is_found_out():
    run, compiled = steps(lambda rows: 100 + 10 * rows + (200 if rows > 8 else 0), lambda rows: 1)
    found = search(run, SIZES, 300, lambda _: None)
    assert taken_of(found) == (8, False, 180)
    assert (16, False) in compiled


def test_one_row_that_needs_more_than_two_ends_no_search():
    run, _ = steps(lambda rows: 10_000, lambda rows: 900 if rows == 1 else 500 + rows)
    found = search(run, SIZES, 510, lambda _: None)
    assert taken_of(found) == (8, True, 508)


def test_microbatches_divide_the_rows_of_a_device():
    config = resolve(dataclasses.replace(CONFIG, train=TrainConfig(batch_tokens=12 * 32, steps=1)), 256)
    assert micro_batches(config, 1) == [1, 2, 3, 4, 6, 12]
    assert micro_batches(config, 2) == [1, 2, 3, 6]
    assert micro_batches(config, 16) == []


def test_time_by_hand():
    product = Op("a", "dot", "", "jit(f)/jvp(block_0)/ffn/dot_general", 7e11, 1, 2)
    attention = dataclasses.replace(product, scope="jit(f)/jvp(block_0)/attention/attend/sdpa", flops=3.7e11, times=1)
    add = Op("b", "fusion", "", "", 0, int(8.7e9), 4)
    assert expected_seconds((product, attention, add), 1e12, 1e11) == pytest.approx(2 * 1 + 1 + 4 * 0.1)
    ended = dataclasses.replace(product, target="mosaic_gpu_v2", bytes=int(3 * 8.7e10), times=1)
    assert expected_seconds((ended,), 1e12, 1e11) == pytest.approx(3 + 1 / 2)  # its bytes take longer, half of the rest shows


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("24MiB", 24 * 2**20)])
def test_memory_is_read_with_its_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "-1GiB", "0GB", "nanGiB", "80 gib", "1e3GB"])
def test_memory_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--memory takes a number with"):
        main(["--memory", text])


@pytest.fixture(scope="module")
def preset(tmp_path_factory, cache_dir):
    path = tmp_path_factory.mktemp("plan") / "preset.py"
    path.write_text(
        "from nanojax.config import *\n"
        "config = Config(model=ModelConfig(depth=1, d_model=32, head_dim=16, d_ffn=64, seq_len=32, vocab_size=256),"
        f" train=TrainConfig(batch_tokens=256, steps=4, loss_blocks=2), data=DataConfig(cache={str(cache_dir)!r}))\n"
    )
    return str(path)


def test_a_plan_says_what_it_compiled_and_where(preset, capsys):
    main([preset, "--memory", "1GiB"])
    said = capsys.readouterr().out
    assert "compiled on this machine's cpu for 1 x cpu" in said
    assert "| 8 | no | 1 |" in said
    assert "take --micro-batch 8 --no-remat: 256 tokens a step, in microbatches: 1" in said


def test_what_cannot_fit_is_refused_with_a_remedy(preset):
    with pytest.raises(UserError, match=r"one row at a time, with rematerialisation, does not fit into 0.00 GiB a device; try"):
        main([preset, "--memory", "100MB", "--d-model", "128", "--memory=1MB"])
    with pytest.raises(UserError, match="a cpu does not say what jax may allocate"):
        main([preset])
    with pytest.raises(UserError, match="--devices takes 1 to"):
        main([preset, "--devices", "0"])


def test_a_precision_that_devices_have_not_is_refused_before_a_line(preset, capsys):
    with pytest.raises(UserError, match="precision=fp8 is trained on NVIDIA GPUs"):
        main([preset, "--memory", "1GiB", "--precision", "fp8"])
    assert not capsys.readouterr().out


def test_training_refuses_what_cannot_fit_and_says_what_would(monkeypatch):
    program = make_program(
        resolve(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, micro_batch=8)), 256), jax.devices()[:1]
    )
    compiled = program.compile_step()
    need = Memory.of(compiled).peak
    said = []
    monkeypatch.setattr(plan, "allocatable", lambda _: need)
    require_fit(program, compiled, said.append)
    assert not said
    monkeypatch.setattr(plan, "trial", lambda _, __, rows, remat: Trial(rows, remat, 1, Memory(need * rows // 8, 0, 0), ()))
    monkeypatch.setattr(plan, "allocatable", lambda _: need - 1)
    with pytest.raises(UserError, match=r"a step must fit into the .* GiB .* and needs .*; try --micro-batch 4 --no-remat"):
        require_fit(program, compiled, said.append)
    assert len(said) == 1
    monkeypatch.setattr(plan, "allocatable", lambda _: 1000)
    with pytest.raises(UserError, match="not even one row with --remat does"):
        require_fit(program, compiled, said.append)


def test_memory_of_devices_that_say_it():
    class Device:
        def __init__(self, **stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats or None

    assert plan.allocatable([Device()]) is None
    assert plan.allocatable([Device(bytes_limit=10, bytes_in_use=3), Device(bytes_limit=12, bytes_in_use=1)]) == 7


def test_a_target_is_described_with_its_own_facts():
    text = describe(GPUS["h200"])
    assert text.count("{") == text.count("}")
    assert 'name: "NVIDIA H200 141GB HBM3e"' in text
    assert "device_memory_size: 151397597184" in text
    assert "device_memory_size: 151397597184" not in describe(GPUS["h100"])
