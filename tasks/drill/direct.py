"""A client that writes directly to the database: versioned values by key, and deletes."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Self

import psycopg
from psycopg.errors import Diagnostic

from blocks.postgres import nodes
from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OpsError
from tasks.drill.ledger import WriteLedger

Servers = Callable[[], Sequence[Postgres]]
KEYS, PUTS = 8, 4
RETRY_SECONDS = 0.1
END_SECONDS = 2.0
_CREATE = """
CREATE TABLE IF NOT EXISTS public.interview_ops_drill (key text PRIMARY KEY, version bigint NOT NULL,
                                                       attempt text NOT NULL)
"""
_PUT = """
INSERT INTO public.interview_ops_drill (key, version, attempt) VALUES (%s, %s, %s)
ON CONFLICT (key) DO UPDATE SET version = EXCLUDED.version, attempt = EXCLUDED.attempt
"""
_DELETE = "DELETE FROM public.interview_ops_drill WHERE key = %s"


class DirectWriter:
    """Writes from its own thread while the block runs: one row a transaction, as administrator, on the server that
    accepts writes. Each key is put some times, then deleted, then put again.

    Every session has its own keys: a write after a fault must not hide a lost one. A key whose write was not answered
    is not used again, because its right value is unknown. A commit that waits for a standby is never cancelled.
    """

    def __init__(self, servers: Servers, database: str, ledger: WriteLedger, *, per_second: float = 20) -> None:
        self.ledger = ledger
        self._servers, self._database, self._pause = servers, database, 1 / per_second
        self._stop = threading.Event()
        self._session: Connection | None = None
        self._doubtful = False
        self._thread = threading.Thread(target=self._work, name="direct-writer", daemon=True)
        self._names = itertools.count(1)
        self._keys = list[str]()
        self._versions = dict[str, int]()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(END_SECONDS)
        if self._thread.is_alive() and self._session:
            _break(self._session)  # it waits for a standby: its write is indeterminate
        self._thread.join()
        self.ledger.close()

    def _new_key(self) -> str:
        return f"{self.ledger.prefix}{next(self._names)}"

    def _work(self) -> None:
        while not self._stop.is_set():
            for server in self._servers():
                with contextlib.suppress(OpsError, psycopg.Error):
                    self._write_on(server)
            self._stop.wait(RETRY_SECONDS)

    def _write_on(self, server: Postgres) -> None:
        with server.connect(self._database, seconds=nodes.ASK_SECONDS) as connection:
            if execute(connection, "SELECT pg_is_in_recovery()")[0][0]:
                return
            execute(connection, _CREATE)
            self._session = connection
            connection.add_notice_handler(self._notice)
            self._keys = [self._new_key() for _ in range(KEYS)]
            self._versions = dict.fromkeys(self._keys, 0)
            while not self._stop.is_set():
                for index in range(KEYS):
                    self._write(connection, index)
                    if self._stop.wait(self._pause):
                        return

    def _write(self, connection: Connection, index: int) -> None:
        key = self._keys[index]
        version = self._versions[key] + 1
        kind = "delete" if version > 1 and (version + index) % (PUTS + 1) == 0 else "put"
        attempt = self.ledger.intend(kind, key=key, version=version)
        self._doubtful = False
        try:
            if kind == "put":
                connection.execute(_PUT, [key, version, attempt])
            else:
                connection.execute(_DELETE, [key])
        except psycopg.Error as error:
            refused = bool(error.sqlstate) and not str(error.sqlstate).startswith("57") and not connection.closed
            self.ledger.answer(attempt, "refused" if refused else "indeterminate", why=first_line(error)[:200])
            if not refused:
                self._replace_key(index)
            raise
        self._versions[key] = version
        if self._doubtful:
            self.ledger.answer(attempt, "indeterminate", why="the server cancelled its wait for a standby")
            self._replace_key(index)
        else:
            self.ledger.answer(attempt, "acknowledged")

    def _replace_key(self, index: int) -> None:
        self._keys[index] = self._new_key()
        self._versions[self._keys[index]] = 0

    def _notice(self, notice: Diagnostic) -> None:
        """A cancelled wait for synchronous replication returns success with a warning."""
        self._doubtful = self._doubtful or notice.severity_nonlocalized == "WARNING"


def drop_table(postgres: Postgres, database: str) -> None:
    """Delete the client's table.

    Raises:
        Unreachable: the server is down.
    """
    with postgres.connect(database) as connection:
        execute(connection, "DROP TABLE IF EXISTS public.interview_ops_drill")


def _break(session: Connection) -> None:
    """Break the connection. A cancelled commit would answer as if the standby had it."""
    with contextlib.suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(session.fileno())) as broken:
        broken.shutdown(socket.SHUT_RDWR)
