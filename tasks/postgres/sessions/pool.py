"""The application's connection pool settings, read where the application reads them (§1.5).

The environment of its process comes before `.env`, and that before the values in its code.
https://docs.sqlalchemy.org/en/21/core/pooling.html#sqlalchemy.pool.QueuePool
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import probe

SIZE, OVERFLOW, TIMEOUT, RECYCLE, ECHO = (
    *("DATABASE_POOL_SIZE", "DATABASE_MAX_OVERFLOW", "DATABASE_POOL_TIMEOUT", "DATABASE_POOL_RECYCLE"),
    "DATABASE_ECHO",
)
WORKERS = "WEB_CONCURRENCY"
# Manual §1.5.
RECOMMENDED: Mapping[str, str] = {SIZE: "20", OVERFLOW: "10", TIMEOUT: "30", RECYCLE: "3600", ECHO: "False"}
SOURCES = ("config.py", "*/config.py", "*/settings.py")
_LINE = re.compile(r"(?:export\s+)?(\w+)\s*=\s*(.*)")
_WORKERS_OPTION = re.compile(r"(?:--workers|-w)=?(\d*)")
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class PoolValue:
    """One value as text, and its source."""

    text: str
    source: str

    @property
    def number(self) -> float | None:
        """The value as a number, None if it is not one."""
        try:
            return float(self.text)
        except ValueError:
            return None

    @property
    def is_on(self) -> bool | None:
        """The value as a boolean, None if it is not one."""
        return {"true": True, "1": True, "false": False, "0": False}.get(self.text.strip().lower())


@dataclass(frozen=True)
class Pool:
    """The pool's values by name. Other settings are not kept: they contain passwords. `workers`: None if unknown."""

    values: Mapping[str, PoolValue]
    workers: PoolValue | None


@probe
def read_pool(application: Application) -> Pool:
    """Pool settings and the number of the backend's worker processes.

    Raises:
        OpsError: the backend's directory or its `.env` is unreadable.
    """
    directory = Path(application.need("backend_directory"))
    if not directory.is_dir():
        raise OpsError(f"{directory} is missing", "correct [application] backend_directory, or run this on its host")
    values = {**_of_code(directory), **_of_file(directory / ".env")}
    process = _find_process(application.url)
    if process:
        values |= _of_process(process)
    counted = PoolValue(str(_count_workers(process)), "running processes") if process else None
    return Pool({name: values[name] for name in RECOMMENDED if name in values}, counted or values.get(WORKERS))


def _of_code(directory: Path) -> dict[str, PoolValue]:
    """Assignments such as `DATABASE_POOL_SIZE = 20` in a module or class, in any letter case; literals only."""
    found: dict[str, PoolValue] = {}
    for path in sorted((p for pattern in SOURCES for p in directory.glob(pattern)), reverse=True):
        with contextlib.suppress(OSError, SyntaxError, UnicodeDecodeError):
            for name, value in _assigned(ast.parse(path.read_text(encoding="utf-8"))):
                if name.upper() in RECOMMENDED:
                    found[name.upper()] = PoolValue(str(value), str(path.relative_to(directory)))
    return found


def _assigned(tree: ast.Module) -> Iterator[tuple[str, object]]:
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        with contextlib.suppress(ValueError, TypeError):
            yield name, ast.literal_eval(value)


def _of_file(path: Path) -> dict[str, PoolValue]:
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OpsError(f"{path} cannot be read: {type(error).__name__}", "make it readable for this user") from None
    found = {}
    for line in lines:
        if (match := _LINE.fullmatch(line.strip())) and match[1] in (*RECOMMENDED, WORKERS):
            found[match[1]] = PoolValue(match[2].split(" #")[0].strip().strip("'\""), path.name)
    return found


def _of_process(process: psutil.Process) -> dict[str, PoolValue]:
    with contextlib.suppress(psutil.Error, OSError):
        environ = process.environ()
        source = f"environment of process {process.pid}"
        return {name: PoolValue(environ[name], source) for name in (*RECOMMENDED, WORKERS) if environ.get(name)}
    return {}


def _find_process(url: str) -> psutil.Process | None:
    """The backend's first process: the one that listens on its address, or the parent that passed it the socket."""
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    if address.hostname not in LOCAL:
        return None
    with contextlib.suppress(psutil.Error, OSError):
        pids = [listener.pid for listener in psutil.net_connections("tcp") if port in _ports([listener])]
        if pids and pids[0]:
            process = psutil.Process(pids[0])
            while (parent := process.parent()) and port in _ports_of(parent):
                process = parent
            return process
    return None


def _ports(sockets: Sequence[Any]) -> set[int]:
    return {int(found.laddr.port) for found in sockets if found.status == psutil.CONN_LISTEN}


def _ports_of(process: psutil.Process) -> set[int]:
    with contextlib.suppress(psutil.Error, OSError):
        return _ports(process.net_connections("tcp"))
    return set()


def _count_workers(process: psutil.Process) -> int:
    """The number of workers that a server forks (gunicorn, uvicorn --workers), or 1."""
    with contextlib.suppress(psutil.Error, OSError):
        words = process.cmdline()
        option = 0
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if match := _WORKERS_OPTION.fullmatch(word):
                text = match[1] or following
                option = int(text) if text.isdigit() else option
        ports = _ports_of(process)
        children = [child for child in process.children() if ports & _ports_of(child)]
        return max(option, len(children), 1)
    return 1
