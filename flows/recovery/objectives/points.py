"""Every recovery point of an environment, read once for the checks and pages that use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from flows.recovery import gate
from runbook import clock
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.backups.retention import StoredBackup, read_stores
from tasks.postgres.replication.incident_slot import SLOT
from tasks.postgres.replication.status import read_replication
from tasks.recovery_points.backups import KINDS, backup_points, bad_newest, is_beside, place_for
from tasks.recovery_points.database import read_standby_point, read_wal_points, read_written, survives_with_tail
from tasks.recovery_points.estimate import ON_PRIVATE_SERVER, DurationEstimate, DurationSample, estimate, from_private
from tasks.recovery_points.following import read_replica_point, read_unchanged, unchanged_since
from tasks.recovery_points.point import Danger, Means, Place, Point, Resource, best_of
from tasks.recovery_points.samples import read_samples
from tasks.recovery_points.wal import WrittenWal
from tasks.redis.position import keep_position
from tasks.redis.restore import survivors

SHOW_OPTIONS = (Next("show-recovery-options", "compare every recovery option"),)
REDIS, FILES = survivors.PART, "the files"
RESOURCES: tuple[Resource, ...] = get_args(Resource)


@dataclass(frozen=True)
class RecoveryPoints:
    """Every point as of `now`; what each store contains, or why it cannot be listed; how far the primary has written;
    the durations of past recoveries.

    `parts`: the resources' names in reports. `unwaited`: why acknowledged commits may be only on the database's server,
    "" where they wait for these means; others receive them later. `at_end`: the loss of a recovery to the end of the
    WAL now; None: by its points."""

    now: datetime
    points: tuple[Point, ...]
    stored: Mapping[tuple[Stores, Resource], StoredBackup | OpsError]
    written: WrittenWal
    samples: Mapping[str, Sequence[DurationSample]]
    parts: Mapping[Resource, str]
    unwaited: Mapping[tuple[Means, Place], str]
    at_end: Loss | None

    def loss(self, point: Point, danger: Danger) -> Loss:
        """The loss of a recovery from this point in a danger. What a lost server acknowledged and did not send yet is
        unknown, or bounded, also while everything is sent."""
        if (at_end := self._loss_at_end(point)) and at_end.unknown:
            return at_end
        loss = point.loss(self.parts[point.resource], self.now)
        if danger == "data corrupted" or point.means == "backup" or not point.at:
            return loss
        unwaited = self.unwaited.get((point.means, point.place)) if danger == "server lost" else None
        if unwaited:
            return Loss.not_known(loss.part, unwaited)
        return Loss.at_most_since(loss.part, point.at) if unwaited is None and loss.is_none else loss

    def loss_now(self, point: Point) -> Loss:
        """The loss of a recovery from this point now, as its runbook's plan states it. A recovery to the end of the WAL
        also has what is only on the live server; a planned failover waits for the standby."""
        if at_end := self._loss_at_end(point):
            return at_end
        if point.means != "standby":
            return self.loss(point, "data corrupted")
        is_planned = bool(self.written.end) and point.at is not None
        return Loss(self.parts[point.resource]) if is_planned else self.loss(point, "server lost")

    def _loss_at_end(self, point: Point) -> Loss | None:
        """The gate's figure, if a recovery from this point is one to the end of the WAL, without a gap."""
        to_the_end = point.means == "point in time" and point.place == "backups" and not point.problem
        return self.at_end if point.at and to_the_end else None

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
    parts: dict[Resource, str] = {"redis": REDIS, "files": FILES}
    if "database" not in resources:
        return RecoveryPoints(written.asked, tuple(points), stored, written, samples.result(), parts, {}, None)
    parts["database"] = env.postgres.database
    unwaited = dict[tuple[Means, Place], str]()
    if env.has("backups") and survives_with_tail(env):
        unwaited["point in time", "backups"] = gate.unwaited(env)
    if env.has("standby"):
        unwaited["standby", "live"] = gate.unwaited(env, *filter(None, [env.standby.name]))
    return RecoveryPoints(
        written.asked, tuple(points), stored, written, samples.result(), parts, unwaited, _loss_at_end(env)
    )


def _loss_at_end(env: Environment) -> Loss | None:
    try:
        return gate.loss_at_end(env)
    except OpsError as error:
        return Loss.not_known(env.postgres.database, error.message)


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
            value=f"it is not in use; {kept}, which is only on the primary and therefore no recovery point",
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
