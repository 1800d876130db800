"""Who waits for whom: sessions as trees, each below the one that blocks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tasks.postgres.sessions.connections import ClientSession


@dataclass(frozen=True)
class Waiting:
    """One line of the tree of who blocks whom. `session` is None if no session holds the lock (process 0)."""

    depth: int
    pid: int
    session: ClientSession | None


def tree_of(sessions: Sequence[ClientSession]) -> list[Waiting]:
    """The tree of who blocks whom: blockers that wait for nobody, and below each those that wait for it.

    A deadlock that the server has not yet resolved has no such root: it starts at its lowest process.
    """
    by_pid = {session.pid: session for session in sessions}
    waiting: dict[int, list[int]] = {}
    for session in sessions:
        for blocker in session.blocked_by:
            waiting.setdefault(blocker, []).append(session.pid)
    roots = [pid for pid in waiting if pid not in by_pid or not by_pid[pid].blocked_by]
    listed: set[int] = set()
    lines: list[Waiting] = []
    for root in (*sorted(roots), *sorted(waiting)):
        if root not in listed:
            lines += _below(root, 0, waiting, by_pid, listed)
    return lines


def _below(
    pid: int, depth: int, waiting: Mapping[int, list[int]], by_pid: Mapping[int, ClientSession], listed: set[int]
) -> Iterator[Waiting]:
    yield Waiting(depth, pid, by_pid.get(pid))
    if pid in listed:
        return
    listed.add(pid)
    for other in waiting.get(pid, []):
        yield from _below(other, depth + 1, waiting, by_pid, listed)
