"""Failures: one line and the exit code that the README's table gives, and --debug for the whole story."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanojax.errors import DriftError, Interrupted, NanoJaxError, NonFiniteError, StorageError, UserError, run_main

ROOT = Path(__file__).parents[1]


def raising(error: BaseException):
    def main(argv) -> None:
        raise error

    return main


def outcome(main, argv=()) -> int:
    with pytest.raises(SystemExit) as stop:
        run_main(main, argv)
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code", "label"),
    [
        (UserError("bad flag"), 2, "error"),
        (NonFiniteError("loss is nan"), 3, "error"),
        (StorageError("disk is full"), 4, "error"),
        (DriftError("copies differ"), 5, "error"),
        (NanoJaxError("something else"), 1, "error"),
        (Interrupted("stopped at step 3"), 75, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_failure_has_its_exit_code_and_one_line(error, code, label, capsys):
    assert outcome(raising(error)) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"nanojax: {label}: {error}\n")


def test_success_exits_with_zero_and_says_nothing(capsys):
    seen = []
    assert outcome(seen.append, ["--depth", "3"]) == 0
    assert seen == [["--depth", "3"]]
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_exits_with_130_and_one_line(capsys):
    assert outcome(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "nanojax: interrupted: nothing was saved\n"


@pytest.mark.parametrize("error", [UserError("x"), KeyboardInterrupt()])
def test_debug_lets_the_error_through(error):
    with pytest.raises(type(error)):
        run_main(raising(error), ["--debug"])


def test_our_own_bugs_are_never_dressed_up():
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()), [])


def test_user_errors_are_value_errors_and_storage_errors_os_errors():
    assert issubclass(UserError, ValueError)
    assert issubclass(StorageError, OSError)
    assert not issubclass(UserError, OSError)


def call(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nanojax", *argv], capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_wrong_flag_ends_the_real_command_with_two_and_one_line():
    run = call("train", "--seqlen", "3")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "nanojax: error: unknown option --seqlen; did you mean --seq-len?\n"


def test_debug_brings_the_traceback_back():
    run = call("train", "--head-dim", "33", "--debug")
    assert run.returncode != 0
    assert run.stderr.startswith("Traceback (most recent call last)")
    assert "head_dim=33 must be even" in run.stderr.splitlines()[-1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("writes", ["print('x', flush=True)", "print('x')"], ids=["at-once", "buffered"])
def test_a_full_standard_output_is_named(writes):
    program = f"from nanojax.errors import run_main\ndef main(argv):\n    {writes}\nrun_main(main, [])"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=env
        )
    assert run.stderr == "nanojax: error: No space left on device: standard output; send it elsewhere, or free space there\n"
    assert run.returncode == 4


def test_a_library_that_does_not_load_is_not_taken_for_a_full_disk():
    with pytest.raises(OSError, match="undefined symbol"):
        outcome(raising(OSError("libcudnn.so: undefined symbol")))


def test_a_disk_that_is_full_is_not_taken_for_standard_output(capsys):
    assert outcome(raising(OSError(28, "No space left on device"))) == 4
    assert capsys.readouterr().err == "nanojax: error: No space left on device: a file that was open; free space there\n"


def test_devices_that_the_environment_names_in_vain_are_refused_in_a_line():
    """jax raises on a name that it does not know, and asserts where CUDA is asked for and there is no GPU."""
    program = """
import os
import jax
from jax._src import hardware_utils
from nanojax.errors import run_main
hardware_utils.has_visible_nvidia_gpu = lambda: False
for name in ("foo", "cuda"):
    os.environ["JAX_PLATFORMS"] = name
    jax.config.update("jax_platforms", name)
    try:
        run_main(lambda _: print(jax.devices()), [])
    except SystemExit as stop:
        print(stop.code)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.stdout.split() == ["2", "2"], run.stderr
    first, second = run.stderr.splitlines()
    assert first.startswith("nanojax: error: JAX_PLATFORMS must name devices that this machine has, given 'foo' (Unable to initialize")
    assert second.endswith("given 'cuda'; unset it, or set it to cpu")


@pytest.mark.parametrize("writes", ["print('x', flush=True)", "print('x')"], ids=["at-once", "buffered"])
def test_a_reader_that_has_enough_is_no_failure(writes):
    program = f"from nanojax.errors import run_main\ndef main(argv):\n    {writes}\nrun_main(main, [])"
    reader, writer = os.pipe()
    os.close(reader)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=env)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_current_folder_that_is_gone_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert outcome(lambda _: os.getcwd()) == 2
    assert "the current folder, which is gone; change to one that is there" in capsys.readouterr().err


@pytest.mark.parametrize("through", [os.pipe, os.openpty])
def test_what_must_run_on_outlives_whoever_read_its_output(through, tmp_path):
    """Both streams, before the reader goes and after; what the process does besides is done."""
    program = f"""
import signal, sys
from nanojax.errors import outlive_readers, run_main
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
def main(argv):
    outlive_readers()
    print("first", flush=True)
    print("second", file=sys.stderr)
    input()
    for _ in range(9):
        print("x" * 10000)
        print("y" * 10000, file=sys.stderr)
    open({str(tmp_path / "done")!r}, "w").close()
run_main(main, [])
"""
    reader, writer = through()
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=writer, stderr=writer, cwd=ROOT) as run:
        os.close(writer)
        said = b""
        while b"second" not in said:
            said += os.read(reader, 100)
        os.close(reader)
        run.stdin.write(b"\n")
        run.stdin.close()
        assert run.wait(60) == 0
    assert b"first" in said
    assert (tmp_path / "done").exists()
