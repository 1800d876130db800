"""The backup log (§1.2): one line for every backup and every pruning, for people and for what watches the file."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from blocks.places import Logs
from runbook.errors import OpsError
from runbook.kinds import action


@action
def append_line(logs: Logs, text: str) -> str:
    """Append a dated line; returns it. Without `[logs] backup` nothing is written.

    Raises:
        OpsError: the log cannot be written to.
    """
    path = Path(logs.backup)
    line = f"{datetime.now().astimezone().isoformat(timespec='seconds')}: {' '.join(text.split())}"
    if not logs.backup:
        return line
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(f"{line}\n".encode())  # one write: a line of another run is never in the middle of it
    except OSError as error:
        raise OpsError(f"{path} could not be written: {error.strerror}", "make it writable for the worker") from None
    return line
