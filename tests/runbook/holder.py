"""A run that holds an environment until somebody ends it: `python -m tests.runbook.holder hold NAME DIRECTORY RANK`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from prefect import flow

from runbook import shell
from runbook.guard.holder import Rank
from runbook.run import runbook
from tests.runbook.system import System


def hold(name: str, directory: str, rank: str) -> None:
    """Work in a child; with the rank `plan`, as a plan that writes scratch copies."""
    system = System(Path(directory), name)
    if rank == "plan":
        work = runbook("Restore tables", system, "", changes=True, without_confirm="stages", rank="recovery")
    else:
        work = runbook("Rebuild indexes", system, name, changes=True, rank=cast(Rank, rank))
    with (
        work,
        shell.spawn(["sleep", "300"]) as child,
    ):
        print("held", child.pid, flush=True)
        child.wait()


@flow(name="rebuild-indexes")
def hold_as_flow(name: str, directory: str, rank: str) -> None:
    """The same as a flow run: with a lease."""
    hold(name, directory, rank)


def hold_deaf(name: str, directory: str, rank: str) -> None:
    """The same, doing nothing about SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    hold(name, directory, rank)


if __name__ == "__main__":
    commands: dict[str, Callable[[str, str, str], None]] = {"hold": hold, "flow": hold_as_flow, "deaf": hold_deaf}
    commands[sys.argv[1]](*sys.argv[2:])
