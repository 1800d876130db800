"""What a plan pins: the state that the confirmed run must find again, one call for each kind of target."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from blocks.postgres.server import DIRECT, POOLED, Postgres
from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.guard.permit import Tolerance
from runbook.guard.pins import NO_ANSWER, digest
from runbook.report import Report
from runbook.units import size
from tasks.postgres.server.server import read_position
from tasks.redis.cache.flushing import TOLERANCE
from tasks.redis.server import read_progress

KEY_TOLERANCE = Tolerance(TOLERANCE)
SIZE_TOLERANCE = Tolerance(0.1, least=1_000_000)


def pin_database(report: Report, postgres: Postgres, *, replaced: bool = False, up: bool = True) -> None:
    """Pin the live database's OID, its cluster and timeline.

    `replaced`: writes after the plan are lost, so the WAL position is pinned too. `up=False` pins that the server is
    down: its start is a change.
    """
    name, found = f"database {postgres.database}", None
    with contextlib.suppress(OpsError):
        found = read_position(postgres, postgres.database) if up else None
    if found is None:
        report.pin_state(name, NO_ANSWER, lost=replaced)
        return
    if found.pooled:
        report.fail(
            "[postgres] is PostgreSQL itself",
            DIRECT,
            value=f"a connection pooler: {POOLED}",
            expected="a direct connection",
        )
    report.pin_state(name, f"OID {found.oid or 'none'}", lost=replaced)
    report.pin_state("WAL", f"{found.system}/{found.timeline}", written=found.lsn if replaced else -1, lost=replaced)


def pin_redis(report: Report, block: Redis, *, replaced: bool = False) -> None:
    """Pin the running Redis server by its run id.

    `replaced`: writes after the plan are lost, so the replication offset is pinned too. A server that never had a
    replica has no offset.
    """
    name = f"Redis {block.address}"
    try:
        found = read_progress(block)
    except OpsError:
        report.pin_state(name, NO_ANSWER, lost=replaced)
        return
    report.pin_state(name, f"run {found.run_id}", written=found.offset if replaced else -1, lost=replaced)


def pin_deleted(report: Report, what: str, items: Iterable[tuple[object, int]]) -> None:
    """Pin everything that will be deleted: names (or ids) with bytes."""
    rows = sorted((str(name), number) for name, number in items)
    total = size(sum(number for _, number in rows))
    report.pin_state(what, f"{len(rows)}, {total}, {digest(rows)}", items=[digest([row]) for row in rows])


def pin_copies(report: Report, items: Iterable[tuple[object, int]]) -> None:
    """Pin the databases, tables or directories that will be deleted, each by name and bytes.

    Vacuum and hint bits change a size a little. A larger change means that somebody still writes to the copy.
    """
    rows = [(str(name), number) for name, number in items]
    report.pin_state(
        "copies", f"{len(rows)}, {digest(sorted(name for name, _ in rows))}", items=[digest([name]) for name, _ in rows]
    )
    for name, number in rows:
        report.pin_state(f"bytes of {name}", number, tolerance=SIZE_TOLERANCE)


def pin_keys(report: Report, where: str, keys: int) -> None:
    """Pin the number of Redis keys that will be deleted: it may differ by KEY_TOLERANCE."""
    report.pin_state(f"keys in {where}", keys, tolerance=KEY_TOLERANCE)


def pin_paths(report: Report, what: str, *paths: Path | str) -> None:
    """Pin the files or directories at some paths by device and inode: both change when one is replaced."""
    report.pin_state(what, ", ".join(map(_identity, paths)), lost=True)


def _identity(path: Path | str) -> str:
    try:
        found = Path(path).stat()
    except OSError:
        return "none"
    return f"{found.st_dev}:{found.st_ino}"
