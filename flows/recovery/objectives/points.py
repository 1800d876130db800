"""Every recovery point of an environment, read once for the checks and pages that use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from runbook import clock
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.backups.retention import StoredBackup, read_stores
from tasks.postgres.replication.incident_slot import SLOT
from tasks.postgres.replication.status import read_replication
from tasks.recovery_points.backups import KINDS, backup_points, bad_newest, is_beside, place_for
from tasks.recovery_points.database import read_standby_point, read_wal_points, read_written
from tasks.recovery_points.estimate import ON_PRIVATE_SERVER, DurationEstimate, DurationSample, estimate, from_private
from tasks.recovery_points.following import read_replica_point, read_unchanged, unchanged_since
from tasks.recovery_points.point import Danger, Point, Resource, best_of
from tasks.recovery_points.samples import read_samples
from tasks.recovery_points.wal import WrittenWal
from tasks.redis.position import keep_position

SHOW_OPTIONS = (Next("show-recovery-options", "compare every recovery option"),)
RESOURCES: tuple[Resource, ...] = get_args(Resource)


@dataclass(frozen=True)
class RecoveryPoints:
    """Every point as of `now`; what each store contains, or why it cannot be listed; how far the primary has written;
    the durations of past recoveries."""

    now: datetime
    points: tuple[Point, ...]
    stored: Mapping[tuple[Stores, Resource], StoredBackup | OpsError]
    written: WrittenWal
    samples: Mapping[str, Sequence[DurationSample]]

    def of(self, resource: Resource, danger: Danger) -> list[Point]:
        """The points from which a resource can be restored in a danger."""
        return [point for point in self.points if point.resource == resource and point.serves(danger)]

    def best(self, resource: Resource, danger: Danger) -> Point | None:
        """The newest of them."""
        return best_of(self.of(resource, danger))

    def estimate(self, point: Point) -> DurationEstimate | None:
        """How long a recovery from this point takes; None: never measured."""
        private = self.samples.get(f"{point.way}{ON_PRIVATE_SERVER}", ())
        return estimate(self.samples.get(point.way) or from_private(private), point.bytes)

    def estimate_everything(self, points: Sequence[Point]) -> DurationEstimate | None:
        """How long a full restore from these backups takes; None: never measured."""
        return estimate(self.samples.get("everything backup", ()), sum(point.bytes for point in points))


def resources_of(env: Environment) -> tuple[Resource, ...]:
    """The resources of an environment that can be lost."""
    files = env.has("application") and bool(env.application.directory)
    has = {"database": env.has("postgres"), "redis": env.has("redis"), "files": files}
    return tuple(resource for resource in RESOURCES if has[resource])


def sets_of(env: Environment) -> tuple[Stores, ...]:
    """The backup stores, and the replica stores if there are any."""
    return tuple(which for which in get_args(Stores) if env.has(which))


def read_recovery_points(env: Environment) -> RecoveryPoints:
    """Query every source in parallel. A source that does not answer is part of the result."""
    resources, places = resources_of(env), [(w, r) for w in sets_of(env) for r in resources_of(env)]
    written = read_written(env) if "database" in resources else WrittenWal(clock.now())
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
        keep_position(env.redis, env.reports_directory)
    return RecoveryPoints(written.asked, tuple(points), stored, written, samples.result())


def _judge_slots(report: Report, env: Environment) -> None:
    """An unused slot keeps WAL on the primary only: that is not a recovery point, and it fills the disk."""
    try:
        slots = read_replication(env.postgres).slots
    except OpsError as error:
        report.warn("slots of the primary", error.hint, value=error.message)
        return
    for slot in slots:
        if slot.active or slot.synced or slot.wal_status == "reserves nothing":
            continue
        ours = slot.name == SLOT
        hint = f"start its consumer, or drop it: SELECT pg_drop_replication_slot('{slot.name}')"
        kept = "it has lost its WAL" if slot.wal_status == "lost" else f"it keeps {size(slot.held_bytes)} of WAL"
        report.warn(
            f"slot {slot.name}",
            "release-containment drops it when the incident is over" if ours else hint,
            value=f"it is not in use; {kept}, which is lost with the primary and therefore no recovery point",
            follow=[
                Next("check-replication", "see how long the disk lasts"),
                *([Next("release-containment", "end the containment")] if ours else []),
            ],
        )


def judge_sources(report: Report, env: Environment, reach: RecoveryPoints) -> None:
    """The sources of the points: missing, stopped, damaged or unreadable ones."""
    written = reach.written
    if not written.end and written.problem:
        report.warn(
            "the primary",
            "choose a recovery option; losses are counted up to the last known write",
            value=written.problem,
            follow=SHOW_OPTIONS,
        )
    elif env.has("wal") and env.wal.name not in (written.streams or {}):
        report.warn(
            "the WAL receiver",
            f"check the log of {env.wal.service}, and start it",
            value="it does not stream: the loss grows",
        )
    if written.end:
        _judge_slots(report, env)
    for point in reach.points:
        expected_wal = point.means != "point in time" or env.has("wal")
        if point.problem and expected_wal:
            report.warn(f"recovery of {point.resource} by {point.told}", point.hint, value=point.problem)
    for (which, resource), stored in reach.stored.items():
        if isinstance(stored, OpsError):
            continue
        if bad := bad_newest(stored):
            report.warn(
                f"newest backup of {resource} in {which}",
                "take another backup and verify it; the report of verify-backup has the cause",
                value=f"{bad.name} failed its verification ({bad.failed})",
            )
        if ahead := stored.from_the_future():
            report.warn(
                f"clock of the backups of {resource} in {which}",
                "correct the clock of the host that took them",
                value=f"taken in the future, not counted: {', '.join(ahead[:3])}",
            )
