"""The failures a user can cause or must act on, each with its exit code, and the wrapper that turns them into one line."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class NanoJaxError(Exception):
    """Base of every failure that is not our bug: it states the rule, what was given and the remedy.

    `abrupt`: a thread is still at work that cannot be ended, and the process has to end with it.
    """

    exit_code = 1

    def __init__(self, words: str, *, abrupt: bool = False):
        super().__init__(words)
        self.abrupt = abrupt


class UserError(NanoJaxError, ValueError):
    """A wrong flag, config, file or folder."""

    exit_code = 2


class NonFiniteError(NanoJaxError):
    """NaN, infinity or spikes, of training that cannot go on, or of a model that says nothing."""

    exit_code = 3


class StorageError(NanoJaxError, OSError):
    """A disk is full, read-only or gone."""

    exit_code = 4


class DriftError(NanoJaxError):
    """Copies of one state on several devices are no longer equal: a device, its memory or a wire is at fault."""

    exit_code = 5


class Interrupted(NanoJaxError):
    """The run stopped early on request, its state saved if there was any; start it again."""

    exit_code = 75


class _Unread(io.FileIO):
    """A stream whose reader may go: what is written after that is dropped."""

    def __init__(self, handle: int):
        super().__init__(handle, "w", closefd=False)
        self._terminal = self.isatty()  # one that hung up says no

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            gone = isinstance(error, (BrokenPipeError, ConnectionResetError))
            if not gone and not (self._terminal and error.errno == errno.EIO):
                raise
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            return len(data)


def outlive_readers() -> None:
    """From here on the process is not ended because what showed its output is gone, as a `tee`: for what must run on for days."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # another one is a test's or a notebook's
            stream.flush()
            raw = io.BufferedWriter(_Unread(stream.fileno()))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)` and exit with the code that the README's table gives; `--debug` in argv keeps the traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    code = 0
    try:
        main(args)
        sys.stdout.flush()  # here, where a reader that is gone is no traceback
    except NanoJaxError as error:
        if debug:
            raise
        label = "interrupted" if isinstance(error, Interrupted) else "error"
        print(f"nanojax: {label}: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
        if error.abrupt:
            sys.stdout.flush()
            os._exit(code)
    except BrokenPipeError:  # `nanojax sample ... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if debug or error.errno is None:  # a library that cannot be loaded, for one, is no matter of storage
            raise
        in_a_line = of_storage(error)
        print(f"nanojax: error: {in_a_line}", file=sys.stderr)
        code = in_a_line.exit_code
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if debug or not platforms or not of_backends(error):
            raise
        why = f" ({str(error).splitlines()[0].partition(' (set ')[0]:.160})" if str(error) else ""
        words = f"JAX_PLATFORMS must name devices that this machine has, given {platforms!r:.40}{why}; unset it, or set it to cpu"
        print(f"nanojax: error: {words}", file=sys.stderr)
        code = UserError.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("nanojax: interrupted: nothing was saved", file=sys.stderr)
        code = 130
    sys.exit(code)


def of_storage(error: OSError) -> UserError | StorageError:
    """An OSError as one of ours: a path that is not there is the user's, the rest the disk's."""
    kind = UserError if error.errno in (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR) else StorageError
    return kind(f"{error.strerror or error}: {culprit(error)}")


def culprit(error: OSError) -> str:
    """What an OSError is about, and the remedy. It names a path that cannot be opened, but no file or stream that cannot be written."""
    if error.filename is not None:
        return f"{error.filename!s:.80}; give another path, or mend this one"
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder, which is gone; change to one that is there"
    try:
        print(flush=True)  # ends a line that broke off, where standard output is not what failed
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it holds back would fail again as Python exits
        return "standard output; send it elsewhere, or free space there"
    return "a file that was open; free space there"


def of_backends(error: BaseException) -> bool:
    """Whether jax raised it while it looked for devices; it asserts where CUDA is asked for and there is no GPU."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    frame = trace and trace.tb_frame
    return frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("jax._src.xla_bridge", "backends")
