"""A drill's report: ledger, verdict, timeline, problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from blocks.environment import Environment
from flows.loss import planned_losses
from flows.recovery.drills.scenario import Drill, Scenario
from flows.recovery.objectives.points import FILES, REDIS
from runbook import clock
from runbook.guard.loss import Loss, losses_text
from runbook.page.timeline import spans
from runbook.report import Evidence, Report, Status, StepTime
from runbook.units import duration
from tasks.drill.ledger import WriteAttempt
from tasks.drill.lost_writes import LedgerResult, find_lost_in
from tasks.postgres.replication.synchronous import address

MEASURED = "Measured"
MOST_MISSING = 500
GIVEN_UP = "given up after the fault"


@dataclass(frozen=True)
class Outcome:
    """What was measured. `rto_seconds` None: users were not served again. `lost`: missing writes that were acknowledged
    before the fault; `given_up`: after it. `rpo_seconds`: from the first lost write, or from the moment of the restored
    data, to the fault. `acknowledged`: all of them, before and after."""

    rto_seconds: float | None
    lost: tuple[WriteAttempt, ...]
    given_up: tuple[WriteAttempt, ...]
    rpo_seconds: float
    acknowledged: int


def report_ledger(drill: Drill, live: Environment) -> Outcome | None:
    """Look up every write of the ledgers in the live database. None: the drill did not reach the fault.

    Raises:
        Unreachable: the database is down.
    """
    with live.postgres.connect(live.postgres.database) as connection:
        results = {
            name: find_lost_in(ledger, connection, drill.env.application)
            for name, ledger in drill.clients.ledgers.items()
        }
    outcome = _outcome_of(drill, results) if drill.fault else None
    _report_writes(drill.report, results, outcome)
    return outcome


def _outcome_of(drill: Drill, results: Mapping[str, LedgerResult]) -> Outcome:
    """Writes before the fault must not be lost; a recovery to a point in time gives up those after it."""
    assert drill.fault
    began = drill.fault.began
    lost = [one for found in results.values() for one in found.lost]
    before = sorted((one for one in lost if one.answered and one.answered <= began), key=lambda one: one.sent)
    rpo = (began - before[0].answered).total_seconds() if before and before[0].answered else 0.0
    if drill.recovered_to:
        rpo = max(rpo, (began - drill.recovered_to).total_seconds())
    rto = (drill.served - drill.fault.began).total_seconds() if drill.served else None
    acknowledged = sum(found.acknowledged for found in results.values())
    return Outcome(rto, tuple(before), tuple(one for one in lost if one not in before), rpo, acknowledged)


def _report_writes(report: Report, results: Mapping[str, LedgerResult], outcome: Outcome | None) -> None:
    """Attempts and their outcome, by client; and every missing write."""
    columns = [_column(result, outcome) for result in results.values()]
    names = list(columns[0]) if columns else []
    report.table("Ledger", ("writes", *results), [(name, *(column[name] for column in columns)) for name in names])
    strange = [row for result in results.values() for row in result.unexpected]
    report.require(
        "unexpected rows",
        not strange,
        "find out which client wrote them, or wrote them twice",
        value="; ".join(strange[:5]) or "none",
        expected="none",
    )
    groups = (
        [("before the fault: lost", outcome.lost), ("after the fault: given up", outcome.given_up)]
        if outcome
        else [("before or after: not known", tuple(one for found in results.values() for one in found.lost))]
    )
    missing = [
        (when, clock.time_of_day(one.answered, "microseconds") if one.answered else "", one.kind, one.key or one.id)
        for when, group in groups
        for one in group
    ]
    columns_ = ("acknowledged", clock.heading("at"), "kind", "key")
    report.table("Missing writes, one by one", columns_, missing, most=MOST_MISSING)


def _column(found: LedgerResult, outcome: Outcome | None) -> dict[str, str]:
    """One client's writes, each number with the whole that it is a part of."""
    every, answered, unanswered = f"{found.attempted:,}", f"{found.acknowledged:,} acknowledged", found.indeterminate
    given_up = [one for one in found.lost if outcome and one in outcome.given_up]
    return {
        "attempted": every,
        "acknowledged": f"{found.acknowledged:,} of {every}",
        "refused": f"{found.refused:,} of {every}",
        "not answered": f"{unanswered:,} of {every}",
        "looked up in the database": f"{found.acknowledged:,} of {answered}",
        "lost": f"{len(found.lost) - len(given_up):,} of {answered}",
        GIVEN_UP: f"{len(given_up):,} of {answered}",
        "not answered, stored": f"{found.recovered:,} of {unanswered:,}",
        "not answered, not stored": f"{found.unknown:,} of {unanswered:,}",
        "unexpected rows": f"{len(found.unexpected):,}",
    }


