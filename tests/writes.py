"""Clients that insert rows all the time, and keep account of what they were told."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from runbook.wait import until

PACE_SECONDS = 0.001
"""Between two rows: without a pause the clients use a processor of their own, which the servers need."""
TABLE = "CREATE TABLE IF NOT EXISTS writes (id bigint PRIMARY KEY, at timestamptz DEFAULT now())"


@dataclass
class Writes:
    """What a client was told. Ids of the rows of `writes`: an attempt that is not acknowledged is indeterminate."""

    attempted: list[int] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)

    def wait(self, more: int) -> None:
        """Until so many more are acknowledged."""
        wanted = len(self.acknowledged) + more
        until(lambda: len(self.acknowledged) >= wanted, what=f"{more} acknowledged writes", seconds=120)

    def lost(self, found: Sequence[tuple[Any, ...]]) -> set[int]:
        """Acknowledged, and not in what `SELECT id FROM writes` found."""
        return set(self.acknowledged) - {row[0] for row in found}


@contextlib.contextmanager
def writing(dsn: str, sessions: int) -> Iterator[Writes]:
    """Insert into the table `writes` while the block runs, one row a transaction. A session that breaks is opened again;
    one that waits for its commit when the block is left is broken off."""
    writes, stop, numbers = Writes(), threading.Event(), itertools.count(1)
    opened: list[psycopg.Connection[Any]] = []

    def work() -> None:
        while not stop.is_set():
            with contextlib.suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True, connect_timeout=2) as it:
                opened.append(it)
                while not stop.wait(PACE_SECONDS):
                    number = next(numbers)
                    writes.attempted.append(number)
                    it.execute("INSERT INTO writes (id) VALUES (%s)", [number])
                    writes.acknowledged.append(number)
            stop.wait(0.05)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(sessions)]
    for thread in threads:
        thread.start()
    try:
        yield writes
    finally:
        stop.set()
        for thread in threads:
            thread.join(2)
        for session in opened:
            _break(session)  # it waits for a standby, perhaps for ever: its row is indeterminate
        for thread in threads:
            thread.join(30)


def _break(session: psycopg.Connection[Any]) -> None:
    """As when the client dies. Cancelled, a commit that waits would answer as if it were on the standby."""
    with contextlib.suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(session.fileno())) as broken:
        broken.shutdown(socket.SHUT_RDWR)
