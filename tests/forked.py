"""Python processes of their own for tests, without two seconds of imports each: forked from one that has imported.

What a test launches is a process like any other: its own environment, directory, output and death. It is forked from a
process in which nothing but imports was done; Prefect reads its settings again. It is not for tests of imports, of the
interpreter's start, or of zombies: the ended ones are collected. The process in which their expectations are validated
(tasks/gx) is forked from there too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import os
import pickle
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from prefect.context import refresh_global_settings_context

from tasks.gx import process, program

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    *("flows.recovery.full_restore", "flows.recovery.point_in_time", "flows.recovery.postgres_failover"),
    *("flows.recovery.redis_failover", "flows.recovery.containment", "flows.redis.settings"),
    *("flows.database.settings", "flows.database.tables", "flows.application.files"),
)
_MOST_BYTES = 1 << 20

Command = Sequence[str | os.PathLike[str]]


class Child:
    """A process that was launched, as `subprocess.Popen` has it; its output is in files."""

    def __init__(self, status: socket.socket, output: IO[bytes] | None, errors: IO[bytes] | None) -> None:
        self._status, self._output, self._errors = status, output, errors
        self.pid = int(status.recv(32))
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative where a signal ended it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._status.recv(32))
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, after its end."""
        self.wait(timeout)
        return _text(self._output), "" if self._errors is self._output else _text(self._errors)

    def send_signal(self, number: int) -> None:
        """Where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _text(file: IO[bytes] | None) -> str:
    if file is None:
        return ""
    file.seek(0)
    return file.read().decode(errors="replace")


def launch(
    words: Command, env: Mapping[str, str] | None = None, cwd: Path = ROOT, *, capture: bool = True, merge: bool = False
) -> Child:
    """`python WORDS` (`-c CODE …` or `-m MODULE …`), not waited for; with `capture` its output is kept, with `merge`
    its errors among it."""
    output = tempfile.TemporaryFile() if capture else None  # noqa: SIM115 - the child has it
    errors = tempfile.TemporaryFile() if capture and not merge else output  # noqa: SIM115
    files = [(output or sys.__stdout__).fileno(), (errors or sys.__stderr__).fileno()]  # type: ignore[union-attr]
    with _starting:
        status = _send(_zygote(), words, os.environ if env is None else env, cwd, files)
    return Child(status, output, errors)


def _send(
    zygote: socket.socket, words: Command, env: Mapping[str, str], cwd: Path, files: Sequence[int]
) -> socket.socket:
    """Ask for a process with these files as its output, errors and, where given, input; where its exit code comes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = pickle.dumps(([os.fspath(word) for word in words], dict(env), os.fspath(cwd)))
    assert len(request) < _MOST_BYTES
    with theirs:
        socket.send_fds(zygote, [request], [theirs.fileno(), *files])
    return ours


def run(
    words: Command,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    *,
    timeout: float = 900,
    capture: bool = True,
    merge: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`python WORDS` to its end, like `subprocess.run`: killed and `TimeoutExpired` where that does not come."""
    child = launch(words, env, cwd, capture=capture, merge=merge)
    try:
        output, errors = child.communicate(timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    return subprocess.CompletedProcess([sys.executable, *words], child.wait(), output, errors)


_starting = threading.Lock()
_zygotes: list[socket.socket] = []


def _zygote() -> socket.socket:
    """The process that forks, started with the first request."""
    if not _zygotes:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
        subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        _zygotes.append(ours)
    return _zygotes[0]


def _serve(requests: socket.socket) -> NoReturn:
    """Fork for each request, until whoever asks is gone."""
    for module in IMPORTED:
        importlib.import_module(module)
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    program.import_little(left_out=())  # flows need boto3
    asked, asking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process._program = functools.partial(_validation, asking)  # type: ignore[assignment]
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, f"a fork would lose {threading.enumerate()}"
    woken, wake = socket.socketpair()
    for one in (woken, wake):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    children = dict[int, int]()
    while True:
        ready, _, _ = select.select([requests, asked, woken], [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                woken.recv(4096)
            _collect(children)
        for source in {requests, asked} & set(ready):
            request, files, _, _ = socket.recv_fds(source, _MOST_BYTES, 4)
            if not request:
                sys.exit()
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number in (*(one.fileno() for one in (requests, asked, woken, wake)), *children.values(), files[0]):
                    os.close(number)
                words, environment, cwd = pickle.loads(request)  # noqa: S301 - of the test itself
                _become(words, environment, cwd, files[1:])
            children[pid] = files[0]
            os.write(files[0], b"%d" % pid)
            for file in files[1:]:
                os.close(file)


@contextlib.contextmanager
def _validation(zygote: socket.socket) -> Iterator[tuple[Child, IO[bytes]]]:
    """`tasks.gx.program` for a process that was forked here, in the place of `tasks.gx.process._program`: forked too."""
    (their_input, our_end), (our_start, their_output) = os.pipe(), os.pipe()
    stdin, stdout = os.fdopen(our_end, "wb"), os.fdopen(our_start, "rb")
    with tempfile.TemporaryFile() as errors, stdin, stdout:
        files = [their_output, errors.fileno(), their_input]
        child = Child(_send(zygote, ["-m", "tasks.gx.program"], os.environ, ROOT, files), None, errors)
        for number in (their_input, their_output):
            os.close(number)
        child.stdin, child.stdout = stdin, stdout
        yield child, errors


def _collect(children: dict[int, int]) -> None:
    for pid in list(children):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            status = children.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(status, b"%d" % code)
            os.close(status)


def _become(words: list[str], environment: dict[str, str], cwd: str, files: list[int]) -> NoReturn:
    """This forked process is `python WORDS` from here on."""
    for number, file in zip((1, 2, 0), files, strict=False):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    refresh_global_settings_context()
    random.seed()
    tempfile.tempdir = None
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
    code = _exit_code(words)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_code(words: list[str]) -> int:
    try:
        match words:
            case ["-c", code, *arguments]:
                sys.argv = ["-c", *arguments]
                sys.modules["__main__"] = main = types.ModuleType("__main__")
                exec(compile(code, "<string>", "exec"), main.__dict__)  # noqa: S102
            case ["-m", module, *arguments]:
                sys.argv = [module, *arguments]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case other:
                raise ValueError(other)
    except SystemExit as ended:
        return _of_exit(ended.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _of_exit(code: Any) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
