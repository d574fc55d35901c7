"""What a run tells about itself, against figures worked by hand."""

from __future__ import annotations

import json
import math
import types

import jax
import jax.numpy as jnp
import pytest

from nanojax import loop, telemetry, tokenizer
from nanojax.checks import parse_window
from nanojax.config import Config, ModelConfig, TrainConfig
from nanojax.errors import NonFiniteError, StorageError, UserError
from nanojax.loop import due
from nanojax.meter import WARMUP_STEPS, Meter
from nanojax.telemetry import JsonLines, ProfileWindow, ProgressLine, draw_loss, duration, header, peak_flops


def device(kind: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 0 s"),
        (90, "1 min 30 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_a_duration_reads_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_a_profile_window_is_two_steps_in_order():
    assert parse_window("20:23") == (20, 23)
    assert parse_window("1:1") == (1, 1)
    for wrong in ("0:3", "5:2", "5", "a:b", "1:2:3", "-1:3", "", ":", "1.5:2"):
        with pytest.raises(UserError, match=r"try --profile 20:23"):
            parse_window(wrong)


def test_a_run_without_a_window_traces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry.jax.profiler, "start_trace", lambda *_: pytest.fail("a trace was started"))
    window = ProfileWindow(None, tmp_path)
    for step in range(1, 5):
        window.before(step, None)
        window.after(step, None)
    window.close()


def test_a_window_traces_its_steps_and_ends_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(telemetry.jax.profiler, "start_trace", lambda folder: calls.append(("start", step)))
    monkeypatch.setattr(telemetry.jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    window = ProfileWindow("2:3", tmp_path)
    for step in range(1, 6):
        window.before(step, None)
        window.after(step, None)
    window.close()
    assert calls == [("start", 2), ("stop", 3)]


def test_a_window_begins_when_the_step_before_it_has_ended(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(telemetry.jax.profiler, "start_trace", lambda _: made.append(state.is_ready()))
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 3000, lambda _, x: jnp.tanh(x @ x), x))
    x = jnp.eye(128)
    slow(x).block_until_ready()  # compiled
    state = slow(x)
    ProfileWindow("2:3", tmp_path).before(2, state)
    assert made == [True]


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_are_those_of_the_datasheets(kind, tflops):
    """NVIDIA's datasheets, dense bf16; the ones with sparsity are twice as high."""
    assert peak_flops([device(kind)] * 2, None) == 2 * tflops * 1e12


def test_an_unknown_device_has_no_peak_unless_it_is_given():
    assert peak_flops([device("cpu")], None) is None
    assert peak_flops([device("cpu")] * 4, 1.5) == 6e12


def test_a_continued_record_drops_the_steps_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 3, 4)))
    sink = JsonLines(path, 2)
    sink.write({"step": 3, "loss": 1.5})
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "loss": 1.5}]


def test_a_record_that_cannot_be_continued_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n{}\n")
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        JsonLines(path, 2)


