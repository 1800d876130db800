"""Processes that run from a directory: what they load later they still read from there."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

SHELLS = ("bash", "sh", "dash", "zsh", "fish", "su", "sudo")


def users_of(directory: Path, programs: Sequence[str] = (), *, before: float = math.inf) -> list[str]:
    """Processes (name and pid) that started `before` a time and whose working directory or first arguments are in
    `directory`: those whose names start with one of `programs`, else all but shells and this run."""
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
