"""The launcher, over processes that only pretend to train: what it starts, watches, ends, starts again, and gives up on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanojax import launch
from nanojax.errors import NanoJaxError, StorageError, UserError
from nanojax.launch import Job, LaunchCommand, split
from nanojax.lock import Lock
from nanojax.manifest import NAME
from nanojax.ranks import Ranks
from nanojax.runs import RunFolder

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # pytest's process has jax's threads, the launcher's has none
# A rank: `story(rank, life, step)` runs after each of its steps.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
from nanojax.progress import Progress, show_stacks_on_request
folder, rank = Path(sys.argv[1]), int(os.environ["JAX_PROCESS_ID"])
show_stacks_on_request()
lives = folder / f"lives-{rank}"
life = int(lives.read_text()) + 1 if lives.exists() else 0
lives.write_text(str(life))
(folder / f"env-{rank}-{life}").write_text(json.dumps({k: v for k, v in os.environ.items() if k.startswith("JAX_")}))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
progress = Progress(folder / "progress" / str(rank))
def story(rank, life, step):
    STORY
for step in range(1, 6):
    progress.note(step)
    time.sleep(0.05)
    story(rank, life, step)
print("done", *sys.argv[2:])
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(story, procs=2, **flags): a Job whose ranks do what the story says after each step."""
    monkeypatch.setattr(launch, "STACKS_S", 0.5)
    monkeypatch.setattr(launch, "LEAVE_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def make(story: str, procs: int = 2, **flags) -> Job:
        (tmp_path / "rank.py").write_text(RANK.replace("STORY", story))
        command = LaunchCommand(**(dict(procs=procs, pause_seconds=0.1, stall_seconds=2.0) | flags))
        made = Job(command, [], RunFolder(tmp_path))
        real = made._argv
        monkeypatch.setattr(made, "_argv", lambda: [sys.executable, str(tmp_path / "rank.py"), str(tmp_path), *real()[3:]])
        return made

    return make


SHOWN = "(folder / f'at-{step}-{rank}').touch()"


def at(job: Job, step: int) -> list[bool]:
    """Of both ranks, whether a story that begins with SHOWN has come to that step."""
    return [(job.folder.path / f"at-{step}-{rank}").exists() for rank in range(2)]


def terminate_when(ready) -> None:
    """SIGTERM to this process, which supervises, as soon as that is so."""
    threading.Thread(target=lambda: (wait_until(ready), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()


def lives(job: Job, rank: int = 0) -> int:
    return int((job.folder.path / f"lives-{rank}").read_text()) + 1


def test_all_ranks_run_to_their_end_and_only_the_first_is_shown(job, capfd):
    made = job("pass")
    assert made.supervise() == 0
    assert capfd.readouterr().out == "done --coordinator-timeout=300.0\n"
    assert (made.logs / "rank-1.log").read_text() == "done --coordinator-timeout=300.0\n"
    first, second = (json.loads((made.folder.path / f"env-{rank}-0").read_text()) for rank in range(2))
    assert (first["JAX_NUM_PROCESSES"], first["JAX_PROCESS_ID"], first["JAX_LOCAL_DEVICE_IDS"]) == ("2", "0", "0")
    assert (second["JAX_NUM_PROCESSES"], second["JAX_PROCESS_ID"], second["JAX_LOCAL_DEVICE_IDS"]) == ("2", "1", "1")
    assert first["JAX_COORDINATOR_ADDRESS"] == second["JAX_COORDINATOR_ADDRESS"]
    assert first["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")


@pytest.mark.parametrize("code", [2, 3, 75])
def test_an_end_that_another_start_would_not_change_is_passed_on(job, code, capfd):
    made = job(f"if step == 2 and rank == 1: print('no such file'); sys.exit({code})")
    assert made.supervise() == code
    assert lives(made) == 1
    assert f"rank 1 ended first, with {code}: no such file" in capfd.readouterr().err


def test_a_rank_that_dies_takes_the_others_along_and_all_start_again_after_what_was_saved(job, capfd):
    saved = f"p = folder / 'checkpoints' / '3'; p.mkdir(parents=True, exist_ok=True); (p / {NAME!r}).write_text('')"
    made = job(
        f"{saved}\n    if step == 3 and rank == 1 and life == 0: os.kill(os.getpid(), 9)\n    if life == 0 and step > 3: time.sleep(60)"
    )
    began = time.monotonic()
    assert made.supervise() == 0
    assert time.monotonic() - began < 30
    out, err = capfd.readouterr()
    assert out == "done --resume --coordinator-timeout=300.0\n"
    assert "rank 1 ended with 137, and rank 0 is killed" in err
    assert "ended with 137 after step" in err


def test_a_run_that_never_makes_a_new_step_is_given_up(job, capfd):
    made = job("if step == 2: sys.exit(1)")
    with pytest.raises(NanoJaxError, match="3 starts in a row made no step after 2, the last ended with 1") as error:
        made.supervise()
    assert error.value.exit_code == 1
    assert lives(made) == 4, "the first made steps 1 and 2; three more made none that was new"
    assert [line.partition("again in ")[2] for line in capfd.readouterr().err.splitlines() if "again" in line] == [
        "0.1 s",
        "0.1 s",
        "0.2 s",
    ]


@pytest.mark.slow
def test_a_full_disk_is_given_up_by_its_own_code(job):
    with pytest.raises(StorageError):
        job("sys.exit(4)").supervise()


@pytest.mark.slow
def test_new_steps_are_patience(job):
    made = job("if step == life + 1 and life < 4: sys.exit(1)")
    assert made.supervise() == 0
    assert lives(made) == 5


@pytest.mark.parametrize("how", ["time.sleep(600)", pytest.param("os.kill(os.getpid(), signal.SIGSTOP)", marks=pytest.mark.slow)])
def test_a_stuck_run_shows_its_stacks_is_killed_and_starts_again(job, how, capfd):
    made = job(f"if step >= 2 and life == 0: {how}")
    began = time.monotonic()
    assert made.supervise() == 0
    assert time.monotonic() - began < 30
    assert lives(made) == 2
    assert "stuck: no sign of life for 2 s, at step 2" in capfd.readouterr().err
    for rank in range(2):
        assert "in story" in (made.logs / f"rank-{rank}.log").read_text()


@pytest.mark.slow
def test_what_is_slow_by_its_nature_is_not_stuck(job):
    made = job("progress.note(slow=True)\n    if step == 2: time.sleep(3.5)", procs=1)
    assert made.supervise() == 0
    assert lives(made) == 1
    with pytest.raises(NanoJaxError, match="the last ended with 137"):
        job("progress.note(slow=True); time.sleep(60)", procs=1, slow_seconds=1.0).supervise()


def test_a_signal_is_passed_on_and_nothing_is_started_again(job):
    made = job(f"{SHOWN}\n    if step == 5: time.sleep(60)")
    terminate_when(lambda: all(at(made, 5)))
    assert made.supervise() == 75
    assert lives(made, 0) == lives(made, 1) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_does_not_end_after_a_signal_shows_its_stacks_and_is_killed(job, capfd):
    """Though it compiles, say, for which there is all the time in the world."""
    ignored = f"progress.note(slow=True); signal.signal(signal.SIGTERM, signal.SIG_IGN); {SHOWN}\n    if step == 2: time.sleep(60)"
    made = job(ignored, leave_seconds=1.0)
    terminate_when(lambda: all(at(made, 2)))
    began = time.monotonic()
    assert made.supervise() == 137
    assert time.monotonic() - began < 20
    assert lives(made) == 1
    assert "stuck: no end 1 s after a signal, at step 2" in capfd.readouterr().err
    for rank in range(2):
        assert "in story" in (made.logs / f"rank-{rank}.log").read_text()


SAVES_ONCE = """def save(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a run does
        time.sleep(1)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (folder / f'at-{rank}').touch()
    if step == 5: time.sleep(60)"""


@pytest.mark.parametrize("signalled", [False, True])
def test_a_launcher_that_fails_has_its_ranks_save_and_end_before_it_does(job, monkeypatch, signalled):
    made = job(SAVES_ONCE)
    look = made._look

    def failing():
        look()
        if all((made.folder.path / f"at-{rank}").exists() for rank in range(2)):
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(made, "_look", failing)
    with pytest.raises(OSError, match="Input/output error"):
        made.supervise()
    assert [process.code for process in made.processes] == [75, 75]


def test_a_run_goes_on_without_its_logs(job, monkeypatch):
    made = job("if rank == 1 and step == 5: sys.exit(75)")
    look = made._look

    def looking():
        shutil.rmtree(made.logs, ignore_errors=True)
        look()

    monkeypatch.setattr(made, "_look", looking)
    assert made.supervise() == 75
    assert made.step == 5


@pytest.mark.slow
def test_the_second_signal_kills(job):
    made = job("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    if step == 5: time.sleep(60)", stall_seconds=60.0)
    for seconds in (2.0, 3.0):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    assert made.supervise() == 137
    assert time.monotonic() - began < 20, "neither stuck nor slow to leave: killed"
    assert lives(made) == 1


@pytest.mark.slow
def test_ranks_end_when_the_launcher_is_killed(tmp_path):
    (tmp_path / "rank.py").write_text(RANK.replace("STORY", "time.sleep(1)"))
    program = (
        "import sys; from pathlib import Path; from nanojax.launch import *\n"
        "job = Job(LaunchCommand(procs=1), [], RunFolder(Path(sys.argv[1])))\n"
        "job._argv = lambda: [sys.executable, sys.argv[1] + '/rank.py', sys.argv[1]]\njob.supervise()"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    progress = tmp_path / "progress" / "0"
    wait_until(lambda: progress.exists() and b" runs" in progress.read_bytes())
    launcher.kill()
    launcher.wait()
    before = progress.read_bytes()
    time.sleep(2.5)
    assert progress.read_bytes()[:1] <= bytes([before[0] + 1]), "at most one more step"


def wait_until(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_second_launcher_leaves_the_run_of_the_first_alone(job):
    made = job("pass")
    with Lock(made.folder.path, ".launch-0"), pytest.raises(UserError, match="one run at a time"):
        made.supervise()
    assert not made.logs.exists()


def test_hosts_are_counted_through(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "find", lambda ranks: Ranks(coordinator="head:1", num_processes=3, process_id=2))
    started = []

    class Child:
        pid = 1

        def __init__(self, argv, env, **_):
            started.append({name: env.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")})

    monkeypatch.setattr(subprocess, "Popen", Child)
    Job(LaunchCommand(procs=2), [], RunFolder(tmp_path))._start()
    assert [tuple(each.values()) for each in started] == [("6", "4", "head:1"), ("6", "5", "head:1")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (dict(procs=1), [None]),  # one process for all GPUs
        (dict(procs=2), ["0", "1"]),
        (dict(procs=2, devices_per_proc=4), ["0,1,2,3", "4,5,6,7"]),
    ],
)
def test_every_process_has_its_own_gpus(flags, expected, tmp_path):
    job = Job(LaunchCommand(**flags), [], RunFolder(tmp_path))
    assert [job._devices(local) for local in range(flags["procs"])] == expected


def test_as_many_processes_as_gpus_are_started(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert Job(LaunchCommand(), [], RunFolder(tmp_path)).procs == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="give --procs"):
        Job(LaunchCommand(), [], RunFolder(tmp_path))


def test_the_launchers_flags_end_where_the_command_begins():
    assert split(["--procs", "2", "--", "train", "a.py", "--steps", "3"]) == (["--procs", "2"], ["a.py", "--steps", "3"])
    assert split(["--procs", "2", "train", "a.py", "--", "x"]) == (["--procs", "2"], ["a.py", "--", "x"])
    assert split(["--help"]) == (["--help"], [])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "runs nanojax train, given nothing"),
        (["--", "eval", "runs/x"], "given eval"),
        (["--procs", "2", "configs/tiny.py"], "given nothing"),
        (["--procs", "0", "--", "train", "configs/tiny.py"], "procs=0 must be above 0"),
        (["--proc", "2", "--", "train"], "unknown option --proc; did you mean --procs?"),
        (["--procs", "2", "--", "train", "--stepz", "3"], "unknown option --stepz"),
        (["--procs", "2", "--", "train", "--num-processes", "2"], "before the --"),
        (["--procs", "2", "--stall-seconds", "0", "--", "train"], "stall_seconds=0"),
        (["--procs", "2", "--local-devices", "1,0", "--", "train"], "deals out the GPUs of a host, given --local-devices 1,0; set CUDA_"),
        (["--procs", "2", "--num-processes", "2", "--", "train"], "2 processes need --coordinator"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_starts(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    with pytest.raises(UserError, match=said):
        launch.main(argv)
    assert not (tmp_path / "runs").exists()
