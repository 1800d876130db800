"""Backups that the RPO asks for before the next daily one (§8.1)."""

from __future__ import annotations

from typing import Annotated

from prefect import Flow, flow
from pydantic import Field

from blocks.environment import Environment
from flows.application.files import backup_files
from flows.database.backup import backup_database
from flows.database.copies import replicate_backups
from flows.recovery.drills.scenario import launch
from flows.recovery.objectives.check import serves_elsewhere, tell_points, told_loss
from flows.recovery.objectives.points import read_reach, resources_of
from flows.redis.persistence import backup_redis
from runbook.errors import Locked, OpsError, RunbookFailed
from runbook.report import Report
from runbook.run import runbook
from runbook.units import duration
from tasks.backups.retention import Stored
from tasks.recovery_points.point import Danger, Place, Point, Resource, best_of

DAILY_SECONDS = 86400
LATE_SECONDS = 60.0
"""A run begins up to so much later than its schedule says: it waits for a worker, and a process to start."""
TAKEN_BY: dict[Resource, Flow[..., Report]] = {
    "database": backup_database,
    "redis": backup_redis,
    "files": backup_files,
}
HERE: tuple[Danger, ...] = ("server lost", "data corrupted")
AWAY: tuple[Danger, ...] = ("region lost",)
_PLACE: dict[tuple[Danger, ...], Place] = {HERE: "backups", AWAY: "copies"}


@flow(name="take-due-backups", flow_run_name="take-due-backups {environment}")
def take_due_backups(environment: str, minutes: Annotated[int, Field(ge=1, le=1440)] = 15) -> Report:
    """RPO定義: 目標を守るためのバックアップ (§8.1)

    For each resource asks what would be lost when the next run, `minutes` from now, has taken its backup (the newest
    one tells how long that lasts), by the best means that there is: archived WAL, a standby, a backup. Only where that
    is more than the RPO it takes a backup now; where there is a second place, it copies what that lacks by the same
    rule. An environment that archives its WAL so needs none of its database, one that does not gets a dump every 45
    minutes at an RPO of an hour. Run it every `minutes`.

    Where the RPO is a day or longer the daily backups hold it: it only copies them. In a region that does not serve it
    does nothing.
    A run that finds the environment's lock held says so, and the next one tries again. It adds backups, and deletes
    none (prune-backups). Evidence: the recovery points, and the reports of the backups. A run that does the same as the
    one before is counted, and filed once an hour.

    Departs from the manual: its one backup a day cannot hold an RPO of an hour.

    Args:
        environment: 対象の環境
        minutes: 次の実行までの分数。それまでに RPO を超えるものだけを取得する
    """
    env = Environment.find(environment)
    with runbook("Take due backups", env, often=True) as report:
        report.fact("objective", f"RPO {duration(env.rpo_seconds)}")
        daily = env.rpo_seconds >= DAILY_SECONDS
        if daily and not env.has("copies"):
            report.outcome = "nothing to do: the daily backups hold this RPO"
            return report
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"this region does not serve (users are sent to {elsewhere}): nothing to take"
            return report
        due = [] if daily else _due(report, env, HERE, minutes * 60)
        taken = [resource for resource in due if _take(report, env, resource)]
        copied = False
        if env.has("copies") and (behind := _due(report, env, AWAY, minutes * 60)):
            copied = _done(report, f"copies of {', '.join(behind)}", replicate_backups, environment=env.name)
        told = ", ".join(taken) or "nothing was due"
        report.outcome = f"taken: {told}{'; copied to the second place' if copied else ''}"
    return report


def is_late(loss_seconds: float | None, took_seconds: float, within_seconds: float, rpo_seconds: float) -> bool:
    """Whether more than the RPO would be lost before the next run, `within_seconds` from now, has taken its backup.
    `loss_seconds` is what would be lost now, None everything; `took_seconds` how long the newest backup took."""
    return loss_seconds is None or loss_seconds + within_seconds + took_seconds + LATE_SECONDS > rpo_seconds


def _due(report: Report, env: Environment, dangers: tuple[Danger, ...], within_seconds: float) -> list[Resource]:
    """What would lose more than the RPO before the next run, in one of these dangers, and would not with a new backup
    (or copy of it); told. One on the very host does not help against its loss: check-recovery-objectives says so."""
    reach, found = read_reach(env), list[Resource]()
    tell_points(report, reach)

    def late(point: Point | None) -> bool:
        return is_late(point.loss_seconds(reach.now) if point else None, took, within_seconds, env.rpo_seconds)

    for resource in resources_of(env):
        stored = reach.stored["backups", resource]
        took = stored.backups[-1].manifest.seconds if isinstance(stored, Stored) and stored.backups else 0.0
        best = {danger: reach.best(resource, danger) for danger in dangers}
        newest = best_of(one for one in reach.points if (one.resource, one.place) == (resource, _PLACE[dangers]))
        danger = next((danger for danger in dangers if late(best[danger])), None)
        if danger and late(newest):
            point = best[danger]
            report.fact(f"due: {resource}", f"{danger}: {told_loss(point, reach) if point else 'everything'} lost")
            found.append(resource)
    return found


def _take(report: Report, env: Environment, resource: Resource) -> bool:
    return _done(report, f"backup of {resource}", TAKEN_BY[resource], environment=env.name)


def _done(report: Report, what: str, work: Flow[..., Report], **parameters: object) -> bool:
    """Whether that runbook did its work; one that finds the lock held is tried again by the next run."""
    try:
        launch(work, **parameters)
    except Locked as error:
        report.warn(
            what,
            "the next run tries again; check-recovery-objectives tells when the RPO is exceeded",
            value=error.message,
        )
        return False
    except OpsError as error:
        hint = "see its own report" if isinstance(error, RunbookFailed) else error.hint
        report.fail(what, hint, value=error.message)
        return False
    report.passed(what, value="taken")
    return True
