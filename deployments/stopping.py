"""Before a worker is stopped: end its flows, so that each of them says why.

A worker that is stopped kills its flows with it, at once: no `finally` runs, nothing tells Prefect, and each stays
Running until the automation zombie-runs finds it dead. So its flows get their SIGTERM first, while it lives; new ones
that it begins meanwhile get theirs too. worker.service does this (ExecStop); in a container, by hand:

python -m deployments.stopping [the worker's process id]
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from runbook.errors import OpsError, Unreachable
from runbook.wait import until

END_SECONDS = 60.0
ENGINE = "prefect.engine"


def find_worker() -> int:
    """The process id of this host's only worker.

    Raises:
        OpsError: there is none, or more than one.
    """
    found = [one.pid for one in psutil.process_iter() if is_worker(_words(one))]
    if len(found) != 1:
        raise OpsError(f"{len(found)} workers run here", "say the process id of the one that is meant")
    return found[0]


def is_worker(words: Sequence[str]) -> bool:
    """`python …/prefect worker start` or `python -m prefect worker start`; not a container's init, which has the
    worker's command in its own arguments."""
    script = list(words[2:4]) == ["worker", "start"] and Path(words[1]).name == "prefect"
    return script or list(words[1:5]) == ["-m", "prefect", "worker", "start"]


def flows_of(worker: int) -> list[psutil.Process]:
    """The processes of a worker's flows."""
    try:
        return [one for one in psutil.Process(worker).children(recursive=True) if ENGINE in _words(one)]
    except psutil.NoSuchProcess:
        return []


def end_flows(worker: int) -> int:
    """SIGTERM to each, until there is none; returns how many there were.

    Raises:
        Unreachable: one of them does not end.
    """
    asked = set[int]()

    def gone() -> bool:
        alive = [one for one in flows_of(worker) if _lives(one)]
        for one in alive:
            if one.pid not in asked:  # once: a second signal would break into its `finally`
                asked.add(one.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.terminate()
        return not alive

    until(gone, what="the end of the worker's flows", seconds=END_SECONDS)
    return len(asked)


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def main() -> int:
    """The command line."""
    try:
        worker = int(sys.argv[1]) if len(sys.argv) > 1 else find_worker()
        print(f"{end_flows(worker)} flows were ended")
    except (OpsError, Unreachable) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
