"""The process that validates expectations: started early; one line of JSON per request and per answer.

In a thread of the run its import would block everything else for seconds. Secrets go through the pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from runbook import shell
from runbook.errors import OpsError

CHECKOUT = Path(__file__).parents[2]
NICE = 10
"""Of a routine check: the application has priority. A recovery waits for the expectations, and runs nothing niced."""
ATTEMPTS = 2
RETRY = "run this again"


class _Process:
    """One child process, started on first use, and again after it has ended (with the thread that started it)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._nice = 0

    def start(self, nice: int) -> None:
        """One that runs with a lower priority is replaced; one with a higher priority goes on."""
        with self._lock:
            if not self._runs() or nice < self._nice:
                self.stop()
                self._nice = nice
            self._running()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            for _ in range(ATTEMPTS):
                if answer := self._exchange(self._running(), line):
                    return dict(json.loads(answer))
            raise OpsError(f"the expectations could not be judged: {self._last_error()}", RETRY)

    def stop(self) -> None:
        self._stack.close()
        self._child = None

    def _exchange(self, child: subprocess.Popen[bytes], line: bytes) -> bytes:
        """Its answer; empty if it ended instead."""
        assert child.stdin
        assert child.stdout
        with contextlib.suppress(OSError):
            child.stdin.write(line)
            child.stdin.flush()
            if answer := child.stdout.readline():
                return answer
        child.wait()
        return b""

    def _runs(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or not self._runs():
            self.stop()
            self._child, self._errors = self._stack.enter_context(_program(self._nice))
        return self._child

    def _last_error(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "the process ended without an error message"


@contextlib.contextmanager
def _program(nice: int = 0) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    argv = [sys.executable, "-W", "ignore", "-m", "tasks.gx.program"]
    quiet = {"GX_ANALYTICS_ENABLED": "false"}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        shell.spawn(
            argv, environment=quiet, directory=CHECKOUT, nice=nice, stdin=pipe, stdout=pipe, stderr=errors
        ) as child,
    ):
        yield child, errors


_process = _Process()
atexit.register(_process.stop)


def start(*, routine: bool = False) -> None:
    """Start importing Great Expectations in the background; with low priority for a routine check."""
    _process.start(NICE if routine else 0)


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Let `tasks.gx.program` validate; its docstring describes request and answer.

    Raises:
        OpsError: the expectations could not be judged at all, which is never a pass.
    """
    answer = _process.ask(request)
    if "error" in answer:
        raise OpsError(f"the expectations could not be judged: {answer['error']}", RETRY)
    return answer
