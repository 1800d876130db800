"""Start the application in the foreground on a free port, to find out why it does not start (appendix A). The live
processes are not touched; the started ones are ended."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil

from blocks.places import Application
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.masking import masked, secret_parts, without
from runbook.wait import until
from tasks.application.env_file import read_variables
from tasks.host.disk import is_here

START_SECONDS = 30.0
END_SECONDS = 5.0
LINES, LINE_BYTES = 100, 1 << 16
MARK = "OPS_TRIAL"
HOOKS = "UVICORN_LIFESPAN"  # https://www.uvicorn.org/settings/: every option of its command line is a variable too
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME")


@dataclass(frozen=True)
class StartTrial:
    """`served`: it accepted connections; `code`: exit code, None if it was still starting at the timeout; `variables`:
    the source of its environment; `hooks`: whether its start-up hooks ran (migrations, queues, schedules); `output`:
    its last lines, masked."""

    served: bool
    code: int | None
    output: str
    seconds: float
    variables: str
    hooks: bool
    command: str


@probe
def start_in_foreground(application: Application) -> StartTrial:
    """Run `start_command` until it serves or exits, for at most START_SECONDS; then end it with all its child
    processes. uvicorn skips its start-up hooks, unless `start_variables` enable them.

    Raises:
        OpsError: its Python, its directory or its variables are missing on this host.
    """
    directory, values = Path(application.need("backend_directory")), read_variables.work(application)
    if not os.path.isdir(directory):  # noqa: PTH112 - also False if this user may not read it
        raise OpsError(
            f"{directory} does not exist", "correct [application] backend_directory, or run a worker on its host"
        )
    source = f"{len(values)} of {application.env_file}" if values else "none but PATH and HOME"
    port, mark = _free_port(), uuid.uuid4().hex
    own = _variables(application, values, port, mark)
    argv = [_filled(word, application.python, port) for word in application.start_command]
    forgotten = [word for name in os.environ if name not in KEPT and name not in own for word in ("-u", name)]
    lines, started = deque[bytes](maxlen=LINES), time.monotonic()
    try:
        with shell.spawn(
            ["env", *forgotten, *argv],
            environment=own,
            directory=directory,
            user=_owner(directory),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as child:
            reader = threading.Thread(target=_keep, args=(child.stdout, lines), daemon=True)
            reader.start()
            served = _serves(child, port)
            code = child.poll()
    except PermissionError as error:
        raise OpsError(
            f"{error.filename} may not be run by this user", "run the worker as the application's user"
        ) from None
    finally:
        _end_children(mark)
    reader.join(END_SECONDS)
    said = masked(without(b"".join(lines).decode(errors="replace"), secret_parts(own)))
    return StartTrial(
        served, code, said, time.monotonic() - started, source, own[HOOKS] != "off", masked(" ".join(argv))
    )


def _variables(application: Application, values: Mapping[str, str], port: int, mark: str) -> dict[str, str]:
    return {
        HOOKS: "off",
        **values,
        **application.start_variables,
        "PORT": str(port),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        MARK: mark,
    }


def _keep(stream: IO[bytes], lines: deque[bytes]) -> None:
    """Keep the last lines in memory: the disk can be full, and the output endless."""
    with contextlib.suppress(ValueError), stream:
        while line := stream.readline(LINE_BYTES):
            lines.append(line)


def _end_children(mark: str) -> None:
    """End every process that it started, in any session: each inherited the variable MARK."""

    def all_ended() -> bool:
        children = list(_children(mark))
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        return not children

    with contextlib.suppress(Unreachable):
        until(all_ended, what="their end", seconds=END_SECONDS)


def _children(mark: str) -> Iterator[psutil.Process]:
    wanted = f"{MARK}={mark}".encode()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # another user's process, or one that has ended
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                yield process


def _filled(word: str, python: str, port: int) -> str:
    return word.replace("{python}", python).replace("{port}", str(port))


def _owner(directory: Path) -> str:
    """The directory's owner, if this is root: root must not create files in the application's directories."""
    status = directory.stat()
    return f"{status.st_uid}:{status.st_gid}" if os.geteuid() == 0 and status.st_uid else ""


def _free_port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def _serves(child: subprocess.Popen[bytes], port: int) -> bool:
    def decided() -> bool:
        return child.poll() is not None or listens(port)

    with contextlib.suppress(Unreachable):
        until(decided, what="its start", seconds=START_SECONDS)
    return child.poll() is None and listens(port)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Listener:
    """The process that listens on the application's port; process 0 if it is unknown."""

    port: int
    pid: int
    name: str

    def is_of(self, service: int) -> bool:
        """Whether it is a service's main process, or its descendant."""
        if self.pid == service:
            return True
        with contextlib.suppress(psutil.Error):
            return any(one.pid == service for one in psutil.Process(self.pid).parents()) if service else False
        return False


