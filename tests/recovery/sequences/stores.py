"""The places where a ledger's writes go: a database of the cluster, Redis, and the files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import redis

from tests.fixtures.postgres.writes import break_off
from tests.recovery.sequences.ledger import PROBE, Content, Outcome, Write

TABLES = """
CREATE TABLE kv (key int PRIMARY KEY, attempt bigint NOT NULL, value text NOT NULL);
CREATE TABLE attempts (attempt bigint PRIMARY KEY);
"""
_UPSERT = """
WITH noted AS (INSERT INTO attempts VALUES (%(attempt)s))
INSERT INTO kv VALUES (%(key)s, %(attempt)s, %(value)s)
ON CONFLICT (key) DO UPDATE SET attempt = EXCLUDED.attempt, value = EXCLUDED.value
"""
_DELETE = """
WITH noted AS (INSERT INTO attempts VALUES (%(attempt)s))
DELETE FROM kv WHERE key = %(key)s
"""
_NOTE = "INSERT INTO attempts VALUES (%(attempt)s)"
_WAITED = "wait for synchronous replication"  # cancelled: the server answers as if it were on the standby
SECONDS = 8.0


@contextlib.contextmanager
def given_up_after(session: psycopg.Connection[Any], seconds: float = SECONDS) -> Iterator[None]:
    """Break a session off whose answer does not come: no timeout of the server ends a commit that waits for a standby."""
    timer = threading.Timer(seconds, lambda: break_off(session))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def value_of(attempt: int) -> str:
    """Long enough that a damaged row shows."""
    return f"value of attempt {attempt} " * 4


class DatabaseStore:
    """A database of whichever server takes writes. `address`: gives the connection string of a session."""

    def __init__(self, name: str, address: Callable[[], str]) -> None:
        self.name, self.address = name, address
        self._session: psycopg.Connection[Any] | None = None
        self._notices: list[str] = []

    def session(self) -> psycopg.Connection[Any]:
        """The open session, or a new one."""
        if self._session is None or self._session.closed:
            self._session = psycopg.connect(self.address(), autocommit=True, connect_timeout=5)
            self._session.add_notice_handler(lambda notice: self._notices.append(str(notice.message_primary)))
        return self._session

    def send(self, write: Write) -> Outcome:
        """One transaction."""
        self._notices.clear()
        values = {"attempt": write.attempt, "key": write.key, "value": value_of(write.attempt)}
        try:
            session = self.session()
        except psycopg.Error as error:
            write.error = f"log-in: {error!r}"
            return "refused"  # nothing was sent
        try:
            with given_up_after(session):
                session.execute(_NOTE if write.key == PROBE else _DELETE if write.deletes else _UPSERT, values)
        except (psycopg.OperationalError, psycopg.InterfaceError):  # also a session that was broken off
            self.close()
            return "indeterminate"
        except psycopg.Error as error:
            if error.sqlstate:
                write.error = f"{error!r}"
                return "refused"
            self.close()  # libpq's own error: the connection ended
            return "indeterminate"
        return "indeterminate" if any(_WAITED in one for one in self._notices) else "acknowledged"

    def close(self) -> None:
        """Leave."""
        if self._session:
            with contextlib.suppress(psycopg.Error):
                self._session.close()
        self._session = None

    def read(self) -> Content | None:
        """By sequential scan and by index: an index that lacks rows shows as a difference."""
        try:
            with (
                psycopg.connect(self.address(), autocommit=True, connect_timeout=5) as session,
                given_up_after(session),
            ):
                attempts = session.execute("SELECT attempt FROM attempts").fetchall()
                found = session.execute("SELECT to_regclass('public.kv')").fetchone()
                rows = session.execute("SELECT key, attempt, value FROM kv").fetchall() if found and found[0] else []
                session.execute("SET enable_seqscan = off")
                indexed = session.execute("SELECT count(*) FROM attempts WHERE attempt > 0").fetchall()[0][0]
        except psycopg.Error:
            return None
        bad = [row for row in rows if row[2] != value_of(row[1])]
        assert not bad, f"{self.name}: rows whose value is not the client's: {bad[:3]}"
        assert indexed == len(attempts), f"{self.name}: the index has {indexed} of {len(attempts)} rows"
        return Content({key: attempt for key, attempt, _ in rows}, frozenset(row[0] for row in attempts))


class RedisStore:
    """Redis: one key per value. `client`: gives a connection."""

    def __init__(self, name: str, client: Callable[[], redis.Redis]) -> None:
        self.name, self.client = name, client

    def send(self, write: Write) -> Outcome:
        """One command."""
        try:
            client = self.client()
            if write.deletes:
                client.delete(f"kv:{write.key}")
            else:
                client.set(f"kv:{write.key}", write.attempt)
        except (redis.ConnectionError, redis.TimeoutError):
            return "indeterminate"
        except redis.RedisError:
            return "refused"
        return "acknowledged"

    def read(self) -> Content | None:
        """Every key."""
        try:
            client = self.client()
            keys = sorted(client.scan_iter("kv:*", count=1000))
            values = client.mget(keys) if keys else []
        except redis.RedisError:
            return None
        return Content({int(key.split(b":")[1]): int(value) for key, value in zip(keys, values, strict=True)})


class FilesStore:
    """The application's files: one upload per key."""

    def __init__(self, name: str, uploads: Path) -> None:
        self.name, self.uploads = name, uploads

    def send(self, write: Write) -> Outcome:
        """One file."""
        if not self.uploads.is_dir():
            return "refused"
        path = self.uploads / f"{write.key}.txt"
        path.unlink(missing_ok=True)
        if not write.deletes:
            path.write_text(value_of(write.attempt))
        return "acknowledged"

    def read(self) -> Content | None:
        """Every file."""
        if not self.uploads.is_dir():
            return None
        found = {int(path.stem): path.read_text() for path in self.uploads.iterdir()}
        rows = {key: int(text.split()[3]) for key, text in found.items()}
        bad = [key for key, attempt in rows.items() if found[key] != value_of(attempt)]
        assert not bad, f"{self.name}: files whose content is not the client's: {bad[:3]}"
        return Content(rows)
