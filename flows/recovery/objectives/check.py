"""check-recovery-objectives (§8.1): current loss and duration of a recovery against RPO and RTO, every 5 minutes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from blocks.environment import Environment
from flows.recovery.listing import list_options
from flows.recovery.objectives import board
from flows.recovery.objectives.points import (
    SHOW_OPTIONS,
    RecoveryPoints,
    judge_sources,
    read_recovery_points,
    resources_of,
    sets_of,
)
from runbook import clock
from runbook.flow import flow
from runbook.guard.loss import Loss, losses_text
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.monitoring import state
from tasks.recovery_points.backups import TAKEN_BY
from tasks.recovery_points.point import Danger, Point, Resource, best_of

WATCHED = timedelta(minutes=15)
DAILY = 43200.0
"""Seconds: backups with longer gaps are called daily."""
ELSEWHERE = "set a bucket or another host in [backups] or [copies]; set survives = “server” for a mounted directory"
WAIT = (
    "set synchronous_standby_names to the WAL receiver or the standby, and synchronous_commit to on: commits wait then"
)
DANGERS: tuple[Danger, ...] = get_args(Danger)


@flow(name="check-recovery-objectives", flow_run_name=RunName("check-recovery-objectives {environment}"))
def check_recovery_objectives(environment: str) -> Report:
    """RPO/RTOの確認 (§8.1)

    Reports what would be lost if the server, the data or the region failed now. For the database, Redis and the files
    it compares the newest moment of every recovery option (standby, point in time, replica, backups, also from the
    replica store) with the RPO, and the measured duration of past recoveries with the RTO. It runs every five minutes.

    It only reads manifests, listings and positions: it restores nothing and takes no lock. A value that cannot be read
    is "not known", never healthy. CRITICAL: no recovery option meets an objective. Evidence: the table of all recovery
    points. A report is written if something changed, if it is CRITICAL, and once an hour; other runs are counted.

    Departs from the manual: its daily backup loses up to 24 hours; here that is CRITICAL once it exceeds the RPO.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check recovery objectives", env, often=True) as report:
        report.fact("objectives", f"RPO {duration(env.rpo_seconds)}, RTO {duration(env.rto_seconds)}")
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"not checked: users are sent to another region ({elsewhere})"
            return report
        reach = read_recovery_points(env)
        report_points(report, reach)
        report_full_restore(report, env, reach)
        for resource in resources_of(env):
            for danger in DANGERS:
                _judge_loss(report, env, reach, resource, danger)
        _judge_duration(report, env, reach)
        judge_sources(report, env, reach)
        _judge_watcher(report, env)
        report.outcome = _outcome(env, reach)
        board.rebuild(env, reach)
    return report


def _judge_watcher(report: Report, env: Environment) -> None:
    """Where a watcher takes the frequent checks, this run is the hourly one: the watcher must be alive."""
    if not env.has("monitoring.watcher"):
        return
    last = state.load(env.reports_directory).at
    report.prefer(
        "the watcher",
        last is not None and abs(datetime.now(UTC) - last) <= WATCHED,
        "on its host: systemctl start interview-ops-watcher. Until it runs, this check and due backups are only hourly",
        value=f"last round at {clock.text(last)}" if last else "no round in this report folder",
        expected=f"a round within {duration(WATCHED.total_seconds())}",
    )


