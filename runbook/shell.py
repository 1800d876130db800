"""Programs: the only use of subprocess. Argument lists, no shell; a child has its own pipes and dies with the run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

import psutil

from runbook.errors import CommandFailed, OpsError
from runbook.masking import secrets_given, without
from runbook.submitted import require_wanted

STOP_SECONDS = 10.0
FEED_BYTES = 1 << 20
LOOK_SECONDS = 0.5
MOST_BYTES = 256 << 20
"""A program that prints more than this is ended: its output is kept in memory, and a part would be no answer."""
MOST_ERROR_BYTES = 4 << 20
HEAD_BYTES = 64 << 10
OOM_SCORE = Path("/proc/self/oom_score_adj")

INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TZDIR", "TMPDIR", "XDG_*"),
    *("LD_LIBRARY_PATH", "LOCPATH", "LOCALE_ARCHIVE", "DBUS_SESSION_BUS_ADDRESS", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    # libpq's files and modes. PGPASSWORD is not among them: blocks pass each server's own.
    *("PGSSL*", "PGREQUIREAUTH", "PGCHANNELBINDING", "PGGSS*", "PGKRBSRVNAME", "KRB5*"),
)
"""The variables of this process that every child gets. None of them is a secret; a child names what else it needs."""
NETWORK = (
    *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "NETRC"),
)
"""For a program that reaches other hosts: proxies (their addresses may hold a password) and trusted authorities."""
SSH = ("SSH_AUTH_SOCK", "SSH_ASKPASS")


@dataclass(frozen=True)
class Completed:
    """What a program printed, how long it took, and its exit code (one of those that were accepted)."""

    stdout: str
    stderr: str
    seconds: float
    code: int = 0


@dataclass(frozen=True)
class Stall:
    """How long a program may make no progress: neither it nor its children use the processor, read or write, and what
    `activity` returns stays the same. `activity` is asked only then, and may fail."""

    seconds: float
    activity: Callable[[], Hashable] = bool


def run(
    argv: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    inherit: Collection[str] = (),
    directory: Path | None = None,
    user: str = "",
    nice: int = 0,
    timeout_seconds: float | None = None,
    stall: Stall | None = None,
    hint: str = "",
    accepted: Collection[int] = (0,),
) -> Completed:
    """Run a program to its end. Of this process's variables it gets `INHERITED` and those that match `inherit` (names,
    or patterns such as `PIP_*`); `environment` is added. Secrets go there, never into `argv`.

    `nice` above 0 leaves the processors to whoever else wants them. `accepted` exit codes are answers: a linter that
    found something exits 1. A long stderr is cut in the middle.

    Raises:
        CommandFailed: it exited with something else than `accepted` (the last lines of its stderr are in the message).
        OpsError: it is not installed, did not end within `timeout_seconds`, made no progress for as long as `stall`
            allows, or printed more than `MOST_BYTES`.
    """
    with _outputs() as printed:
        started = time.monotonic()
        with spawn(
            argv,
            environment=environment,
            inherit=inherit,
            directory=directory,
            user=user,
            nice=nice,
            stdout=printed.out,
            stderr=printed.err,
        ) as child:
            code = _wait(argv, child, printed, timeout_seconds, stall, hint)
        return printed.completed(argv, code, environment or {}, hint, started, accepted)


def feed(
    argv: Sequence[str | Path],
    source: IO[bytes],
    *,
    environment: Mapping[str, str] | None = None,
    stall: Stall | None = None,
    hint: str = "",
) -> Completed:
    """Run a program that reads `source` to its end; see `run`. Where `source` fails to read, the program is ended.

    A thread writes: this one started the program, which dies with it, and watches it.
    """
    failed = list[BaseException]()
    with _outputs() as printed:
        started = time.monotonic()
        with spawn(
            argv, environment=environment, stdin=subprocess.PIPE, stdout=printed.out, stderr=printed.err
        ) as child:
            writer = threading.Thread(target=_write, args=(child, source, failed), daemon=True)
            writer.start()
            code = _wait(argv, child, printed, None, stall, hint)
        writer.join(STOP_SECONDS)
        if failed:
            raise failed[0]
        return printed.completed(argv, code, environment or {}, hint, started)


def drain(
    argv: Sequence[str | Path],
    target: Callable[[bytes], object],
    *,
    environment: Mapping[str, str] | None = None,
    stall: Stall | None = None,
    hint: str = "",
) -> Completed:
    """Run a program and hand its output to `target`, chunk by chunk; see `run`. Where `target` fails, the program is
    ended."""
    failed = list[BaseException]()
    with _outputs() as printed:
        started = time.monotonic()
        with spawn(argv, environment=environment, stdout=subprocess.PIPE, stderr=printed.err) as child:
            reader = threading.Thread(target=_read, args=(child, target, failed), daemon=True)
            reader.start()
            code = _wait(argv, child, printed, None, stall, hint)
            reader.join()
        if failed:
            raise failed[0]
        return printed.completed(argv, code, environment or {}, hint, started)


def _read(child: subprocess.Popen[bytes], target: Callable[[bytes], object], failed: list[BaseException]) -> None:
    assert child.stdout
    try:
        with contextlib.suppress(OSError):  # no more than the limit of this user
            fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, FEED_BYTES)
        while chunk := os.read(child.stdout.fileno(), FEED_BYTES):
            target(chunk)
    except BaseException as error:
        failed.append(error)
        child.kill()


def _write(child: subprocess.Popen[bytes], source: IO[bytes], failed: list[BaseException]) -> None:
    assert child.stdin
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended early: its exit code tells
            while chunk := source.read(FEED_BYTES):
                child.stdin.write(chunk)
    except BaseException as error:
        failed.append(error)
        child.kill()  # before the pipe is closed: half of a script must not look like all of it
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()


def _wait(
    argv: Sequence[str | Path],
    child: subprocess.Popen[bytes],
    printed: _Outputs,
    timeout_seconds: float | None,
    stall: Stall | None,
    hint: str,
) -> int:
    """The exit code. The kernel reports the end at once; meanwhile output and progress are looked at."""
    program, started = Path(argv[0]).name, time.monotonic()
    moved, seen = started, _Effort()
    descriptor = os.pidfd_open(child.pid)
    try:
        while not select.select([descriptor], [], [], _pause(started, timeout_seconds))[0]:
            now = time.monotonic()
            printed.require_bounded(argv, hint)
            require_wanted()
            if timeout_seconds is not None and now - started >= timeout_seconds:
                raise OpsError(f"{program} did not end within {timeout_seconds:g} s", hint)
            if stall and (effort := _effort(child.pid, stall, seen)) != seen:
                moved, seen = now, effort
            elif stall and now - moved >= stall.seconds:
                why = f"{program} made no progress for {stall.seconds:g} s and was ended"
                raise OpsError(why, hint or "check the server's log, its locks and the network to it")
    finally:
        os.close(descriptor)
    return child.wait()


def _pause(started: float, timeout_seconds: float | None) -> float:
    left = LOOK_SECONDS if timeout_seconds is None else started + timeout_seconds - time.monotonic()
    return min(max(left, 0.0), LOOK_SECONDS)


@dataclass(frozen=True)
class _Effort:
    """What a program and its children have used and moved so far."""

    spent: tuple[tuple[int, float, int], ...] = ()
    activity: Hashable = None


def _effort(pid: int, stall: Stall, seen: _Effort) -> _Effort:
    spent = tuple(map(_spent, (*_itself(pid), *_descendants(pid))))
    if spent != seen.spent:
        return _Effort(spent, seen.activity)
    with contextlib.suppress(Exception):  # a server that does not answer makes no progress
        return _Effort(spent, stall.activity())
    return seen


def _itself(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(pid)]
    return []


def _spent(process: psutil.Process) -> tuple[int, float, int]:
    """Its id, the seconds of processor that it used, and the bytes that it read and wrote."""
    seconds, moved = 0.0, 0
    with contextlib.suppress(psutil.Error, OSError):  # it ended, or is another user's
        seconds = sum(process.cpu_times()[:2])
        counted = process.io_counters()
        moved = counted.read_chars + counted.write_chars
    return process.pid, seconds, moved


@dataclass(frozen=True)
class _Outputs:
    """What a program prints."""

    out: IO[bytes]
    err: IO[bytes]
    head: bytearray
    tail: bytearray

    def require_bounded(self, argv: Sequence[str | Path], hint: str) -> None:
        """Raises OpsError where stdout is too long. Of a long stderr only the beginning and the end are kept."""
        if os.fstat(self.out.fileno()).st_blocks * 512 > MOST_BYTES:
            raise OpsError(f"{Path(argv[0]).name} printed more than {MOST_BYTES >> 20} MB and was ended", hint)
        if os.fstat(self.err.fileno()).st_blocks * 512 > MOST_ERROR_BYTES:
            data = _behind_hole(self.err.fileno())
            os.ftruncate(self.err.fileno(), 0)  # the program goes on where it was: what is before that is a hole
            if not self.head:
                self.head.extend(data[:HEAD_BYTES])
            self.tail[:] = data[-HEAD_BYTES:]

    def completed(
        self,
        argv: Sequence[str | Path],
        code: int,
        environment: Mapping[str, str],
        hint: str,
        started: float,
        accepted: Collection[int] = (0,),
    ) -> Completed:
        self.require_bounded(argv, hint)
        self.out.seek(0)
        text = self.out.read().decode(errors="replace")
        said = self._said().decode(errors="replace")
        if code not in accepted:
            printed, said = (without(text, secrets_given(environment)) for text in (text, said))
            raise CommandFailed([str(part) for part in argv], code, said, hint, printed)
        return Completed(text, said, time.monotonic() - started, code)

    def _said(self) -> bytes:
        data = _behind_hole(self.err.fileno())
        return bytes(self.head + "\n…\n".encode() + (self.tail + data)[-HEAD_BYTES:]) if self.head else data


def _behind_hole(descriptor: int) -> bytes:
    try:
        begin = os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError:  # nothing was printed
        return b""
    return os.pread(descriptor, os.fstat(descriptor).st_size - begin, begin).lstrip(b"\0")


@contextlib.contextmanager
def _outputs() -> Iterator[_Outputs]:
    with in_memory() as out, in_memory() as err:
        yield _Outputs(out, err, bytearray(), bytearray())


def in_memory() -> IO[bytes]:
    """A file for what a program prints that needs no disk: where that is full, it must be heard all the same."""
    return os.fdopen(os.memfd_create("output"), "w+b")


def inherited(patterns: Collection[str] = ()) -> dict[str, str]:
    """Of this process's variables, those that a child gets: `INHERITED`, and those that match `patterns`."""
    wanted = (*INHERITED, *patterns)
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, one) for one in wanted)}


@contextlib.contextmanager
def spawn(
    argv: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    inherit: Collection[str] = (),
    directory: Path | None = None,
    user: str = "",
    nice: int = 0,
    stdin: object = None,
    stdout: object = None,
    stderr: object = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A running program, ended (TERM, then KILL) when the block is left, however it is left. Its variables: see `run`;
    the protection that this process may have from the kernel's OOM killer is not passed on."""
    variables = {**inherited(inherit), **(environment or {})}
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
    own = [*as_user, setpriv, "--pdeathsig", "TERM", *lowly] if setpriv else [*as_user, *lowly]
    return [*_like_others(), *own]


def _like_others() -> list[str]:
    """A worker that the OOM killer spares (OOMScoreAdjust in its unit) must not have its children spared as well."""
    with contextlib.suppress(OSError, ValueError):
        if int(OOM_SCORE.read_text()) < 0 and (choom := shutil.which("choom")):
            return [choom, "--adjust", "0", "--"]
    return []


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
