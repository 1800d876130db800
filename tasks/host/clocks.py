"""Other hosts' clocks against this host's: the database's, a store's and Prefect's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import httpx
from prefect.settings import PREFECT_API_URL

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from runbook import clock
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.application.health import health_checks
from tasks.s3.requests import attempt
from tasks.stores.bucket import BucketStore
from tasks.stores.directory import DirectoryStore
from tasks.stores.store import Store

ANSWER_SECONDS = 3.0


@dataclass(frozen=True)
class Skew:
    """By how many seconds this host's clock is ahead of another one; None: it could not be read."""

    of: str
    ahead_seconds: float | None

    @property
    def is_over(self) -> bool:
        """Whether ages measured with this host's clock are wrong."""
        return self.ahead_seconds is not None and abs(self.ahead_seconds) > clock.MOST_SKEW_SECONDS


@probe
def read_skews(postgres: Sequence[Postgres], stores: Sequence[Store]) -> tuple[Skew, ...]:
    """The offset of each server, each store, and Prefect if its address is known. A clock that does not answer is not
    read again, and blocks nothing."""
    asked: list[tuple[str, Callable[[], datetime]]] = [
        *((f"PostgreSQL at {one.host}:{one.port}", lambda one=one: _of_database(one)) for one in postgres),
        *((one.where, lambda one=one: _of_store(one)) for one in stores),
    ]
    if address := PREFECT_API_URL.value():
        asked.append(("Prefect", lambda: _of_prefect(address)))
    return tuple(Skew(of, _ahead(read)) for of, read in asked)


@probe
def read_service_skews(env: Environment) -> tuple[Skew, ...]:
    """The offset of each database server, and of each part of the application with HTTP, by the Date header (whole
    seconds)."""
    asked: list[tuple[str, Callable[[], datetime]]] = [
        (f"PostgreSQL at {one.host}:{one.port}", partial(_of_database, one)) for one in env.nodes()
    ]
    checks = health_checks(env.application)
    asked += [(check.role, partial(_of_answer, check.target)) for check in checks if check.kind == "path"]
    return tuple(Skew(of, _ahead(read)) for of, read in asked)


def _ahead(read: Callable[[], datetime]) -> float | None:
    """The offset, if the other clock was read between two readings of this one."""
    before = clock.of_host()
    try:
        other = read()
    except (OpsError, OSError, httpx.HTTPError, KeyError, ValueError):
        return None
    return (before + (clock.of_host() - before) / 2 - other).total_seconds()


def _of_database(postgres: Postgres) -> datetime:
    with postgres.connect(seconds=int(ANSWER_SECONDS)) as connection:
        moment: datetime = execute(connection, "SELECT clock_timestamp()")[0][0]
    return moment


def _of_store(store: Store) -> datetime:
    """A bucket's clock by the Date header; a directory's by the time of a new file, which a mount's server sets."""
    if isinstance(store, BucketStore):
        bucket = store.bucket
        answer = attempt(bucket, "its clock", lambda: bucket.client().head_bucket(Bucket=bucket.bucket))
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    assert isinstance(store, DirectoryStore)
    with tempfile.NamedTemporaryFile(prefix=".clock-", dir=store.path) as file:
        file.write(b"x")
        file.flush()
        return datetime.fromtimestamp(Path(file.name).stat().st_mtime, UTC)


def _of_prefect(address: str) -> datetime:
    return _of_answer(f"{address}/health")


def _of_answer(url: str) -> datetime:
    answer = httpx.get(url, timeout=ANSWER_SECONDS, trust_env=False)
    return parsedate_to_datetime(answer.headers["date"])
