"""Every recovery point of an environment, gathered once for those who judge them and those who show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from runbook import clock
from runbook.errors import OpsError
from runbook.report import Report
from runbook.units import size
from tasks.backups.retention import Stored, read_stores
from tasks.postgres.replication.incident_slot import SLOT
from tasks.postgres.replication.status import read_replication
from tasks.recovery_points.backups import KINDS, backup_points, bad_newest, is_beside, place_for
from tasks.recovery_points.database import read_standby_point, read_wal_points, read_written
from tasks.recovery_points.estimate import Estimate, Sample, estimate
from tasks.recovery_points.following import read_replica_point, read_unchanged, unchanged_since
from tasks.recovery_points.point import Danger, Point, Resource, best_of
from tasks.recovery_points.samples import read_samples
from tasks.recovery_points.wal import Written

OPTIONS = "show-recovery-options lists every way with its form"
RESOURCES: tuple[Resource, ...] = get_args(Resource)


@dataclass(frozen=True)
class Reach:
    """Every point, as of `now`; what the stores hold (or why they cannot be listed), by set and resource; how far the
    primary has written; and how long past recoveries took."""

    now: datetime
    points: tuple[Point, ...]
    stored: Mapping[tuple[Stores, Resource], Stored | OpsError]
    written: Written
    samples: Mapping[str, Sequence[Sample]]

    def of(self, resource: Resource, danger: Danger) -> list[Point]:
        """What is a means for a resource in a danger."""
        return [point for point in self.points if point.resource == resource and point.serves(danger)]

    def best(self, resource: Resource, danger: Danger) -> Point | None:
        """The newest of them."""
        return best_of(self.of(resource, danger))

    def estimate(self, point: Point) -> Estimate | None:
        """How long that would take; None where it was never measured."""
        return estimate(self.samples.get(point.way, ()), point.bytes)

    def estimate_everything(self, points: Sequence[Point]) -> Estimate | None:
        """How long a full restore from these backups would take."""
        return estimate(self.samples.get("everything backup", ()), sum(point.bytes for point in points))


def resources_of(env: Environment) -> tuple[Resource, ...]:
    """What of an environment can be lost."""
    files = env.has("application") and bool(env.application.directory)
    has = {"database": env.has("postgres"), "redis": env.has("redis"), "files": files}
    return tuple(resource for resource in RESOURCES if has[resource])


def sets_of(env: Environment) -> tuple[Stores, ...]:
    """The first and, where there is one, the second set of stores."""
    return tuple(which for which in get_args(Stores) if env.has(which))


def read_reach(env: Environment) -> Reach:
    """Ask everything there is, beside each other. Whatever does not answer is part of the result."""
    resources, places = resources_of(env), [(w, r) for w in sets_of(env) for r in resources_of(env)]
    written = read_written(env) if "database" in resources else Written(clock.now())
    standby = read_standby_point.submit(env, written) if env.has("standby") else None
    wal = [read_wal_points.submit(env, written, which) for which in sets_of(env) if "database" in resources]
    replica = read_replica_point.submit(env) if "redis" in resources else None
    unchanged = read_unchanged.submit(env.application) if "files" in resources else None
    samples = read_samples.submit(Path(env.reports_directory), env.name)
    listed = read_stores([place_for(env, resource, which) for which, resource in places], env.name)
    stored = dict(zip(places, listed, strict=True))
    points = [standby.result()] if standby else []
    points += [point for found in wal for point in found.result()]
    for (which, resource), found in stored.items():
        beside = is_beside(env, resource, which, [KINDS[resource]])
        kept = timedelta(hours=env.stores(which).keep.hours)
        of_backups = [replace(point, beside=beside) for point in backup_points(resource, which, found, kept)]
        points += unchanged_since(of_backups, *unchanged.result()) if unchanged and resource == "files" else of_backups
    if replica and (point := replica.result()):
        points.append(point)
    return Reach(written.asked, tuple(points), stored, written, samples.result())


def _judge_slots(report: Report, env: Environment) -> None:
    """Slots that nobody reads keep WAL on the primary only: that is no recovery point, and fills its disk."""
    try:
        slots = read_replication(env.postgres).slots
    except OpsError as error:
        report.warn("slots of the primary", error.hint, value=error.message)
        return
    for slot in slots:
        if slot.active or slot.synced or slot.wal_status == "reserves nothing":
            continue
        drop = f"start its consumer, or drop it: SELECT pg_drop_replication_slot('{slot.name}')"
        hint = "find-transaction reads it there; release-containment drops it" if slot.name == SLOT else drop
        kept = "it has lost its WAL" if slot.wal_status == "lost" else f"it keeps {size(slot.held_bytes)} of WAL"
        report.warn(
            f"slot {slot.name}",
            f"{hint}; check-replication tells how long the disk lasts",
            value=f"nobody reads it; {kept}, which is no recovery point: it goes with the primary",
        )


def judge_sources(report: Report, env: Environment, reach: Reach) -> None:
    """What the points come from: whatever is missing, stands still, is damaged or cannot be read."""
    written = reach.written
    if not written.end and written.problem:
        report.warn("the primary", f"losses are counted from what is known; {OPTIONS}", value=written.problem)
    elif env.has("wal") and env.wal.name not in (written.streams or {}):
        report.warn(
            "the receiver of WAL",
            f"look at the log of {env.wal.service}, and start it: until then the loss grows",
            value="it does not stream",
        )
    if written.end:
        _judge_slots(report, env)
    for point in reach.points:
        expected_wal = point.means != "point in time" or env.has("wal")
        if point.problem and expected_wal:
            report.warn(f"{point.resource} by {point.told}", point.hint, value=point.problem)
    for (which, resource), stored in reach.stored.items():
        if isinstance(stored, OpsError):
            continue
        if bad := bad_newest(stored):
            report.warn(
                f"newest backup of {resource} in {which}",
                "its report says why; take another, and verify it",
                value=f"{bad.name} did not stand its proof ({bad.failed})",
            )
        if ahead := stored.from_the_future():
            report.warn(
                f"clock, by the backups of {resource} in {which}",
                "correct the clock of who took them: they are not counted",
                value=f"of the future: {', '.join(ahead[:3])}",
            )
