"""Today's figures, for the trends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from flows.routine.page import Page
from flows.routine.sources.places import read_places
from flows.routine.sources.traffic import Traffic
from flows.routine.sources.trends import Figure
from runbook.kinds import probe
from runbook.units import size
from tasks.logs.reading.files import find_logs
from tasks.postgres.sessions.connections import read_activity
from tasks.redis.memory.info import read_memory
from tasks.redis.sentinels import master_by, read_sentinels


@probe
def read_database_bytes(postgres: Postgres) -> int:
    """The size of the environment's database."""
    with postgres.connect(postgres.database) as connection:
        return int(execute(connection, "SELECT pg_database_size(current_database())")[0][0])


def read_figures(page: Page, traffic: Traffic | None) -> list[Figure]:
    """The figures of every part that answers."""
    figures = [*_of_traffic(traffic)] if traffic else []
    for part, read in _READ.items():
        if part == "host" or page.env.has(part):
            figures += page.part(f"figures of {part}", lambda read=read: list(read(page.env))) or []  # type: ignore[misc]
    return figures


def _of_traffic(found: Traffic) -> Iterator[Figure]:
    if found.reaches:  # otherwise the number of days is unknown
        days = max((found.until - found.since).days, 1)
        yield Figure("requests a day", found.use.count / days, f"{found.use.count / days:,.0f}", unit="a day")
    yield Figure("response time, p95 (ms)", found.use.p95, f"{found.use.p95:,.0f} ms", unit="ms")
    yield Figure("failed requests", found.use.error_ratio, f"{found.use.error_ratio:.2%}", unit="ratio")


def _of_database(env: Environment) -> Iterator[Figure]:
    taken = read_database_bytes(env.postgres)
    yield Figure("database", taken, size(taken), unit="B")
    activity = read_activity(env.postgres)
    yield Figure(
        "connections in use", activity.used_ratio, f"{activity.used_ratio:.0%} of {activity.limits.most}", 1.0, "ratio"
    )


def _of_redis(env: Environment) -> Iterator[Figure]:
    memory = read_memory(master_by(env.redis, read_sentinels(env.redis)))
    yield Figure("Redis' memory", memory.used, size(memory.used), float(memory.limit), "B")
    yield Figure("Redis' keys", memory.keys, f"{memory.keys:,}", unit="keys")


def _of_logs(env: Environment) -> Iterator[Figure]:
    taken = sum(file.bytes for file in find_logs(Path(env.logs.need("app"))))
    yield Figure("logs of the application", taken, size(taken), unit="B")


def _of_host(env: Environment) -> Iterator[Figure]:
    for one in read_places(env)[0]:
        yield Figure(f"disk of {one.what[0]}", one.used_ratio, f"{one.used_ratio:.1%}", 0.95, "ratio")


_READ: dict[str, Callable[[Environment], Iterator[Figure]]] = {
    "postgres": _of_database,
    "redis": _of_redis,
    "logs": _of_logs,
    "host": _of_host,
}
