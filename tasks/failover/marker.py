"""A failover that a run has begun, on the disk of this host: a run after it goes on, and does not turn it round."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from runbook.files import durable

FILE = "postgres-failover.json"


@dataclass(frozen=True)
class Begun:
    """From which server (`host:port`) to which, how, when and by whom."""

    old: str
    new: str
    mode: str
    started: str
    run: str

    @classmethod
    def now(cls, old: str, new: str, mode: str) -> Begun:
        """By this process."""
        run = f"process {os.getpid()} on {socket.gethostname()}"
        return cls(old, new, mode, datetime.now(UTC).isoformat(timespec="seconds"), run)


def remember(directory: Path, begun: Begun) -> None:
    """Write it down, on disk before anything is done."""
    directory.mkdir(parents=True, exist_ok=True)
    durable.write(directory / FILE, json.dumps(asdict(begun)), mode=durable.PRIVATE)


def find_begun(directory: Path) -> Begun | None:
    """What a run that did not end well has begun; None where there is none."""
    try:
        return Begun(**json.loads((directory / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def forget(directory: Path) -> None:
    """It has ended well."""
    (directory / FILE).unlink(missing_ok=True)
