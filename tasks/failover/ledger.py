"""Test writes through a failover, each with a number: which server acknowledged them, and which are present."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from blocks.postgres import nodes
from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.wait import until
from tasks.application import acknowledged
from tasks.application.acknowledged import LedgerEntry
from tasks.postgres.replication.synchronous import address

_TABLE = """
CREATE TABLE IF NOT EXISTS interview_ops_failover (run text, id bigint, at timestamptz DEFAULT now(),
                                                   PRIMARY KEY (run, id))
"""
_WRITE = "INSERT INTO interview_ops_failover (run, id) VALUES (%s, %s)"
END_SECONDS = 15.0
GAP_SECONDS = 0.01
RETRY_SECONDS = 0.02


@dataclass(frozen=True)
class WriteLoss(acknowledged.AcknowledgedWrites):
    """`indeterminate`: attempts without an answer."""

    indeterminate: int


class FailoverLedger:
    """Inserts numbers continuously, one per transaction, as administrator, on the server that takes writes.

    A context manager. Its table, in the maintenance database, is dropped at the end. A commit that waits for a standby
    is never cancelled: the ledger waits with it.
    """

    def __init__(self, servers: Sequence[Postgres]) -> None:
        self.entries: list[LedgerEntry] = []
        self.last_error = ""
        self._servers = list(servers)
        self._run, self._attempts = secrets.token_hex(4), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)

    def __enter__(self) -> FailoverLedger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the writes."""
        self._stop.set()
        self._thread.join(END_SECONDS)

    def find_first(self, server: str) -> LedgerEntry | None:
        """The first write that this server acknowledged."""
        return next((entry for entry in list(self.entries) if entry.server == server), None)

    def wait_for(self, server: str, seconds: float) -> LedgerEntry:
        """The first write that this server acknowledges.

        Raises:
            Unreachable: there was none in time.
        """
        found = until(
            lambda: self.find_first(server),
            what=f"a write that {server} acknowledges ({self.last_error or 'no error'})",
            seconds=seconds,
            every_seconds=0.005,
            hint="check its log, and synchronous_standby_names: a commit waits for the standbys listed there",
        )
        assert found
        return found

    def account(self, primary: Postgres) -> WriteLoss:
        """Stop, search for every acknowledged number, and drop the table.

        Raises:
            Unreachable: the primary is down.
        """
        self.stop()
        entries = tuple(self.entries)
        there: set[int] = set()
        with primary.connect() as connection:
            with contextlib.suppress(psycopg.errors.UndefinedTable):
                rows = execute(connection, "SELECT id FROM interview_ops_failover WHERE run = %s", self._run)
                there = {int(row[0]) for row in rows}
            if not self._thread.is_alive():  # else its own commit holds the table
                execute(connection, "DROP TABLE IF EXISTS interview_ops_failover")
        missing = frozenset(entry.number for entry in entries) - there
        return WriteLoss(entries, missing, self._attempts - len(entries))

    def _work(self) -> None:
        while not self._stop.is_set():
            for server in self._servers:
                with contextlib.suppress(OpsError, psycopg.Error):
                    self._write(server)
            self._stop.wait(RETRY_SECONDS)

    def _write(self, server: Postgres) -> None:
        try:
            with server.connect(seconds=nodes.ASK_SECONDS) as connection:
                if self._stop.is_set() or execute(connection, "SELECT pg_is_in_recovery()")[0][0]:
                    return
                execute(connection, _TABLE)
                while not self._stop.wait(GAP_SECONDS if self.entries else 0):
                    self._attempts += 1
                    execute(connection, _WRITE, self._run, self._attempts)
                    self.entries.append(LedgerEntry(self._attempts, time.monotonic(), address(server)))
        except (OpsError, psycopg.Error) as error:
            self.last_error = str(error).strip().splitlines()[0][:200]
            raise
