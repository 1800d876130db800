"""What the tests run as processes of their own: `python -m tests.runbook.actor hold …`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from prefect import flow

from runbook import chain, shell
from runbook.failpoint import failpoint
from runbook.lock import Rank
from runbook.run import runbook
from tests.runbook.system import System


def _say(word: str, what: object = "") -> None:
    print(word, what, flush=True)


def hold(name: str, directory: str, rank: str) -> None:
    """Hold the environment, working in a child, until somebody ends this process."""
    with (
        runbook("Rebuild indexes", System(Path(directory), name), changes=True, rank=cast(Rank, rank)),
        shell.spawn(["sleep", "300"]) as child,
    ):
        _say("held", child.pid)
        child.wait()


@flow(name="rebuild-indexes")
def hold_as_flow(name: str, directory: str, rank: str) -> None:
    """The same as a flow run: with a lease."""
    hold(name, directory, rank)


def deaf(name: str, directory: str) -> None:
    """Hold the environment and do nothing about SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    hold(name, directory, "maintenance")


def append(directory: str, count: str) -> None:
    """Append reports as fast as possible, from the moment when `go` is there."""
    _say("ready")
    while not (Path(directory) / "go").exists():
        time.sleep(0.001)
    for number in range(int(count)):
        chain.append(Path(directory), "trial", {"started": "2026-11-25T01:02:03+00:00", "text": f"日本語 {number}"})


def child(how: str) -> None:
    """Run a child: in the main thread through `run`."""
    _say("running")
    shell.run([sys.executable, "-c", f"import os, time; print(os.getpid(), file=open({how!r}, 'w')); time.sleep(300)"])


def fail(name: str) -> None:
    """Pass three failpoints."""
    for place in ("before", name, "after"):
        failpoint(place)
        _say("passed", place)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "hold": hold, "flow": hold_as_flow, "deaf": deaf, "append": append, "child": child, "fail": fail,
    }  # fmt: skip
    commands[sys.argv[1]](*sys.argv[2:])
