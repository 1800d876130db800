"""The application started in the foreground, on a port of its own, to see why it does not start (appendix A). What runs
is not touched; what was started here is ended here."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil
from dotenv import dotenv_values

from blocks.places import Application
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.wait import until
from tasks.host import is_here
from tasks.logs.masking import masked

START_SECONDS = 30.0
LINES = 100
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME")


@dataclass(frozen=True)
class Trial:
    """`served`: it took connections. `code` is None where it was still starting when the time was over. `variables`
    tells where its environment came from; `output` is the end of what it printed, masked."""

    served: bool
    code: int | None
    output: str
    seconds: float
    variables: str
    command: str


@probe
def start_in_foreground(application: Application) -> Trial:
    """Start it as `start_command` says, and end it when it serves, has ended, or does neither for 30 seconds.

    Raises:
        OpsError: its Python, its directory or its variables are not here.
    """
    directory, values, told = Path(application.backend_directory), _variables(application), "none but PATH and HOME"
    if not directory.is_dir():
        raise OpsError(f"{directory} is not there", "correct [application] backend_directory, or run a worker there")
    if values:
        told = f"{len(values)} of {application.env_file}"
    with _free_port() as port, tempfile.TemporaryFile() as out:
        argv = [_filled(word, application.python, port) for word in application.start_command]
        own = {**values, **application.start_variables, "PORT": str(port), "PYTHONDONTWRITEBYTECODE": "1"}
        own["PYTHONUNBUFFERED"] = "1"
        forgotten = [word for name in os.environ if name not in KEPT and name not in own for word in ("-u", name)]
        started = time.monotonic()
        with shell.spawn(
            ["env", *forgotten, *argv], environment=own, directory=directory, user=_owner(directory), stdout=out,
            stderr=out,
        ) as child:  # fmt: skip
            served = _serves(child, port)
            code = child.poll()
        return Trial(served, code, _end_of(out, own), time.monotonic() - started, told, " ".join(argv))


def _filled(word: str, python: str, port: int) -> str:
    return word.replace("{python}", python).replace("{port}", str(port))


def _variables(application: Application) -> dict[str, str]:
    if not application.env_file:
        return {}
    path = Path(application.env_file)
    try:
        found = dotenv_values(stream=_text(path), interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OpsError(f"{path} cannot be read: {why}", "correct [application] env_file, or its rights") from None
    return {name: value for name, value in found.items() if value is not None}


def _text(path: Path) -> IO[str]:
    return path.open(encoding="utf-8")


def _owner(directory: Path) -> str:
    """Root would leave files of its own in the application's directories."""
    status = directory.stat()
    return f"{status.st_uid}:{status.st_gid}" if os.geteuid() == 0 and status.st_uid else ""


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        port = int(line.getsockname()[1])
    yield port


def _serves(child: subprocess.Popen[bytes], port: int) -> bool:
    def decided() -> bool:
        return child.poll() is not None or _listens(port)

    with contextlib.suppress(Unreachable):
        until(decided, what="its start", seconds=START_SECONDS)
    return child.poll() is None and _listens(port)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _end_of(out: IO[bytes], given: Mapping[str, str]) -> str:
    out.seek(0)
    text = out.read().decode(errors="replace")
    for value in sorted(given.values(), key=len, reverse=True):
        if len(value) >= 8 and not value.startswith("/"):
            text = text.replace(value, "********")
    return masked("\n".join(text.splitlines()[-LINES:]))


@dataclass(frozen=True)
class Listener:
    """Who listens on the application's port; process 0 where that cannot be told."""

    port: int
    pid: int
    name: str

    def is_of(self, service: int) -> bool:
        """Whether it is a service's process, or a child of it."""
        if self.pid == service:
            return True
        with contextlib.suppress(psutil.Error):
            return any(one.pid == service for one in psutil.Process(self.pid).parents()) if service else False
        return False


def is_local(url: str) -> bool:
    """Whether an address is this host's own."""
    return is_here(urlsplit(url).hostname or "elsewhere")


@probe
def find_listener(url: str) -> Listener | None:
    """The process that listens on a port of this host; None where nobody does, or it is another host's."""
    if not is_local(url):
        return None
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        found = [one for one in listening if one.laddr and one.laddr[1] == port]
    except psutil.AccessDenied:
        found = []
        if _listens(port):
            return Listener(port, 0, "a process that this user may not see")
    for one in found:
        if not one.pid:
            return Listener(port, 0, "a process that this user may not see")
        with contextlib.suppress(psutil.Error):
            return Listener(port, one.pid, psutil.Process(one.pid).name())
    return None
