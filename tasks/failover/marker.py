"""The marker of a PostgreSQL failover: the next run continues it, and does not reverse it."""

from __future__ import annotations

from dataclasses import dataclass

from runbook.files.marker import Marker


@dataclass(frozen=True, kw_only=True)
class FailoverMarker(Marker):
    """From which server (`host:port`) to which."""

    FILE = "postgres-failover.json"
    HINT = "find out which server takes writes (check-replication), then remove the file"

    old: str
    new: str
    mode: str
