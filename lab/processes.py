"""Operating system users, programs run to their end, and processes left over by a killed supervisor."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from runbook.errors import CommandFailed, OpsError

MARK = "OPS_LAB_SUPERVISOR"
"""Environment variable of everything that a lab's supervisor starts: the path of the supervisor's configuration."""


@dataclass(frozen=True)
class OsAccount:
    """The operating system user that runs PostgreSQL and Valkey: `nobody` when root starts the lab."""

    name: str
    uid: int
    gid: int

    @classmethod
    def of_servers(cls) -> OsAccount:
        """PostgreSQL refuses to run as root: then `nobody`, otherwise whoever started the lab."""
        if os.geteuid() == 0:
            entry = pwd.getpwnam("nobody")
            return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)
        return cls.current()

    @classmethod
    def current(cls) -> OsAccount:
        """Whoever runs this program."""
        try:
            name = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:  # a container's user without an entry in /etc/passwd
            name = str(os.geteuid())
        return cls(name, os.geteuid(), os.getegid())

    @property
    def is_other(self) -> bool:
        """Whether starting a program as this account means a change of user."""
        return self.uid != os.geteuid()

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a program as this account. With subprocess's own `user` Python forks: in a large process that takes
        as long as the program's start."""
        as_other = ("setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups")
        return as_other if self.is_other else ()

    def directory(self, path: Path, mode: int) -> None:
        """Create `path` where missing, owned by this account, whatever the umask."""
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
        self.own(path)

    def own(self, path: Path) -> None:
        """Give `path` to this account."""
        if self.is_other:
            os.chown(path, self.uid, self.gid)


def write(path: Path, text: str, mode: int, account: OsAccount | None = None) -> None:
    """Write a file whole or not at all, never readable beyond `mode`."""
    partial = path.with_name(path.name + ".new")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.chmod(mode)
    if account:
        account.own(partial)
    partial.rename(path)


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    account: OsAccount | None = None,
    seconds: float = 600,
) -> str:
    """Run a program to its end and return what it wrote to stdout.

    Raises:
        CommandFailed: it exited with something else than 0, or not within `seconds`.
    """
    line = [str(word) for word in argv]
    try:
        done = subprocess.run(
            [*(account.prefix if account else ()), *line],
            cwd=cwd,
            env=environment,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(line, -1, f"no end within {seconds:.0f} s") from error
    if done.returncode:
        raise CommandFailed(line, done.returncode, done.stderr.strip() or done.stdout)
    return done.stdout


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock: two `up` of one lab take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pid_in(path: Path) -> int | None:
    """The process id on the first line of a pid file; None when there is none."""
    try:
        pid = int(path.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None
    return pid if pid > 0 else None


def alive(pid: int | None) -> psutil.Process | None:
    """The process, unless it is gone or a zombie (where PID 1 does not reap)."""
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(pid) if pid else None
        if process and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def server_at(pid_file: Path, directory: Path) -> psutil.Process | None:
    """The server that a pid file names, only if it works in `directory`: a pid may have been given out again."""
    process = alive(pid_in(pid_file))
    with contextlib.suppress(psutil.Error, OSError):
        if process and Path(process.cwd()) == directory.resolve():
            return process
    return None


def marked(configuration: Path) -> list[psutil.Process]:
    """Everything that the supervisor of `configuration` started, itself included, and their children."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(configuration):
                found.append(process)
    return [process for process in found if alive(process.pid)]


def listener(port: int) -> psutil.Process | None:
    """Return the process that listens on a TCP port; None if there is none, or if it is another user's."""
    for connection in psutil.net_connections("tcp4"):
        if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,) and connection.pid:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(connection.pid)
                return process if process.uids().real == os.geteuid() else None
    return None


def working_in(directory: Path) -> list[psutil.Process]:
    """Every process whose working directory is below one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(directory.resolve()):
                found.append(process)
    return [process for process in found if alive(process.pid)]


def end(processes: Iterable[psutil.Process], seconds: float, how: signal.Signals = signal.SIGTERM) -> None:
    """Ask processes to end, and kill what is still there after `seconds`.

    Raises:
        OpsError: a process survived even that.
    """
    asked = list(processes)
    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(how)
    _, remaining = psutil.wait_procs(asked, timeout=seconds)
    for process in remaining:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, remaining = psutil.wait_procs(remaining, timeout=60)
    if survivors := [process.pid for process in remaining if alive(process.pid)]:
        raise OpsError(f"processes {survivors} do not end", "look at them with ps, then run the command again")


def heed_interrupts() -> None:
    """A program that a script starts in the background ignores SIGINT, as does whatever it starts: Prefect's worker,
    which ends by it, could not be stopped."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