def report_verdict(report: Report, drill: Drill, scenario: Scenario, outcome: Outcome) -> None:
    """RTO, RPO and lost writes against the scenario's targets (§8.4)."""
    targets = scenario.targets(drill.env)
    rto, lost = outcome.rto_seconds, len(outcome.lost)
    report.require(
        "RTO",
        rto is not None and rto <= targets.rto_seconds,
        "find the longest step in the timeline",
        value="users were not served again" if rto is None else duration(rto),
        expected=f"at most {duration(targets.rto_seconds)}",
    )
    if targets.lost_writes >= 0:
        report.require(
            "lost acknowledged writes",
            lost <= targets.lost_writes,
            "check whether replication was synchronous, and which WAL the runbook did not replay; the table of missing "
            "writes has each of them",
            value=f"{lost:,} of {outcome.acknowledged:,}",
            expected=targets.lost_writes,
        )
    report.require(
        "RPO",
        outcome.rpo_seconds <= targets.rpo_seconds,
        "back up more often, or archive WAL",
        value=f"{lost:,} writes, {duration(outcome.rpo_seconds)}",
        expected=f"at most {duration(targets.rpo_seconds)}",
    )
    report.fact(
        "RTO", f"{'not reached' if rto is None else duration(rto)}, from the fault to the first successful request"
    )
    of = f"{outcome.acknowledged:,} acknowledged writes"
    report.fact("RPO", f"{lost:,} of {of} lost, {duration(outcome.rpo_seconds)}")
    if outcome.given_up:
        report.fact(GIVEN_UP, f"{len(outcome.given_up):,} of {of}")
    report.fact("to be verified", scenario.checks)


def judge_stated_loss(report: Report, drill: Drill, live: Environment, outcome: Outcome) -> None:
    """Compare the loss that the runbooks stated with the ledger: they must not state less."""
    stated, lost = _stated(drill, live), (*outcome.lost, *outcome.given_up)
    text = losses_text(stated, detailed=True) if stated else "no runbook stated a loss"
    report.fact("loss by the runbook", text)
    report.require(
        "the runbook's loss",
        not writes_beyond(stated, lost),
        "the runbook's plan and report are wrong: find out why its gate missed these writes (the table of missing "
        "writes has each of them), and do not rely on that runbook until it is fixed",
        value=f"by the ledger {len(lost):,} of {outcome.acknowledged:,} acknowledged writes; by the runbook: {text}",
        expected="no less than the ledger's",
    )


def _stated(drill: Drill, live: Environment) -> list[Loss]:
    """What the drill's runs stated about the database: measured, or by the plan where nothing measures it. Redis and
    the files have no ledger; a node that rejoins is a copy."""
    others = {REDIS, FILES, *(address(node) for node in (*drill.env.nodes(), *live.nodes()))}
    done = [run for run in drill.runs if run.permitted]
    return [
        loss for run in done for loss in (tuple(run.losses.values()) or planned_losses(run)) if loss.part not in others
    ]


def writes_beyond(stated: Sequence[Loss], lost: Sequence[WriteAttempt]) -> int:
    """The lost writes that these losses do not cover. A write is one commit or more."""
    if any(loss.unknown or loss.is_everything for loss in stated):
        return 0
    since = min((loss.since for loss in stated if loss.since), default=None)
    before = [one for one in lost if since is None or (one.answered and one.answered <= since)]
    return max(len(before) - sum(loss.count or 0 for loss in stated if not loss.since), 0)


