"""Who runs from a directory: what it has loaded already it keeps, what it loads later it looks for there."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

SHELLS = ("bash", "sh", "dash", "zsh", "fish", "su", "sudo")


def users_of(directory: Path, programs: Sequence[str] = (), *, before: float = math.inf) -> list[str]:
    """Processes (name and pid) that began before a moment and whose working directory or first arguments lie in
    `directory`: of programs whose names begin with one of `programs`, else of all but shells and this run."""
    places = (directory, directory.resolve())
    found = []
    for process in psutil.process_iter(["pid", "name", "cmdline", "cwd", "create_time"]):
        seen = process.info
        arguments = seen["cmdline"] or [""]
        name = Path(arguments[0]).name or str(seen["name"])
        wanted = name.startswith(tuple(programs)) if programs else seen["name"] not in SHELLS
        if seen["pid"] == os.getpid() or not wanted or (seen["create_time"] or 0) >= before:
            continue
        if any(_within(one, place) for place in places for one in (seen["cwd"] or "", *arguments[:3])):
            found.append(f"{seen['name']} (pid {seen['pid']})")
    return found


def _within(place: str, directory: Path) -> bool:
    return place.startswith("/") and Path(place).is_relative_to(directory)