def serves_elsewhere(env: Environment) -> str:
    """The address to which users are sent instead of this environment; "" if they are sent here, or it is unknown."""
    if not (env.has("endpoint") and env.has("application.url")):
        return ""
    try:
        sent = Path(env.endpoint.file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if sent.rstrip("/") == env.application.url.rstrip("/") else sent


def report_points(report: Report, reach: RecoveryPoints) -> None:
    """Every recovery point, as a table."""
    rows = []
    for point in reach.points:
        taken = reach.estimate(point)
        rows.append(
            (
                point.resource,
                point.told,
                clock.text(point.at) if point.at else "not known" * point.unknown,
                reach.loss_now(point).text,
                point.proven or "never",
                duration(taken.seconds) if taken else "never measured",
                "; ".join(text for text in (point.problem, point.detail) if text),
            )
        )
    columns = ("of", "by", "newest moment", "lost", "proven", "takes", "")
    report.table("Recovery points", columns, rows)


def report_full_restore(report: Report, env: Environment, reach: RecoveryPoints) -> None:
    """The options of full-restore for the database, as a table."""
    listed = [one for which in sets_of(env) for one in list_options(env, reach.points, which)]
    rows = [
        (
            *(one.method, one.point.told, clock.text(one.point.at) if one.point.at else ""),
            reach.loss_now(one.point).text,
        )
        for one in listed
    ]
    report.table("Full restore: options for the database", ("method", "restored from", "newest moment", "lost"), rows)


def _judge_loss(report: Report, env: Environment, reach: RecoveryPoints, resource: Resource, danger: Danger) -> None:
    """By the best recovery point for this danger, a proven one if it meets the RPO."""
    points, name = reach.of(resource, danger), f"{resource}, {danger}"
    expected = f"at most {duration(env.rpo_seconds)} (RPO)"
    if danger == "region lost" and not env.has("copies"):
        report.leave_out("copies")
        lost = losses_text([Loss.everything(reach.parts[one]) for one in resources_of(env)])
        report.fact("if the region failed", f"{lost}: [copies] is not configured")
        return
    sure, best = best_of(point for point in points if point.proven), best_of(points)
    chosen = next((one for one in (sure, best) if one and _is_near(env, reach, one)), best)
    if chosen is None:
        _judge_nothing(report, env, reach, resource, name, points, expected)
        return
    loss = reach.loss(chosen, danger)
    value = f"{loss.text}; recovered by {chosen.told}"
    if not _is_near(env, reach, chosen):
        value += f"; its newest data is {duration(chosen.loss_seconds(reach.now) or 0.0)} old"
        report.fail(name, _hint(env, chosen), value=value, expected=expected, follow=SHOW_OPTIONS)
        return
    report.prefer(
        name,
        bool(chosen.proven) and not loss.unknown,
        "run verify-backup: it restores the backup and records the proof" if not chosen.proven else WAIT,
        value=value if chosen.proven else f"{value}, never proven by a restore",
        expected=expected,
    )
    if chosen.every_seconds > env.rpo_seconds:
        report.warn(
            f"{name}: between two backups",
            _hint(env, chosen),
            expected=expected,
            value=f"up to {duration(chosen.every_seconds)}",
        )


def _judge_nothing(
    report: Report,
    env: Environment,
    reach: RecoveryPoints,
    resource: Resource,
    name: str,
    points: Sequence[Point],
    expected: str,
) -> None:
    """No point restores anything in this danger."""
    everything = Loss.everything(reach.parts[resource]).text
    first = next((one for one in points if one.unknown), points[0] if points else None)
    if not first and any(one.at and one.beside for one in reach.points if one.resource == resource):
        # Without [copies] it is a decision, not an incident: it pages nobody.
        worst = Status.CRITICAL if env.has("copies") else Status.WARN
        value = f"{everything}: all backups are on this host"
        report.fail(name, ELSEWHERE, expected=expected, value=value, worst=worst, follow=SHOW_OPTIONS)
        return
    why = f"not known: {first.problem}" if first and first.unknown else f"{everything}: there is no copy"
    hint = first.hint if first else f"run {TAKEN_BY[resource]}"
    report.fail(name, hint, value=why, expected=expected, follow=SHOW_OPTIONS)


def _is_near(env: Environment, reach: RecoveryPoints, point: Point) -> bool:
    loss = point.loss_seconds(reach.now)
    return loss is not None and loss <= env.rpo_seconds


def _hint(env: Environment, point: Point) -> str:
    """How the RPO can be met with what is configured."""
    if point.means == "backup":
        seldom = point.every_seconds > env.rpo_seconds
        every = "a daily backup" if point.every_seconds > DAILY else f"a backup every {duration(point.every_seconds)}"
        better = "Archive WAL ([wal], backup-cluster)" if point.resource == "database" else "Take backups more often"
        sentences = [f"take a backup now ({TAKEN_BY[point.resource]})"]
        sentences += [f"{better}: {every} cannot meet an RPO of {duration(env.rpo_seconds)}" if seldom else better]
        sentences += ["Run replicate-backups as often"] * (point.place == "copies")
        return ". ".join(sentences)
    return point.hint or "fix its own finding below"


def _judge_duration(report: Report, env: Environment, reach: RecoveryPoints) -> None:
    """Of each recovery point that would be used."""
    used = [reach.best(resource, danger) for resource in resources_of(env) for danger in DANGERS]
    for point in dict.fromkeys(point for point in used if point):
        found, expected = reach.estimate(point), f"at most {duration(env.rto_seconds)} (RTO)"
        name = f"time for {point.resource} by {point.told}"
        if found is None:
            how = f"run {'a planned failover or a drill' if point.place == 'live' else 'verify-backup'}: it measures it"
            report.warn(name, how, value="never measured", expected=expected)
            continue
        sizes = f", of {size(found.smallest)} to {size(found.biggest)}" if found.biggest else ""
        value = f"about {duration(found.seconds)}, from {found.samples} measured{sizes}"
        hint = "find the longest step in past reports; more jobs, a faster disk or a standby shorten it"
        report.require(name, found.seconds <= env.rto_seconds, hint, value=value, expected=expected)


def _outcome(env: Environment, reach: RecoveryPoints) -> str:
    best = [reach.best(resource, "server lost") for resource in resources_of(env)]
    losses = [reach.loss(point, "server lost") for point in best if point]
    return f"if the server is lost: {losses_text(losses)}"
