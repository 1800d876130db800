"""take-due-backups (§8.1): a backup before the RPO is exceeded."""

from __future__ import annotations

from typing import Annotated

from prefect import Flow
from pydantic import Field

from blocks.environment import Environment
from flows.application.files import backup_files
from flows.database.backup import backup_database
from flows.database.copies import replicate_backups
from flows.recovery.drills.scenario import launch
from flows.recovery.objectives.check import report_points, serves_elsewhere
from flows.recovery.objectives.points import read_recovery_points, resources_of
from flows.redis.persistence import backup_redis
from runbook.errors import Locked, OpsError, RunbookFailed
from runbook.flow import flow
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration
from tasks.backups.retention import StoredBackup
from tasks.recovery_points.point import Danger, Place, Point, Resource, best_of

DAILY_SECONDS = 86400
MINUTES = 15
"""Until the next run, as prefect.yaml schedules it."""
LATE_SECONDS = 60.0
"""A scheduled run may begin this much later: it waits for a worker and the start of a process."""
TAKEN_BY: dict[Resource, Flow[..., Report]] = {
    "database": backup_database,
    "redis": backup_redis,
    "files": backup_files,
}
HERE: tuple[Danger, ...] = ("server lost", "data corrupted")
AWAY: tuple[Danger, ...] = ("region lost",)
_PLACE: dict[tuple[Danger, ...], Place] = {HERE: "backups", AWAY: "copies"}


@flow(name="take-due-backups", flow_run_name=RunName("take-due-backups {environment} next-{minutes}min"))
def take_due_backups(environment: str, minutes: Annotated[int, Field(ge=1, le=1440)] = MINUTES) -> Report:
    """RPO定義: 目標を守るためのバックアップ (§8.1)

    Takes a backup of each resource that would otherwise exceed the RPO before the next run (`minutes` from now) has
    taken its backup. It counts from the best recovery option: archived WAL, a standby, a backup. With a replica store
    it copies backups by the same rule. An environment with archived WAL therefore needs no dump; without WAL and with
    an RPO of an hour it gets a dump every 45 minutes. Schedule it every `minutes`.

    If the RPO is a day or longer, the daily backups meet it: it only copies them. It does nothing in a region to which
    no users are sent. If another run holds the lock, this run warns and the next one tries again. It deletes no backup
    (prune-backups does). Evidence: the recovery points, and the reports of the backups. A run with the same result as
    the one before is counted; a report is written once an hour.

    Departs from the manual: its daily backup cannot meet an RPO of an hour.

    Args:
        environment: Environment (lab, staging, production …)
        minutes: Minutes until the next run. It takes only backups whose RPO would be exceeded before that
    """
    env = Environment.find(environment)
    with runbook("Take due backups", env, often=True) as report:
        report.fact("objective", f"RPO {duration(env.rpo_seconds)}")
        daily = env.rpo_seconds >= DAILY_SECONDS
        if daily and not env.has("copies"):
            report.outcome = "nothing to do: the daily backups meet this RPO"
            return report
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"nothing to do: users are sent to another region ({elsewhere})"
            return report
        due = [] if daily else _due(report, env, HERE, minutes * 60)
        taken = [resource for resource in due if _take(report, env, resource)]
        copied = False
        if env.has("copies") and (behind := _due(report, env, AWAY, minutes * 60)):
            copied = _done(report, f"copies of {', '.join(behind)}", replicate_backups, environment=env.name)
        names = ", ".join(taken) or "nothing was due"
        report.outcome = f"taken: {names}{'; copied to the replica store' if copied else ''}"
    return report


def is_due(env: Environment, minutes: int) -> bool:
    """Whether a run of take-due-backups would take or copy a backup now. It only reads, and files no report."""
    if serves_elsewhere(env):
        return False
    judged = Report("Take due backups", env.name)
    daily = env.rpo_seconds >= DAILY_SECONDS
    dangers = [*([] if daily else [HERE]), *([AWAY] if env.has("copies") else [])]
    return any(_due(judged, env, one, minutes * 60) for one in dangers)


def is_late(loss_seconds: float | None, took_seconds: float, within_seconds: float, rpo_seconds: float) -> bool:
    """Whether the loss exceeds the RPO before the next run, `within_seconds` from now, has taken its backup.
    `loss_seconds`: lost now, None for everything; `took_seconds`: duration of the newest backup."""
    return loss_seconds is None or loss_seconds + within_seconds + took_seconds + LATE_SECONDS > rpo_seconds


def _due(report: Report, env: Environment, dangers: tuple[Danger, ...], within_seconds: float) -> list[Resource]:
    """The resources that would exceed the RPO before the next run, in one of these dangers, and would not with a new
    backup or copy. A backup on the same host does not help against its loss: check-recovery-objectives reports that."""
    reach, found = read_recovery_points(env), list[Resource]()
    report_points(report, reach)

    def late(point: Point | None) -> bool:
        return is_late(point.loss_seconds(reach.now) if point else None, took, within_seconds, env.rpo_seconds)

    for resource in resources_of(env):
        stored = reach.stored["backups", resource]
        took = stored.backups[-1].manifest.seconds if isinstance(stored, StoredBackup) and stored.backups else 0.0
        best = {danger: reach.best(resource, danger) for danger in dangers}
        newest = best_of(one for one in reach.points if (one.resource, one.place) == (resource, _PLACE[dangers]))
        danger = next((danger for danger in dangers if late(best[danger])), None)
        if danger and late(newest):
            point = best[danger]
            loss = reach.loss(point, danger) if point else Loss.everything(reach.parts[resource])
            report.fact(f"backup due: {resource}", f"{danger}: {loss.text}")
            found.append(resource)
    return found


def _take(report: Report, env: Environment, resource: Resource) -> bool:
    return _done(report, f"backup of {resource}", TAKEN_BY[resource], environment=env.name)


def _done(report: Report, what: str, work: Flow[..., Report], **parameters: object) -> bool:
    """Whether that runbook succeeded. If another run holds the lock, the next run tries again."""
    try:
        launch(work, **parameters)
    except Locked as error:
        report.warn(
            what,
            "nothing: the next run tries again; check-recovery-objectives alarms if the RPO is exceeded",
            value=error.message,
        )
        return False
    except OpsError as error:
        hint = "read its own report" if isinstance(error, RunbookFailed) else error.hint
        report.fail(what, hint, value=error.message)
        return False
    report.passed(what, value="taken")
    return True
