"""The recovery board: one page for all environments. For each resource: recoverable now, to which point, in how long,
proven when.

Every check-recovery-objectives rebuilds it: `<reports>/recovery-board.html` and the Prefect artifact `recovery-board`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from blocks.environment import Environment
from flows.recovery.objectives import board_page
from flows.recovery.objectives.points import RecoveryPoints, read_recovery_points, resources_of
from runbook import clock
from runbook.current import artifact_key
from runbook.drivers import described
from runbook.errors import OpsError
from runbook.files import durable
from runbook.guard.brief import asked_briefly
from runbook.guard.loss import Loss
from runbook.language.say import say, use_language
from runbook.log import logger
from runbook.page.width import fit
from runbook.units import duration
from tasks.backups.retention import StoredBackup
from tasks.prefect.offered_backups import offer_backups
from tasks.recovery_points import standing
from tasks.recovery_points.backups import KINDS
from tasks.recovery_points.point import Danger, Means, Point, Resource, best_of
from tasks.recovery_points.standing import BackupAge, LastDrill, LastRecovery, Recoverable, RecoveryStanding, State
from tasks.reports.past import DRILL, filed, recoveries

FILE, ARTIFACT = "recovery-board.html", "recovery-board"
DRILL_FLOW, DRILL_TABLE = "run-drill", "Measured"
JUDGED: tuple[Danger, ...] = ("server lost", "data corrupted")
RUNBOOKS: dict[Means, str] = {
    "standby": "postgres-failover",
    "point in time": "restore-to-point",
    "replica": "redis-failover",
    "backup": "full-restore",
}
WORST: tuple[State, ...] = ("red", "yellow", "green")


def rebuild(env: Environment, reach: RecoveryPoints) -> None:
    """Write the environment's record and the page. An error is logged: it must not fail a check or a recovery."""
    try:
        found = standing_of(env, reach)
        standing.save(env.reports_directory, found)
        own = {KINDS[resource]: one for (which, resource), one in reach.stored.items() if which == "backups"}
        with use_language(env.language):
            publish(env, found)
            offer_backups(env.name, {kind: one.backups for kind, one in own.items() if isinstance(one, StoredBackup)})
    except Exception as error:  # a page must not fail a recovery
        logger().warning("the recovery board was not rebuilt: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def rebuilt(env: Environment) -> Iterator[None]:
    """Rebuild the board after a runbook that changes what can be recovered, unless the environment was never checked:
    check-recovery-objectives writes its first record."""
    failed: OpsError | None = None
    try:
        yield
    except OpsError as error:
        failed = error
    if standing.read(env.reports_directory):
        try:
            rebuild(env, read_recovery_points(env))
        except Exception as error:  # the runbook is over: nothing here may change its result
            logger().warning("the recovery board was not rebuilt: %s", described(error) or error)
    if failed:
        raise failed


def publish(env: Environment, own: RecoveryStanding) -> None:
    """All environments' records as one page.

    Raises:
        OSError: the page cannot be written.
    """
    known = {one.environment: one for one in (*standing.read_others(), own)}
    now = datetime.now(UTC)
    page = board_page.html(list(known.values()), now, env.language)
    durable.write(env.reports_directory / FILE, page)
    if FlowRunContext.get():
        try:
            markdown = board_page.markdown(list(known.values()), now, env.language)
            title = say("recovery board: what can be restored in every environment")
            create_markdown_artifact(markdown=fit(markdown), key=artifact_key(ARTIFACT), description=title)
        except Exception as error:  # the page is on disk
            logger().warning("the recovery board could not be shown in Prefect: %s", error)


def standing_of(env: Environment, reach: RecoveryPoints) -> RecoveryStanding:
    """The current state of an environment."""
    resources = tuple(_recoverable(env, reach, resource) for resource in resources_of(env))
    backups = tuple(_ages(resource, reach) for resource in resources_of(env) if env.has("backups"))
    return RecoveryStanding(
        env.name,
        env.title,
        env.timezone,
        reach.now,
        env.rpo_seconds,
        env.rto_seconds,
        resources,
        backups,
        _last_drill(env),
        _next_drill(env.name),
        last_recovery(env),
    )


def _recoverable(env: Environment, reach: RecoveryPoints, resource: Resource) -> Recoverable:
    """As in the worse of the two dangers that every environment has."""
    found = [_judged(env, reach, resource, danger) for danger in JUDGED]
    return min(found, key=lambda one: (WORST.index(one.state), -(one.loss_seconds or 0.0)))


def _judged(env: Environment, reach: RecoveryPoints, resource: Resource, danger: Danger) -> Recoverable:
    points = reach.of(resource, danger)
    losses = [(point, point.loss_seconds(reach.now)) for point in points]
    near = [point for point, loss in losses if loss is not None and loss <= env.rpo_seconds]
    chosen = best_of(point for point in near if point.proven) or best_of(near) or best_of(points)
    if chosen is None:
        unknown = next((point.problem for point in points if point.unknown), "")
        why = f"{danger}: {f'not known ({unknown})' if unknown else 'nothing can be restored'}"
        part = reach.parts[resource]
        lost = Loss.not_known(part, unknown) if unknown else Loss.everything(part)
        return Recoverable(resource, "red", why, None, None, None, "none", "show-recovery-options", "", lost.text)
    taken = reach.estimate(chosen)
    seconds = taken.seconds if taken else None
    state, why = _state(env, reach, chosen, seconds, danger)
    return Recoverable(
        resource,
        state,
        why,
        chosen.at,
        chosen.loss_seconds(reach.now),
        seconds,
        chosen.told,
        RUNBOOKS[chosen.means],
        chosen.proven,
        reach.loss(chosen, danger).text,
    )


def _state(
    env: Environment, reach: RecoveryPoints, point: Point, seconds: float | None, danger: Danger
) -> tuple[State, str]:
    seconds_lost, loss = point.loss_seconds(reach.now), reach.loss(point, danger)
    if seconds_lost is None:
        return "red", f"{danger}: {loss.text}"
    if seconds_lost > env.rpo_seconds:
        age, rpo = duration(seconds_lost), duration(env.rpo_seconds)
        return "red", f"{danger}: {loss.text}; the newest data is {age} old, RPO {rpo}"
    if seconds is not None and seconds > env.rto_seconds:
        return "red", f"{danger}: it takes {duration(seconds)}, RTO {duration(env.rto_seconds)}"
    if not point.proven:
        return "yellow", "never proven by a restore: run verify-backup"
    if loss.unknown:
        return "yellow", f"{danger}: {loss.text}"
    if seconds is None:
        return "yellow", "duration never measured: run verify-backup or a drill"
    return "green", ""


def _ages(resource: Resource, reach: RecoveryPoints) -> BackupAge:
    stored = reach.stored.get(("backups", resource))
    if not isinstance(stored, StoredBackup):
        return BackupAge(KINDS[resource], None, None)
    whole = [one for one in stored.backups if not one.failed and one.manifest.taken <= reach.now]
    verified = [one.manifest.taken for one in whole if one.verified]
    return BackupAge(
        KINDS[resource], max((one.manifest.taken for one in whole), default=None), max(verified, default=None)
    )


def _last_drill(env: Environment) -> LastDrill | None:
    try:
        where = Environment.find(env.drill_environment) if env.drill_environment else env
        found = next(
            (
                one
                for one in filed(where.reports_directory, where.name, DRILL)
                if one.status != "PLANNED" and one.rows(DRILL_TABLE)
            ),
            None,
        )
    except OpsError:
        return None
    if found is None:
        return None
    measured = {row[0]: row[1] for row in found.rows(DRILL_TABLE) if len(row) == 2}
    rto = measured.get("rto_seconds") or ""
    return LastDrill(found.finished, found.status, measured.get("scenario", ""), float(rto) if rto else None)


def last_recovery(env: Environment) -> LastRecovery | None:
    """The newest recovery of an environment; None: its reports have none, or cannot be read."""
    try:
        found = next(recoveries(env.reports_directory, env.name), None)
    except OpsError:
        return None
    with clock.use_zone(env.zone):
        return LastRecovery(found.finished, found.status, found.runbook, found.lost) if found else None


def _next_drill(environment: str) -> datetime | None:
    """From Prefect's schedule; None without Prefect, or if the schedule is paused."""
    if not FlowRunContext.get():
        return None
    try:
        with asked_briefly(), get_client(sync_client=True) as client:
            runs = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[DRILL_FLOW])),
                deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[environment])),
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
                ),
                sort=FlowRunSort.EXPECTED_START_TIME_ASC,
                limit=1,
            )
    except (httpx.HTTPError, PrefectException, RuntimeError):
        return None
    return runs[0].expected_start_time if runs else None
