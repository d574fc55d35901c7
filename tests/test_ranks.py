"""Which process this is, by flags and by what Slurm, Open MPI, Kubernetes and SkyPilot leave in the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanojax.errors import UserError
from nanojax.ranks import Ranks, find

ROOT = Path(__file__).parents[1]
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "node[003-004,007]",
    "SLURM_NTASKS": "32",
    "SLURM_STEP_NUM_TASKS": "24",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
JAX = {"JAX_COORDINATOR_ADDRESS": "head:1234", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "7"}


def found(environ: dict[str, str], **flags) -> tuple[str | None, int | None, int | None, str | None]:
    ranks = find(Ranks(**flags), environ)
    return ranks.coordinator, ranks.num_processes, ranks.process_id, ranks.local_devices


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (None, None, None, None)),
        (JAX, ("head:1234", 8, 7, None)),
        (JAX | {"JAX_LOCAL_DEVICE_IDS": "3,5"}, ("head:1234", 8, 7, "3,5")),
        (SLURM, ("node003:61443", 24, 9, "1")),  # 61440 + 4099 % 4096, as jax has it
        (SLURM | {"SLURM_STEP_NODELIST": "alpha,beta"}, ("alpha:61443", 24, 9, "1")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, ("node003:61443", 24, 9, None)),  # --gpus-per-task=1: the one it sees is number 0
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (None, None, None, None)),  # one task takes all GPUs
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, (None, None, None, None)),  # the shell of a batch script
        (MPI | {"OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911"}, ("10.96.0.1:61442", 4, 3, "1")),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "8192.0;tcp6://[fe80::1,2620::2]:43370"}, ("[fe80::1]:61442", 4, 3, "1")),
        (KUBERNETES, (None, None, None, None)),  # a pod that trains alone
        (KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "gpt-0:8476", "JAX_NUM_PROCESSES": "2"}, ("gpt-0:8476", 2, 1, None)),
        (SKYPILOT, ("10.0.0.5:8476", 2, 1, None)),
        (SKYPILOT | {"SKYPILOT_NODE_IPS": "", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, (None, None, None, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (None, None, None, None)),
        (SLURM | SKYPILOT, ("node003:61443", 24, 9, "1")),
        (SLURM | JAX, ("head:1234", 8, 7, None)),  # what nanojax launch gives its children, in a task of Slurm
    ],
)
def test_each_engine_is_understood_in_the_order_that_is_documented(environ, expected):
    assert found(environ) == expected


def test_a_flag_comes_before_every_variable():
    assert found(SLURM | JAX, process_id=2) == ("head:1234", 8, 2, None)
    assert found(SLURM, coordinator="other:1", local_devices="0") == ("other:1", 24, 9, "0")
    assert found({}, num_processes=1) == (None, None, None, None)


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({}, dict(num_processes=2), "2 processes need --coordinator"),
        (MPI, {}, "4 processes need --coordinator"),  # Open MPI 5
        (SKYPILOT | {"SKYPILOT_NODE_IPS": " "}, {}, "2 processes need --coordinator"),
        ({}, dict(num_processes=2, coordinator="host:1"), "needs its own --process-id"),
        ({}, dict(num_processes=2, coordinator="host:1", process_id=2), "given 2 and --num-processes 2"),
        ({}, dict(process_id=1), "given 1 and no --num-processes"),
        ({}, dict(coordinator="host:1"), "goes with --num-processes"),
        ({}, dict(num_processes=0), "at least 1, given 0"),
        ({}, dict(num_processes=2, process_id=0, coordinator="host"), "takes host:port, given 'host'; try host:8476"),
        ({}, dict(num_processes=2, process_id=0, coordinator="host:70000"), "takes host:port"),
        ({}, dict(num_processes=2, process_id=0, coordinator="http://host:80"), "takes host:port"),
        ({}, dict(local_devices="0,0"), "each once, given '0,0'"),
        ({}, dict(local_devices="gpu0"), "takes numbers of GPUs"),
        ({}, dict(coordinator_timeout=-1.0), "coordinator_timeout=-1.0"),
        (JAX | {"JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID must be a whole number"),
        (SLURM | {"SLURM_PROCID": "-1"}, {}, "SLURM_PROCID must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused_by_name(environ, flags, said):
    with pytest.raises(UserError, match=said):
        find(Ranks(**flags), environ)


def start(*flags: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "nanojax", "train", str(ROOT / "configs/tiny.py"), *flags]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_a_wrong_combination_is_one_line_before_jax_is_imported(tmp_path):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')\n")
    argv = [sys.executable, "-m", "nanojax", "train", str(ROOT / "configs/tiny.py"), "--num-processes", "2"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("nanojax: error: 2 processes need --coordinator")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_coordinator_without_the_others_is_one_line_with_its_address(process, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    began = time.monotonic()
    flags = ["--coordinator", address, "--num-processes", "2", "--process-id", str(process), "--coordinator-timeout", "3"]
    run = start(*flags, "--out", str(tmp_path / "run"))
    _, err = run.communicate(timeout=200)
    assert run.returncode == 1
    assert [line for line in err.splitlines() if line] == [err.strip()]  # one line
    assert f"the coordinator {address} within 3 s" in err
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()
