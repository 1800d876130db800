"""The application's connection string in its env file (`backend/.env`, §8.3)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.application.env_file import find_line, write_text

SWITCH = "switch the connection string in"


@dataclass(frozen=True)
class Switched:
    """The server (`host:port`) in the connection string, before and after."""

    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether the file was changed: then the application needs a restart."""
        return self.before != self.after


@probe
def read_target(application: Application) -> str:
    """The server, `host:port` (or several, with commas), that the application connects to at its next start.

    Raises:
        OpsError: its file cannot be read, or has no such line.
    """
    return _found(application)[1]


@action(of=lambda application: Act(SWITCH, application.env_file), idempotent=True)
def switch_target(application: Application, postgres: Postgres) -> Switched:
    """Write another server into the connection string, atomically; the rest of the file is unchanged.

    Raises:
        OpsError: the file cannot be read or written, or has no such line.
    """
    path, wanted = Path(application.env_file), f"{postgres.host}:{postgres.port}"
    text, before, (start, end) = _found(application)
    if wanted in before.split(","):  # of several servers libpq finds the writable one itself
        return Switched(before, before)
    write_text(path, text[:start] + wanted + text[end:])
    return Switched(before, wanted)


def _found(application: Application) -> tuple[str, str, tuple[int, int]]:
    """The file's text, the server in it, and its position. Never the whole line: it contains a password."""
    variable = application.dsn_variable
    text, value = find_line(application, variable, "dsn_variable")
    place = re.search(r"^[^/]*//(?>(?:[^/?'\"]*@)?)([^/?@'\"]+)", value[1])
    if not place:
        raise OpsError(
            f"{variable} in {application.env_file} is no URL with a host",
            "write it as postgresql://user:password@host:port/db",
        )
    start = value.start(1) + place.start(1)
    return text, place[1] if ":" in place[1] else f"{place[1]}:5432", (start, start + len(place[1]))
