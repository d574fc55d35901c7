"""What `nanojax plan --topology` prints of a step, and what it refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nanojax.analysis import scale_report
from nanojax.analysis.plan_command import main
from nanojax.analysis.scale import closed_form
from nanojax.analysis.scale_report import compile_for, stderr_kept
from nanojax.config import ModelConfig
from nanojax.errors import UserError
from nanojax.sizes import resolve

sys.path.append(str(Path(__file__).parent))

from test_scale import STEP, step_of

TARGET = ["--target", "h200", "--topology"]


@pytest.fixture
def compiled(monkeypatch):
    """Lets the command find a step instead of compiling one; called with it."""

    def put(step):
        monkeypatch.setattr(scale_report, "compile_for", lambda config, devices, per_host: step)
        monkeypatch.setattr(scale_report, "target_devices", lambda name, topology: [type("Gpu", (), {"device_kind": "NVIDIA H200"})] * 16)

    return put


def test_the_report_says_memory_bytes_and_a_prediction(compiled, capsys):
    compiled(step_of(STEP.replace("bf16[16,16]", "bf16[1024,1024]"), memory=2**30))
    main(["--depth", "2", "--batch-tokens", "65536", *TARGET, "2x1x8"])
    said = capsys.readouterr().out
    for words in (
        "compiled for 16 x NVIDIA H200 141GB HBM3e, which are not here",
        "topology 2x1x8: 2 hosts of 8; --mesh fsdp=4 (data across hosts, fsdp within one; --mesh NAME=SIZE,... chooses another)",
        "65,536 tokens a step, 4,096 on each GPU, in microbatches: 1",
        "memory of a GPU: 1.00 GiB state and batch",
        "| all-gather | 1 | 1 | 4 | 1 | 1.6 MB | 0.0 MB | computes | jit(step)/jvp(block_0)/ffn/dot |",
        "100% of gathers' and scatters' bytes while something is computed",
        "prediction, not a measurement: ",
        "assumed: NVLink 370 GB/s, network 45 GB/s for each GPU",
        "wrong: a device sends",
    ):
        assert words in said, said


def test_a_sound_step_is_said_to_be_one(compiled, capsys):
    compiled(step_of(STEP))
    main(["--depth", "2", *TARGET, "2x1x8"])
    assert capsys.readouterr().out.endswith("nothing is wrong with it\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--topology", "64x1x8"], "--topology 64x1x8 is of GPUs that are not there; add --target h200"),
        ([*TARGET, "64x8"], "--topology takes slices x hosts x devices of a host, of 16384 devices at most, given '64x8'; try 64x1x8"),
        ([*TARGET, "0x1x8"], "given '0x1x8'"),
        ([*TARGET, "9999x9x99"], "given '9999x9x99'"),
        ([*TARGET, "2x1x8", "--devices", "8"], "--topology 2x1x8 says how many of which memory; drop --devices and --memory"),
        ([*TARGET, "2x1x8", "--memory", "80GiB"], "drop --devices and --memory"),
    ],
)
def test_a_topology_that_is_none_is_refused_with_a_remedy(argv, words):
    with pytest.raises(UserError) as refused:
        main(argv)
    assert words in str(refused.value)


def test_a_batch_that_the_devices_cannot_share_is_refused_with_the_nearest_that_they_can(mesh):
    from nanojax.config import Config, TrainConfig

    device = mesh.devices.flat[0]
    config = resolve(Config(model=ModelConfig(depth=1), train=TrainConfig(batch_tokens=3 * 2048, mesh="")), 256)
    with pytest.raises(UserError, match=r"a step has 3 rows .* which 2 devices .* try --batch-tokens 8192"):
        compile_for(config, [device, device], 2)


def test_what_a_process_writes_to_stderr_is_kept_and_passed_on(capfd):
    with stderr_kept() as said:
        os.write(2, b"from C++\n")
    assert said == ["from C++\n"]
    assert "from C++" in capfd.readouterr().err
    with pytest.raises(ValueError, match="inside"), stderr_kept() as said:
        raise ValueError("inside")
    os.write(2, b"later\n")
    assert said == [""]
    assert capfd.readouterr().err == "later\n"


def test_the_formula_of_the_report_is_that_of_the_scale(compiled, capsys):
    step = step_of(STEP)
    compiled(step)
    main(["--depth", "2", *TARGET, "2x1x8"])
    formula = closed_form(step.model, step.mesh, 1, 2)
    assert formula is not None
    assert f"  weights gathered: {formula['weights gathered'] / 1e6:,.1f} MB" in capsys.readouterr().out
