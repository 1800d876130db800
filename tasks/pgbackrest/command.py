"""Calls of pgBackRest, and its list of backups.

https://pgbackrest.org/command.html
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe

INHERIT = ("PGBACKREST_*",)


@dataclass(frozen=True)
class Label:
    """One backup in pgBackRest's repository. `stands_on`: the labels that it depends on."""

    label: str
    kind: str
    stands_on: tuple[str, ...]
    start_lsn: str
    stop_lsn: str
    timeline: int
    system: int
    stopped: datetime
    bytes: int
    stored_bytes: int
    damaged: bool


def call(wal: Wal, postgres: Postgres, command: str, *options: str, hint: str = "") -> str:
    """Run one of its commands as the server's user, who owns repository and data; returns its output.

    Raises:
        OpsError, CommandFailed: it is not installed, or it failed.
    """
    return shell.run(
        argv_of(wal, command, *options),
        environment=environment_of(postgres),
        inherit=INHERIT,
        directory=Path("/"),
        user=postgres.os_user,
        hint=hint or f"check pgbackrest.conf; `pgbackrest --stanza={wal.stanza} check` shows more",
    ).stdout


def argv_of(wal: Wal, command: str, *options: str) -> list[str]:
    """The command line. Raises OpsError if the environment names no stanza."""
    if not wal.stanza:
        raise OpsError("[wal] tool is pgbackrest, but no stanza is set", "add stanza to [wal] in the TOML")
    config = [f"--config={wal.config}"] if wal.config else []
    quiet = ["--log-level-console=off", "--log-level-stderr=warn", "--log-level-file=off"]
    return [wal.program, *config, f"--stanza={wal.stanza}", *quiet, command, *options]


def environment_of(postgres: Postgres) -> dict[str, str]:
    """The connection's variables, for commands that query the server."""
    return {**postgres.environment(), "LC_ALL": "C"}


@probe
def read_labels(wal: Wal, postgres: Postgres) -> tuple[Label, ...]:
    """Its backups, oldest first.

    Raises:
        OpsError: there is no such stanza, or its repository is unreadable.
    """
    return labels_of(call(wal, postgres, "info", "--output=json"), wal.stanza)


def labels_of(printed: str, stanza: str) -> tuple[Label, ...]:
    """The backups in the output of `info --output=json`."""
    found = next((one for one in json.loads(printed) if one["name"] == stanza), None)
    if found is None or found["status"]["code"] not in (0, 2):  # 2: there is no backup yet
        problem = found["status"]["message"] if found else "it does not exist"
        raise OpsError(f"pgBackRest's stanza {stanza}: {problem}", "create it by pgbackrest stanza-create")
    systems = {database["id"]: int(database["system-id"]) for database in found["db"]}
    return tuple(_label(one, systems) for one in found["backup"])


def _label(info: dict[str, Any], systems: dict[int, int]) -> Label:
    return Label(
        label=info["label"],
        kind=info["type"],
        stands_on=tuple(info["reference"] or ()),
        start_lsn=info["lsn"]["start"],
        stop_lsn=info["lsn"]["stop"],
        timeline=int(info["archive"]["stop"][:8], 16),
        system=systems[info["database"]["id"]],
        stopped=datetime.fromtimestamp(info["timestamp"]["stop"], UTC),
        bytes=int(info["info"]["size"]),
        stored_bytes=int(info["info"]["repository"]["delta"]),
        damaged=bool(info["error"]),
    )
