"""How pgBackRest is called, and what it says of its backups.

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
    """One backup in pgBackRest's repository. `stands_on` are the labels without which it is nothing."""

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
    """Run one of its commands as the server's user, whose files the repository and the data are; what it printed.

    Raises:
        OpsError, CommandFailed: it is not installed, or it failed.
    """
    return shell.run(
        argv_of(wal, command, *options),
        environment=environment_of(postgres),
        inherit=INHERIT,
        directory=Path("/"),
        user=postgres.os_user,
        hint=hint or f"look at pgbackrest.conf; `pgbackrest --stanza={wal.stanza} check` tells more",
    ).stdout


def argv_of(wal: Wal, command: str, *options: str) -> list[str]:
    """Raises OpsError where the environment names no stanza."""
    if not wal.stanza:
        raise OpsError("[wal] tool is pgbackrest, and there is no stanza", "add stanza to [wal] in the TOML")
    config = [f"--config={wal.config}"] if wal.config else []
    quiet = ["--log-level-console=off", "--log-level-stderr=warn", "--log-level-file=off"]
    return [wal.program, *config, f"--stanza={wal.stanza}", *quiet, command, *options]


def environment_of(postgres: Postgres) -> dict[str, str]:
    """How it reaches the server, where it must."""
    return {**postgres.environment(), "LC_ALL": "C"}


@probe
def read_labels(wal: Wal, postgres: Postgres) -> tuple[Label, ...]:
    """Its backups, oldest first.

    Raises:
        OpsError: it knows no such stanza, or its repository cannot be read.
    """
    return labels_of(call(wal, postgres, "info", "--output=json"), wal.stanza)


def labels_of(printed: str, stanza: str) -> tuple[Label, ...]:
    """From what `info --output=json` prints."""
    found = next((one for one in json.loads(printed) if one["name"] == stanza), None)
    if found is None or found["status"]["code"] not in (0, 2):  # 2: there is no backup yet
        told = found["status"]["message"] if found else "it is not known"
        raise OpsError(f"pgBackRest's stanza {stanza}: {told}", "pgbackrest stanza-create makes it")
    systems = {database["id"]: int(database["system-id"]) for database in found["db"]}
    return tuple(_label(one, systems) for one in found["backup"])


def _label(told: dict[str, Any], systems: dict[int, int]) -> Label:
    return Label(
        label=told["label"],
        kind=told["type"],
        stands_on=tuple(told["reference"] or ()),
        start_lsn=told["lsn"]["start"],
        stop_lsn=told["lsn"]["stop"],
        timeline=int(told["archive"]["stop"][:8], 16),
        system=systems[told["database"]["id"]],
        stopped=datetime.fromtimestamp(told["timestamp"]["stop"], UTC),
        bytes=int(told["info"]["size"]),
        stored_bytes=int(told["info"]["repository"]["delta"]),
        damaged=bool(told["error"]),
    )