def test_a_line_is_on_disk_before_the_file_is_closed(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    sink.close()


def test_the_header_holds_counts_facts_and_the_expected_time():
    model = ModelConfig(depth=12)  # 135,288,576 parameters: architecture.md
    text = header(Config(model=model, train=TrainConfig(steps=1000, batch_tokens=2**19)), {"devices": "1 x H200"}, 989e12)
    lines = {line[:12].strip(): line[14:] for line in text.splitlines()}
    assert lines["parameters"].startswith("135,288,576 (embedding 25,165,824, head 25,165,824, matrices 84,934,656")
    assert lines["devices"] == "1 x H200"
    assert lines["run"] == "1,000 steps of 524,288 tokens, 524,288,000 in all"
    # 6 * (135,288,576 - 25,165,824) + 12 * 12 * 768 * 2048 = 887,228,928 FLOPs a token.
    assert lines["per token"].startswith("887,228,928 FLOPs")
    # 887,228,928 * 524,288,000 / (989e12 * 0.45) = 1045.2 s
    assert lines["expected"] == "17 min 25 s at 45% MFU"
    for library in ("jax", "flax", "optax", "orbax-checkpoint", "grain"):
        assert library in lines["versions"]
    unknown = header(Config(train=TrainConfig(steps=1, batch_tokens=2048)), {}, None)
    assert "MFU" not in unknown


class Recorder:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to: clock.now += seconds."""
    time = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: time.now)
    return time


@pytest.fixture
def meter():
    def make(**changes):
        values = dict(
            sinks=[Recorder()],
            progress=ProgressLine(100, 0),
            tokens_per_step=1000,
            flops_per_token=6_000_000,
            peak_flops=1e12,
            bytes_per_token=4.0,
            steps=100,
        )
        return Meter(**(values | changes))

    return make


def metrics(loss: float = 2.0, in_a_row: int = 0):
    values = dict(loss=loss, grad_norm=1.0, lr=1.0, skipped=0, spikes=0, in_a_row=in_a_row)
    return {name: jnp.float32(value) for name, value in values.items()}


def test_tokens_per_second_leaves_warm_up_and_pauses_out(meter, clock):
    m = meter()
    for step in range(1, 13):
        clock.now += 30.0 if step <= WARMUP_STEPS + 1 else 0.5  # compiling takes its time; a push reads the step before
        m.push(step, metrics())
        if step == 9:  # a checkpoint and an evaluation
            clock.now += 0.5
            m.pause()
            clock.now += 600.0
    clock.now += 0.5
    m.flush()
    # Timed are steps 4 to 8 and 11, 12: not the three of warm-up, not 9, which the pause reads, nor 10, which began after it.
    assert m.seconds == [0.5] * 7
    assert m.tokens_per_second == 2000.0
    timed = [r["step"] for r in m.sinks[0].records if "seconds" in r]
    assert timed == [4, 5, 6, 7, 8, 11, 12]


def test_mfu_is_tokens_times_flops_over_peak(meter):
    assert meter().mfu(50_000.0) == pytest.approx(0.3)  # 50,000 * 6e6 / 1e12
    assert meter().mfu(None) is None
    assert meter(peak_flops=None).mfu(50_000.0) is None


def test_a_meter_that_timed_nothing_knows_no_speed(meter):
    assert meter().tokens_per_second is None


def test_a_step_is_read_when_the_next_has_started(meter):
    m = meter()
    m.push(1, metrics(loss=3.0))
    assert m.sinks[0].records == []
    m.push(2, metrics(loss=2.5))
    assert [(r["step"], r["tokens"], r["loss"]) for r in m.sinks[0].records] == [(1, 1000, 3.0)]
    m.flush()
    m.flush()  # nothing is held: nothing is written twice
    assert [r["step"] for r in m.sinks[0].records] == [1, 2]
    assert m.loss == 2.5


def test_bits_per_byte_of_the_training_loss(meter):
    m = meter()
    m.push(1, metrics(loss=8 * math.log(2)))  # 8 bits a token of 4 bytes
    m.flush()
    assert m.sinks[0].records[0]["bpb"] == pytest.approx(2.0, rel=1e-6)  # the loss is float32


def test_twenty_one_updates_in_a_row_that_were_left_out_are_too_many(meter):
    m = meter()
    for step in range(1, 22):
        m.push(step, metrics(in_a_row=step - 1))
    m.flush()
    assert m.in_a_row == 20
    m.push(22, metrics(in_a_row=21))
    with pytest.raises(NonFiniteError, match=r"21 updates in a row, up to step 22"):
        m.flush()


def test_time_that_a_process_does_not_wait_for_devices_is_its_own(meter, clock):
    m = meter()
    assert math.isnan(m.busy)
    for step in range(1, 9):
        clock.now += 0.25  # data, Python
        with m.waiting():
            clock.now += 0.5
        m.push(step, metrics())
    assert m.seconds == [0.75] * 4
    assert m.busy == 0.25


def test_a_run_that_goes_back_forgets_the_lines_that_come_again(meter, tmp_path):
    m = meter(sinks=[JsonLines(tmp_path / "metrics.jsonl", 0)])
    for step in range(1, 6):
        m.push(step, metrics(in_a_row=1))
    m.rewind(2)  # the fifth is held
    assert m.in_a_row == 0
    m.push(3, metrics())
    m.flush()
    m.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_cadence_of_zero_is_never_due():
    assert [n for n in range(1, 10) if due(n, 3)] == [3, 6, 9]
    assert not any(due(n, 0) for n in range(10))


def test_the_loss_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"step": 0, "val_bpb": 3.0}, {"step": 1, "loss": 6.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png") == str(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_disk_that_is_full_under_the_metrics_is_a_storage_error_and_said_once(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines._file.close()
    lines._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - closed below
    with pytest.raises(StorageError, match=r"metrics\.jsonl: No space left on device; free space there"):
        lines.write({"step": 1})
    lines.close()  # does not try again what could not be written


def test_a_picture_on_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    metrics, target = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text('{"step": 1, "bpb": 2.0}\n')
    draw_loss(metrics, target)
    before = target.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer.os, "replace", full)
    with pytest.raises(StorageError, match=r"loss\.png: No space left on device \(.* to write, .* free\)"):
        draw_loss(metrics, target)
    assert target.read_bytes() == before
    assert sorted(child.name for child in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_deep_lines_of_metrics_are_refused_in_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("[" * 10**5 + "\n{}\n")
    with pytest.raises(StorageError, match="cannot continue"):
        JsonLines(tmp_path / "metrics.jsonl", 0)
