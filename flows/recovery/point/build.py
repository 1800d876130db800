"""The copy beside, and the proof that it stands where it was told to, called with the open report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blocks.environment import Environment
from flows.database.base_backup import wal_of
from flows.recovery.point.choice import Origin
from flows.recovery.point.target import epochs
from runbook.errors import OTHER_BACKUPS, OpsError
from runbook.failpoint import failpoint
from runbook.kinds import action
from runbook.report import Report
from tasks.cluster.copy import Built, build_instance
from tasks.cluster.instance import Instance
from tasks.cluster.recovery import read_standing
from tasks.cluster.target import Stop
from tasks.postgres.content.content import read_counts
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import Link
from tasks.wal.archive.fetch import fetch_histories
from tasks.wal.format.names import lsn_text


def build(env: Environment, instance: Instance, origin: Origin, links: Sequence[Link], wal: Path) -> Built:
    """The data directory of the base backup, with all the WAL up to the target in its `pg_wal`."""
    built = build_instance(instance, origin.whole, wal=wal_of(env))
    place_wal.after(built)(instance, origin.archive, links, wal)
    return built


@action(idempotent=True)
def place_wal(instance: Instance, archive: Archive, links: Sequence[Link], wal: Path) -> int:
    """Fetched segments, and every history, into the copy's `pg_wal`: PostgreSQL replays them from there. Not more of
    them than the target needs. Returns how many.

    Raises:
        VerificationFailed: a history is damaged.
    """
    with told(instance.wal):
        for link in links:
            if (source := wal / link.segment.name).exists():
                source.replace(instance.wal / link.segment.name)
        failpoint("cluster: WAL placed")
    fetch_histories(archive, instance.wal)
    return len(links)


def prove(report: Report, env: Environment, instance: Instance, origin: Origin, stop: Stop) -> None:
    """What the paused copy says: it is this cluster, isolated, and stands exactly between the two transactions.

    Raises:
        RunbookFailed: it does not. Nothing live was touched.
    """
    found = read_standing(instance, stop, epochs(origin, stop))
    content = origin.content
    report.require(
        "isolation of the copy",
        not found.isolation,
        "do not use it: it could reach into production",
        value="; ".join(found.isolation) or "no archiving, no streaming, no subscriptions, own port",
    )
    report.require(
        "cluster of the copy",
        found.system == content.system,
        "the base backup is another cluster's",
        value=found.system,
        expected=content.system,
    )
    begin = stop.before.lsn if stop.before else content.stop - 1
    reached = begin < found.replayed and (not stop.lsn or stop.inclusive or found.replayed <= stop.lsn)
    report.require(
        "the copy stands at the target",
        found.paused and reached,
        "look at its log; nothing live was touched",
        value=f"replayed up to {lsn_text(found.replayed)}",
        expected=f"up to {lsn_text(stop.lsn)}",
    )
    if stop.before:
        report.require(
            f"the last transaction before the target ({stop.before.xid}) is there",
            found.before == "committed",
            f"nothing live was touched; {OTHER_BACKUPS}",
            value=found.before,
            expected="committed",
        )
    else:
        report.fact("the last transaction before the target", "none was committed since the base backup")
    if stop.after:
        report.require(
            f"the first transaction after the target ({stop.after.xid}) is not there",
            found.after in ("in progress", "not begun", "aborted"),
            "nothing live was touched; name the target by LSN",
            value=found.after,
            expected="not committed",
        )
    else:
        report.fact("the first transaction after the target", "there is none: it is the archive's end")
    report.fail_if_critical()
    _compare(report, env, instance)


def _compare(report: Report, env: Environment, instance: Instance) -> None:
    """For people: what would change. A live server that is down stands in nobody's way."""
    copy = dict(read_counts(instance.postgres, instance.postgres.database).rows)
    try:
        live: dict[str, int] = dict(read_counts.work(env.postgres, env.postgres.database).rows)
    except OpsError:
        live = {}
    names = sorted({*copy, *live})
    report.table(
        "Rows in the copy and in the live database",
        ("table", "copy", "live"),
        [(name, copy.get(name, "no such table"), live.get(name, "not known") if live else "down") for name in names],
    )
    report.prefer(
        "the application's database is in the copy",
        bool(copy) or not live,
        "look at the copy's log",
        value=f"{len(copy)} tables",
    )
