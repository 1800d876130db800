"""Priorities of processes, where the kernel groups them by session (autogroups).

There a nice value counts only within a session, and each of PostgreSQL's processes has its own: between sessions the
group's value counts. https://man7.org/linux/man-pages/man7/sched.7.html
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_changing = threading.Lock()
_wanted: list[int] = []
_before = 0


@contextmanager
def session_lowered(nice: int) -> Iterator[None]:
    """While the block runs, give the session of this process, with the programs that it starts, a lower priority; of
    several blocks at a time the lowest.

    A worker starts each flow in a session of its own. In a shell's session, what the shell started would yield as well:
    it is left as it is. Only root gets the earlier priority again: of another user the run yields until it ends.
    """
    group = _autogroup(os.getpid())
    if os.getsid(0) != os.getpid() or not group.exists():
        yield
        return
    with _changing:
        global _before
        _before = _before if _wanted else nice_of(group)
        _wanted.append(nice)
        _lower(group)
    try:
        yield
    finally:
        with _changing:
            _wanted.remove(nice)
            _lower(group)


def _lower(group: Path) -> None:
    with suppress(OSError):  # a sandbox may forbid it
        group.write_text(str(max([_before, *_wanted])))


def read(pid: int) -> tuple[int, int]:
    """The nice values of a process and of its autogroup; 0 where the kernel has none.

    Raises:
        OSError: there is no such process.
    """
    return os.getpriority(os.PRIO_PROCESS, pid), nice_of(_autogroup(pid))


def assign(pid: int, nice: int, of_group: int) -> None:
    """Give a process and its autogroup these nice values.

    Raises:
        OSError: there is no such process, or this one may not do it.
    """
    os.setpriority(os.PRIO_PROCESS, pid, nice)
    if (group := _autogroup(pid)).exists():
        group.write_text(str(of_group))


def nice_of(group: Path) -> int:
    """Of a file like `/autogroup-25 nice 19`; 0 where there is no group: the file is missing (no such kernel) or empty
    (no session since the host's start)."""
    words = group.read_text().split() if group.exists() else []
    return int(words[-1]) if words else 0


def _autogroup(pid: int) -> Path:
    return Path(f"/proc/{pid}/autogroup")
