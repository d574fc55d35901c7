"""What the engines' own tools would check of scripts/, as far as it needs no engine: syntax, fields, and what the batch script does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nanojax import launch
from nanojax.cli import load_preset
from nanojax.errors import Interrupted, NonFiniteError, UserError
from nanojax.launch import Job, LaunchCommand
from nanojax.ranks import Ranks, find
from nanojax.runs import RunFolder

ROOT = Path(__file__).parents[1]
SLURM, JOBSET, SKYPILOT = (ROOT / "scripts" / name for name in ("slurm.sbatch", "k8s-jobset.yaml", "skypilot.yaml"))
GRACE_S = 120  # that engines must leave between SIGTERM and SIGKILL: a save takes 30 s at most


def commands_of(words: list[str]) -> tuple[list[str], list[str]]:
    """(launcher's flags, train's) of a command line; the preset must exist and both must parse."""
    own, run = launch.split(words[words.index("launch") + 1 :])
    launch.parse(LaunchCommand, own, prog="launch", description="")
    launch.read_command([str(ROOT / run[0]), *run[1:]])
    load_preset(ROOT / run[0])
    return own, run


def test_the_batch_script_asks_slurm_for_a_process_a_gpu_a_signal_and_to_be_queued_again():
    text = SLURM.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    which, seconds = options["signal"].split("@")
    assert which == "TERM", "no B:, which would reach the shell alone"
    assert int(seconds) >= GRACE_S
    assert options.keys() >= {"requeue"}
    assert options["open-mode"] == "append"
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0
    if shellcheck := shutil.which("shellcheck"):
        assert subprocess.run([shellcheck, str(SLURM)], check=False).returncode == 0


@pytest.fixture
def batch(tmp_path):
    """batch(srun, **environment): the batch script with an `srun` of our own; (exit code, what srun was given, jobs queued again)."""
    (tmp_path / "bin").mkdir()

    def tool(name: str, body: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    tool("scontrol", f'echo "$@" >> {tmp_path}/queued')
    tool("python", f'exec {sys.executable} "$@"')

    def run(srun: str, *flags: str, term: bool = False, **environment: str) -> tuple[int, str, str]:
        tool("srun", f'echo "$@" > {tmp_path}/given\n{srun}')
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7"} | environment
        child = subprocess.Popen(["bash", str(SLURM), *flags], env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)
        if term:
            until = time.monotonic() + 30
            while not (tmp_path / "given").exists() and time.monotonic() < until:
                time.sleep(0.02)
            child.send_signal(signal.SIGTERM)
        code = child.wait(60)
        read = [(tmp_path / name).read_text().strip() if (tmp_path / name).exists() else "" for name in ("given", "queued")]
        return code, read[0], read[1]

    return run


@pytest.mark.parametrize(
    ("code", "restarts", "queued"), [(0, 0, ""), (2, 0, ""), (3, 0, ""), (75, 50, "requeue 7"), (1, 0, "requeue 7"), (1, 10, "")]
)
def test_the_batch_script_is_queued_again_when_the_run_was_interrupted_or_crashed_but_not_for_ever(batch, code, restarts, queued):
    found = batch(f"exit {code}", "a.py", "--out", "run", SLURM_RESTART_COUNT=str(restarts))
    assert found[0] == code
    assert found[1].endswith("python -m nanojax.train a.py --out run")
    assert "--kill-on-bad-exit" not in found[1]
    assert found[2] == queued


def test_the_batch_script_goes_on_from_a_checkpoint_and_outlives_a_signal_that_is_for_its_tasks(batch, tmp_path):
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    (tmp_path / "run/checkpoints/3/manifest.json").touch()
    code, given, queued = batch("sleep 1; exit 75", "a.py", "--out=run", term=True)
    assert (code, queued) == (75, "requeue 7")
    assert given.endswith("a.py --out=run --resume")
    assert batch("exit 0", "a.py")[0] == 2, "without --out, nothing says where the checkpoints are"


def test_the_jobset_starts_a_process_a_gpu_on_every_host_and_restarts_but_on_what_would_fail_again():
    (made,) = yaml.safe_load_all(JOBSET.read_text())
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = made["spec"]["failurePolicy"]
    for rule in policy["rules"]:  # the pattern and the words of the JobSet API
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] > 0
    (hosts,) = made["spec"]["replicatedJobs"]
    job, pod = hosts["template"]["spec"], hosts["template"]["spec"]["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 0
    (final,) = job["podFailurePolicy"]["rules"]
    assert final["onExitCodes"]["values"] == [UserError.exit_code, NonFiniteError.exit_code]
    assert Interrupted.exit_code not in final["onExitCodes"]["values"]
    assert pod["restartPolicy"] == "Never", "as podFailurePolicy needs"
    assert pod["terminationGracePeriodSeconds"] >= GRACE_S
    (container,) = pod["containers"]
    assert final["onExitCodes"]["containerName"] == container["name"]
    own, run = commands_of([*container["command"], *container["args"]])
    assert "--go-on" in own
    assert container["command"][0] == "python", "no shell: SIGTERM must reach the launcher"
    assert int(own[own.index("--procs") + 1]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert any(volume.get("emptyDir", {}).get("medium") == "Memory" for volume in pod["volumes"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    environment = {each["name"]: each["value"] for each in container["env"]} | {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"}
    name = made["metadata"]["name"]
    assert find(Ranks(), environment) == Ranks(
        coordinator=f"{name}-{hosts['name']}-0-0.{name}:8476", num_processes=job["parallelism"], process_id=1
    )
    assert run[run.index("--mesh") + 1] == f"data={job['parallelism']},fsdp=8"


def test_the_skypilot_task_gives_the_launcher_the_nodes_and_recovers_from_an_interrupted_run(tmp_path, monkeypatch):
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task.keys() <= {"name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [Interrupted.exit_code]
    assert recovery["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    unlock, at, start = task["run"].partition("exec python")
    assert at, "SIGTERM must reach the launcher and not a shell"
    words = (at + start).replace("\\\n", " ").replace('"$SKYPILOT_NUM_GPUS_PER_NODE"', "8").split()
    own, run = commands_of(words)
    assert "--go-on" in own
    assert run[run.index("--mesh") + 1] == f"data={task['num_nodes']},fsdp={task['resources']['accelerators'].split(':')[1]}"
    (mount,) = task["file_mounts"]
    assert run[run.index("--out") + 1].startswith(mount)
    for left in (f'"{run[run.index("--out") + 1]}/.launch-$SKYPILOT_NODE_RANK"', f"{run[run.index('--out') + 1]}/.lock"):
        assert f"rm -f {left};" in unlock, "what a node that is gone has locked"
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    monkeypatch.setattr(launch, "find", lambda ranks: find(ranks, environment))
    job = Job(LaunchCommand(procs=8), run, RunFolder(tmp_path))
    assert job.hosts == Ranks(coordinator="10.0.0.1:8476", num_processes=2, process_id=1)