def report_measured(report: Report, drill: Drill, outcome: Outcome | None) -> None:
    """The figures that the trend of later drills reads."""
    rows: list[tuple[str, object]] = [("scenario", drill.half_done.scenario)]
    if outcome:
        rto = outcome.rto_seconds
        rows += [
            ("rto_seconds", "" if rto is None else f"{rto:.2f}"),
            ("lost_writes", len(outcome.lost)),
            ("rpo_seconds", f"{outcome.rpo_seconds:.2f}"),
        ]
    rows += [(f"phase_{number}_seconds", f"{seconds:.2f}") for number, seconds in sorted(drill.phases.seconds.items())]
    report.table(MEASURED, ("measure", "value"), rows)


def report_timeline(report: Report, drill: Drill) -> None:
    """Phases, the outage, and the runbooks, on one axis."""
    assert drill.fault
    served = drill.served
    began, first = drill.fault.began, drill.symptoms[0] if drill.symptoms else None
    steps = [StepTime("fault", began, (drill.fault.struck - began).total_seconds(), Status.CRITICAL)]
    if served:
        steps.append(StepTime("users not served", began, (served - began).total_seconds(), Status.WARN))
    steps += drill.phases.bars()
    steps += [StepTime(run.runbook, run.started, run.seconds, run.status) for run in drill.runs if not run.planned]
    report.attach(Evidence("Timeline", svg=spans(steps, began)))
    events = [(clock.time_of_day(began, "microseconds"), "fault", drill.fault.what)]
    events += [(clock.time_of_day(first.at, "microseconds"), f"alarm: {first.sensor}", first.text)] if first else []
    events += [
        (clock.time_of_day(run.started, "microseconds"), f"{run.runbook} ({run.status})", run.outcome or run.sentence())
        for run in drill.runs
    ]
    events += (
        [(clock.time_of_day(served, "microseconds"), "first successful request", "users are served again")]
        if served
        else []
    )
    report.table("Events", (clock.heading("at"), "event", "detail"), sorted(events))
    report.table("Alarms", ("sensor", "problem"), [(one.sensor, one.text) for one in drill.symptoms])


def report_problems(report: Report, drill: Drill) -> None:
    """Every finding of the drill and its runbooks that is not OK, with its next step: the action items."""
    rows = [
        (name, f.status, f"{f.name}: {f.value}", f.hint)
        for name, findings in (("drill", report.findings), *((run.runbook, run.findings) for run in drill.runs))
        for f in findings
        if f.status is not Status.OK
    ]
    unique = list(dict.fromkeys(rows))
    report.table("Problems and action items", ("where", "", "problem", "action"), unique)
    drill.done["problems"] = f"{len(unique)} found"
    drill.done["timeline"] = "in this report"
    drill.done["report"] = "this report"


def report_overhead(report: Report, drill: Drill, seconds: Mapping[str, float]) -> None:
    """The time that the drill adds: its wall time without waiting for the alarm, runbooks and checks, which a real
    incident has too."""
    phases, now = drill.phases, datetime.now(UTC)
    waited, checked = ([(phases.begun[n], phases.seconds[n])] if n in phases.seconds else [] for n in (1, 5))
    runs = [(run.started, run.seconds) for run in drill.runs]
    whole = (now - report.started).total_seconds()
    own = whole - _covered([*waited, *checked, *runs])
    report.table(
        "The drill's seconds",
        ("part", "seconds"),
        [
            ("waiting for the alarm", f"{_covered(waited):.2f}"),
            ("runbooks", f"{_covered(runs):.2f}"),
            ("checks of phase 5", f"{_covered(checked):.2f}"),
            ("the drill itself", f"{own:.2f}"),
        ],
    )
    parts = ", ".join(f"{name} {duration(took)}" for name, took in seconds.items())
    text = f"{duration(own)} of {duration(whole)} ({parts}); the runbooks took {duration(_covered(runs))}"
    report.fact("overhead of the drill", text)


def _covered(spans: Sequence[tuple[datetime, float]]) -> float:
    """Seconds that at least one of these spans (begin, seconds) covers."""
    covered, end = 0.0, 0.0
    for began, took in sorted((start.timestamp(), took) for start, took in spans):
        covered += max(0.0, began + took - max(began, end))
        end = max(end, began + took)
    return covered
