"""Places where a test may kill this process with -9, to show that a run killed anywhere can be launched again.

`OPS_FAILPOINT=name` kills at `name`; `OPS_FAILPOINT=name:pause` stops the process there (SIGSTOP) until somebody
continues it; `OPS_FAILPOINT=name:cancel` sends SIGTERM, as Prefect's worker does to a cancelled run.
`OPS_FAILPOINT_LOG=file` appends every name that is reached, so that tests need no list of them.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path


def failpoint(name: str) -> None:
    """Die here if the environment says so; else do nothing."""
    if log := os.environ.get("OPS_FAILPOINT_LOG"):
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(name + "\n")
    chosen = os.environ.get("OPS_FAILPOINT", "")
    if chosen == name:
        os.kill(os.getpid(), signal.SIGKILL)
    elif chosen == f"{name}:pause":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif chosen == f"{name}:cancel":
        os.kill(os.getpid(), signal.SIGTERM)
