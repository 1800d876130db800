"""What would be lost now, and for how long, against the objectives (§8.1): every five minutes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from prefect import flow

from blocks.environment import Environment
from flows.recovery.objectives import board
from flows.recovery.objectives.points import OPTIONS, Reach, judge_sources, read_reach, resources_of
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.units import duration, size
from tasks.recovery_points.backups import TAKEN_BY
from tasks.recovery_points.point import Danger, Point, Resource, best_of

DAILY = 43200.0
"""Seconds: what is further apart is called daily."""
ELSEWHERE = "name a bucket or another machine in [backups] or [copies]; say survives = “server” of a mounted one"
DANGERS: tuple[Danger, ...] = get_args(Danger)


@flow(name="check-recovery-objectives", flow_run_name="check-recovery-objectives {environment}")
def check_recovery_objectives(environment: str) -> Report:
    """RPO/RTOの確認 (§8.1)

    Says what would be lost if the server, the data or the whole region were lost now: for the database, Redis and the
    files the newest moment that each means could bring back (standby, point in time, replica, backups, each also from
    the second stores), against the RPO; and how long that would take, from past recoveries that were measured, against
    the RTO. It runs every five minutes.

    It only reads manifests, listings and positions; nothing is restored, no lock is taken. What cannot be read counts
    as not known, never as well. CRITICAL: nothing that is left would meet an objective. Evidence: the table of all
    recovery points. A run that finds the same as the one before is counted; a report is filed where something changed,
    where it is CRITICAL, and once an hour.

    Departs from the manual: its daily backup loses up to 24 hours, and is red here as soon as it is older than the RPO.

    Args:
        environment: 対象の環境
    """
    env = Environment.find(environment)
    with runbook("Check recovery objectives", env, often=True) as report:
        report.fact("objectives", f"RPO {duration(env.rpo_seconds)}, RTO {duration(env.rto_seconds)}")
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"this region does not serve (users are sent to {elsewhere}): nothing to judge"
            return report
        reach = read_reach(env)
        tell_points(report, reach)
        for resource in resources_of(env):
            for danger in DANGERS:
                _judge_loss(report, env, reach, resource, danger)
        _judge_duration(report, env, reach)
        judge_sources(report, env, reach)
        report.outcome = _outcome(env, reach)
        board.rebuild(env, reach)
    return report


def serves_elsewhere(env: Environment) -> str:
    """Where users are sent instead of this environment; "" where they are sent here, or nobody can say: an application
    without an address of its own is judged."""
    if not (env.has("endpoint") and env.has("application.url")):
        return ""
    try:
        sent = Path(env.endpoint.file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if sent.rstrip("/") == env.application.url.rstrip("/") else sent


def tell_points(report: Report, reach: Reach) -> None:
    """Every recovery point, as a table."""
    rows = []
    for point in reach.points:
        taken = reach.estimate(point)
        rows.append(
            (
                point.resource,
                point.told,
                f"{point.at:%Y-%m-%d %H:%M:%S}" if point.at else "not known" * point.unknown,
                told_loss(point, reach),
                point.proven or "never",
                duration(taken.seconds) if taken else "never measured",
                "; ".join(text for text in (point.problem, point.detail) if text),
            )
        )
    columns = ("of", "by", "newest moment (UTC)", "lost", "proven", "takes", "")
    report.table("Recovery points", columns, rows)


def told_loss(point: Point, reach: Reach) -> str:
    """What would be lost, for people."""
    loss = point.loss_seconds(reach.now)
    if loss is None:
        return "not known" if point.unknown else "everything"
    return "nothing" if point.exact and loss < 1 else ("" if point.exact else "at most ") + duration(loss)


def _judge_loss(report: Report, env: Environment, reach: Reach, resource: Resource, danger: Danger) -> None:
    """By the best means of this danger: one that is proven, or else one that is not."""
    points, name = reach.of(resource, danger), f"{resource}, {danger}"
    expected = f"at most {duration(env.rpo_seconds)} (RPO)"
    if danger == "region lost" and not env.has("copies"):
        report.leave_out("copies")
        return
    sure, best = best_of(point for point in points if point.proven), best_of(points)
    chosen = next((one for one in (sure, best) if one and _is_near(env, reach, one)), best)
    if chosen is None:
        first = next((one for one in points if one.unknown), points[0] if points else None)
        if not first and any(one.at and one.beside for one in reach.points if one.resource == resource):
            # A decision, not an incident: where no second place is described, nobody is paged for it.
            value = "if this host were lost, everything would be: all backups are on it"
            report.fail(
                name,
                f"{ELSEWHERE}; {OPTIONS}",
                expected=expected,
                value=value,
                worst=Status.CRITICAL if env.has("copies") else Status.WARN,
            )
            return
        why = f"not known: {first.problem}" if first and first.unknown else "everything is lost: nothing is left of it"
        hint = first.hint if first else f"{TAKEN_BY[resource]} takes backups"
        report.fail(name, hint, value=why, expected=expected)
        return
    told = f"{told_loss(chosen, reach)} lost, by {chosen.told}"
    if not _is_near(env, reach, chosen):
        report.fail(name, _hint(env, chosen), value=told, expected=expected)
        return
    report.prefer(
        name,
        bool(chosen.proven),
        "verify-backup restores it, and notes that it is proven",
        value=told + ("" if chosen.proven else ", which was never proven by a restore"),
        expected=expected,
    )
    if chosen.every_seconds > env.rpo_seconds:
        report.warn(
            f"{name}: between two backups",
            _hint(env, chosen),
            expected=expected,
            value=f"up to {duration(chosen.every_seconds)} lost: so far apart they are",
        )


def _is_near(env: Environment, reach: Reach, point: Point) -> bool:
    loss = point.loss_seconds(reach.now)
    return loss is not None and loss <= env.rpo_seconds


def _hint(env: Environment, point: Point) -> str:
    """What holds the RPO, of what is there."""
    if point.means == "backup":
        seldom = point.every_seconds > env.rpo_seconds
        every = "a daily backup" if point.every_seconds > DAILY else f"one every {duration(point.every_seconds)}"
        cannot = f"; {every} cannot hold {duration(env.rpo_seconds)}" if seldom else ""
        more = "archive WAL ([wal], backup-cluster)" if point.resource == "database" else "take it more often"
        copies = "; replicate-backups as often" if point.place == "copies" else ""
        return f"take one now ({TAKEN_BY[point.resource]}){cannot}: {more}{copies}"
    return f"{point.hint or 'see to what is said of it below'}; {OPTIONS}"


def _judge_duration(report: Report, env: Environment, reach: Reach) -> None:
    """Of each means that would be used."""
    used = [reach.best(resource, danger) for resource in resources_of(env) for danger in DANGERS]
    for point in dict.fromkeys(point for point in used if point):
        found, expected = reach.estimate(point), f"at most {duration(env.rto_seconds)} (RTO)"
        name = f"time for {point.resource} by {point.told}"
        if found is None:
            how = f"{'a planned failover or a drill' if point.place == 'live' else 'verify-backup'} measures it"
            report.warn(name, how, value="no recovery of this kind was ever measured", expected=expected)
            continue
        sizes = f", of {size(found.smallest)} to {size(found.biggest)}" if found.biggest else ""
        told = f"about {duration(found.seconds)}, from {found.samples} measured{sizes}"
        hint = "see in past reports which step takes long; more jobs, a faster disk, or a standby shorten it"
        report.require(name, found.seconds <= env.rto_seconds, hint, value=told, expected=expected)


def _outcome(env: Environment, reach: Reach) -> str:
    best = [reach.best(resource, "server lost") for resource in resources_of(env)]
    told = [f"{point.resource} {told_loss(point, reach)}" for point in best if point]
    return f"lost with a server now: {', '.join(told)}"