def is_local(url: str) -> bool:
    """Whether a URL points to this host."""
    return is_here(urlsplit(url).hostname or "elsewhere")


def port_of(url: str) -> int:
    """The port of a URL."""
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


@probe
def find_listener(url: str) -> Listener | None:
    """The process that listens on a URL's port; None if there is none, or the URL is another host's."""
    if not is_local(url):
        return None
    port = port_of(url)
    try:
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        found = [one for one in listening if one.laddr and one.laddr[1] == port]
    except psutil.AccessDenied:
        found = []
        if listens(port):
            return Listener(port, 0, "a process that this user cannot inspect")
    for one in found:
        if not one.pid:
            return Listener(port, 0, "a process that this user cannot inspect")
        with contextlib.suppress(psutil.Error):
            return Listener(port, one.pid, psutil.Process(one.pid).name())
    return None


@dataclass(frozen=True)
class StartReason:
    """Why the application does not start: `what` completes “the backend does not start: …”; `line`: of the log."""

    kind: str
    what: str
    line: str


_KNOWN = (
    ("port", re.compile(r"address already in use|Errno 98\b|EADDRINUSE", re.IGNORECASE), "its port is taken"),
    ("import", re.compile(r"ModuleNotFoundError: (No module named '[\w.]+')"), "an import fails: {0}"),
    ("import", re.compile(r"ImportError: (.{1,160})"), "an import fails: {0}"),
    ("import", re.compile(r"Error loading ASGI app\. (.{1,160})"), "an import fails: {0}"),
    ("syntax", re.compile(r"((?:SyntaxError|IndentationError|TabError): .{1,160})"), "its code cannot be read: {0}"),
    (
        "variable",
        re.compile(r"missing in \.env and in the environment: ([A-Z0-9_, ]+)"),
        "a variable of its environment is missing: {0}",
    ),
    ("variable", re.compile(r"KeyError: '([A-Z][A-Z0-9_]+)'"), "a variable of its environment is missing: {0}"),
    (
        "variable",
        re.compile(
            r"(?i)environment variable[s]? [`'\"]?(\w+)[`'\"]? (?:is |are )?"
            r"(?:not set|missing|required|undefined)"
        ),
        "a variable of its environment is missing: {0}",
    ),
    ("variable", re.compile(r"(?i)validation errors? for \w*settings"), "its settings are incomplete or wrong"),
    (
        "migration",
        re.compile(
            r"(?:UndefinedTable|UndefinedColumn|relation \"[\w.]+\" does not exist"
            r"|column \"?[\w.]+\"? does not exist)"
        ),
        "the database lacks a migration",
    ),
    (
        "database",
        re.compile(r"password authentication failed|InvalidPasswordError"),
        "the database refuses its password",
    ),
    (
        "database",
        re.compile(r"(?:OperationalError|CannotConnectNowError|TooManyConnections|ConnectionDoesNotExist)"),
        "the database refuses its connection",
    ),
    ("redis", re.compile(r"redis\.exceptions\.\w+"), "Redis refuses its connection"),
    ("rights", re.compile(r"PermissionError: (.{1,160})"), "a permission is missing: {0}"),
    ("disk", re.compile(r"No space left on device"), "the disk is full"),
    ("memory", re.compile(r"MemoryError|Cannot allocate memory"), "there is not enough memory"),
    ("unknown", re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception)\b.{0,160})", re.MULTILINE), "{0}"),
)
STARTED = re.compile(r"Application startup complete|Uvicorn running on|Started server process")


def find_reason(text: str) -> StartReason | None:
    """The newest line with a known reason; None if a successful start follows it."""
    for line in reversed(text.splitlines()):
        for kind, pattern, what in _KNOWN:
            if found := pattern.search(line):
                return StartReason(kind, what.format(*found.groups()), line.strip()[:300])
        if STARTED.search(line):
            return None
    return None
