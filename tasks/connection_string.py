"""The application's connection string in the file that it reads at its start (`backend/.env`, §8.3)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from blocks.postgres import Postgres
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.permit import Permit

SWITCH = "switch the connection string in"


@dataclass(frozen=True)
class Switched:
    """Which server (`host:port`) the application was told, and is told now."""

    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether the file was written: the application has to be restarted then."""
        return self.before != self.after


@probe
def read_target(application: Application) -> str:
    """The server, `host:port` (or several, with commas), that the application connects to at its next start.

    Raises:
        OpsError: its file cannot be read, or has no such line.
    """
    return _found(application)[1]


@action(idempotent=True)
def switch_target(permit: Permit, application: Application, postgres: Postgres) -> Switched:
    """Name another server in the line, and change nothing else of the file: beside it, on disk, then renamed over it.

    Raises:
        OpsError: the file cannot be read or written, or has no such line.
    """
    permit.require(SWITCH, application.env_file)
    path, wanted = Path(application.env_file), f"{postgres.host}:{postgres.port}"
    text, before, (start, end) = _found(application)
    if wanted in before.split(","):  # of several libpq itself finds the one that takes writes
        return Switched(before, before)
    beside = path.with_name(f".{path.name}.switched")
    try:
        was = path.stat()
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            os.fchown(file.fileno(), was.st_uid, was.st_gid)
            os.fchmod(file.fileno(), was.st_mode & 0o7777)
            file.write(text[:start] + wanted + text[end:])
            file.flush()
            os.fsync(file.fileno())
        failpoint("connection string: before rename")
        beside.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        raise OpsError(
            f"{path} cannot be written: {error.strerror}", "let this user write it and its directory"
        ) from None
    return Switched(before, wanted)


def _found(application: Application) -> tuple[str, str, tuple[int, int]]:
    """The file's text, the server in it, and where in the text that stands. Never the line: it has a password."""
    path, variable = Path(application.env_file), application.dsn_variable
    if not application.env_file:
        raise OpsError("[application] names no env_file", f"add the file in which the application reads {variable}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OpsError(f"{path} cannot be read: {why}", "correct [application] env_file") from None
    lines = list(re.finditer(rf"^[ \t]*(?:export[ \t]+)?{re.escape(variable)}[ \t]*=[ \t]*(.*)$", text, re.MULTILINE))
    if not lines:
        raise OpsError(f"{path} has no line {variable}=…", "correct [application] env_file or dsn_variable")
    value = lines[-1]  # the last one counts
    place = re.search(r"^[^/]*//(?>(?:[^/?'\"]*@)?)([^/?@'\"]+)", value[1])
    if not place:
        raise OpsError(
            f"{variable} in {path} is no URL with a host", "write it as postgresql://user:password@host:port/db"
        )
    start = value.start(1) + place.start(1)
    return text, place[1] if ":" in place[1] else f"{place[1]}:5432", (start, start + len(place[1]))
