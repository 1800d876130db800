"""What else the tests run as processes of their own: `python -m tests.runbook.actor append DIRECTORY COUNT`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from runbook import shell
from runbook.failpoint import failpoint
from runbook.files import chain


def append(directory: str, count: str) -> None:
    """Append reports as fast as possible, from the moment when `go` is there."""
    print("ready ", flush=True)
    while not (Path(directory) / "go").exists():
        time.sleep(0.001)
    for number in range(int(count)):
        chain.append(Path(directory), "trial", {"started": "2026-11-25T01:02:03+00:00", "text": f"日本語 {number}"})


def child(path: str) -> None:
    """Run a child that writes its process id down and sleeps."""
    print("running ", flush=True)
    shell.run([sys.executable, "-c", f"import os, time; print(os.getpid(), file=open({path!r}, 'w')); time.sleep(300)"])


def fail(name: str) -> None:
    """Pass three failpoints."""
    for place in ("before", name, "after"):
        failpoint(place)
        print("passed", place, flush=True)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"append": append, "child": child, "fail": fail}
    commands[sys.argv[1]](*sys.argv[2:])
