"""Programs: the only use of subprocess. Argument lists, no shell; a child has its own pipes and dies with the run."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from runbook.errors import CommandFailed, OpsError

STOP_SECONDS = 10.0
FEED_BYTES = 1 << 20


@dataclass(frozen=True)
class Completed:
    """What a program printed, how long it took, and its exit code (one of those that were accepted)."""

    stdout: str
    stderr: str
    seconds: float
    code: int = 0


def run(
    argv: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    user: str = "",
    nice: int = 0,
    timeout_seconds: float | None = None,
    hint: str = "",
    accepted: Collection[int] = (0,),
) -> Completed:
    """Run a program to its end. `environment` is added to this process's own; secrets go there, never into `argv`.

    `nice` above 0 leaves the processors to whoever else wants them. `accepted` exit codes are answers: a linter that
    found something exits 1.

    Raises:
        CommandFailed: it exited with something else than `accepted` (the last lines of its stderr are in the message).
        OpsError: it is not installed, or did not end within `timeout_seconds`.
    """

    def wait(child: subprocess.Popen[bytes]) -> int:
        try:
            return child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise OpsError(f"{Path(argv[0]).name} did not end within {timeout_seconds:g} s", hint) from None

    with _outputs() as (out, err):
        started = time.monotonic()
        with spawn(
            argv, environment=environment, directory=directory, user=user, nice=nice, stdout=out, stderr=err
        ) as child:
            code = wait(child)
        return _completed(argv, code, out, err, environment or {}, hint, started, accepted)


def feed(
    argv: Sequence[str | Path], source: IO[bytes], *, environment: Mapping[str, str] | None = None, hint: str = ""
) -> Completed:
    """Run a program that reads `source` to its end; see `run`. Where `source` fails to read, the program is ended."""
    with _outputs() as (out, err):
        started = time.monotonic()
        with spawn(argv, environment=environment, stdin=subprocess.PIPE, stdout=out, stderr=err) as child:
            assert child.stdin
            with contextlib.suppress(BrokenPipeError):  # it ended early: its exit code tells
                while chunk := source.read(FEED_BYTES):
                    child.stdin.write(chunk)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            code = child.wait()
        return _completed(argv, code, out, err, environment or {}, hint, started)


@contextlib.contextmanager
def _outputs() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    with in_memory() as out, in_memory() as err:
        yield out, err


def in_memory() -> IO[bytes]:
    """A file for what a program prints that needs no disk: where that is full, it must be heard all the same."""
    return os.fdopen(os.memfd_create("output"), "w+b")


def _completed(
    argv: Sequence[str | Path],
    code: int,
    out: IO[bytes],
    err: IO[bytes],
    environment: Mapping[str, str],
    hint: str,
    started: float,
    accepted: Collection[int] = (0,),
) -> Completed:
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read().decode(errors="replace"))
    if code not in accepted:
        printed, said = (_masked(text, environment) for text in texts)
        raise CommandFailed([str(part) for part in argv], code, said, hint, printed)
    return Completed(texts[0], texts[1], time.monotonic() - started, code)


@contextlib.contextmanager
def spawn(
    argv: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    user: str = "",
    nice: int = 0,
    stdin: object = None,
    stdout: object = None,
    stderr: object = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A running program, ended (TERM, then KILL) when the block is left, however it is left."""
    variables = {**os.environ, **(environment or {})}
    program = str(argv[0])
    found = shutil.which(program if "/" not in program else Path(directory or ".", program), path=variables.get("PATH"))
    if not found:  # else it is setpriv that fails, with a message of its own
        raise OpsError(f"there is no program {program}", "install it, or correct its path in the environment")
    command = [*_prefix(user, nice), *(str(part) for part in argv)]
    try:
        child = subprocess.Popen(
            command,
            env=variables,
            cwd=directory,
            stdin=subprocess.DEVNULL if stdin is None else stdin,  # type: ignore[call-overload]
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
        )
    except FileNotFoundError as error:
        raise OpsError(f"{error.filename} is not there", "create it, or correct its path in the environment") from None
    try:
        yield child
    finally:
        _end(child)


def _masked(text: str, environment: Mapping[str, str]) -> str:
    """What a program prints must not carry the secrets that it was given."""
    for name, value in environment.items():
        if value and re.search("PASS|SECRET|TOKEN|KEY|URL", name.upper()):
            text = text.replace(value, "********")
    return text


def _prefix(user: str, nice: int) -> list[str]:
    """Change the user first, then ask for the death signal: the kernel forgets it when the user changes.

    The signal comes when the starting *thread* ends: whoever starts a child waits for it in the same thread.
    """
    setpriv = shutil.which("setpriv")
    as_user = []
    if user and os.geteuid() == 0:
        if not setpriv:
            raise OpsError("setpriv is not installed", "install util-linux")
        uid, gid = owner_of(user)
        as_user = [setpriv, f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
    lowly = ["nice", "-n", str(nice)] if nice else []
    return [*as_user, setpriv, "--pdeathsig", "TERM", *lowly] if setpriv else [*as_user, *lowly]


def owner_of(user: str) -> tuple[int, int]:
    """The numbers of a user and its group. Whom this host has no name for (a container's user) is `uid` or `uid:gid`.

    Raises:
        OpsError: there is no such user here.
    """
    if found := re.fullmatch(r"(\d+)(?::(\d+))?", user):
        return int(found[1]), int(found[2] or found[1])
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        hint = "correct os_user in the environment; a container's user is its numbers there, uid:gid"
        raise OpsError(f"there is no user {user} on this host", hint) from None
    return entry.pw_uid, entry.pw_gid


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    heirs = _descendants(child.pid)  # the signal is the child's alone, and a launcher may leave what it started behind
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for heir in heirs:
        with contextlib.suppress(psutil.Error):
            heir.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []
