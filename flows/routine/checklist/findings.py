"""Findings about a checklist's answers."""

from __future__ import annotations

from datetime import datetime, timedelta

from blocks.environment import Environment
from flows.routine.checklist.forms import NOT_DONE, RESULTS, ChecklistAnswer
from flows.routine.checklist.history import COLUMNS, FACT, TABLE, Past, history
from flows.routine.checklist.questions import Answered
from flows.routine.checklist.texts import Checklist
from runbook import clock
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import duration


def report_results(report: Report, env: Environment, found: Answered, past: Past | None) -> None:
    """Findings about every box and the due date, and a table of earlier answers."""
    report.fact(FACT, f"{found.checklist.name}: {found.checklist.en}, {found.checklist.section}")
    report.fact("launched", f"{found.launched.astimezone(env.zone):%Y-%m-%d %H:%M}")
    report.fact("due", found.due)
    for one in found.answers:
        _judge(report, found.checklist, one, past)
    _judge_due(report, env, found)
    _judge_minutes(report, found)
    report.table(TABLE, COLUMNS, [_row(env, one) for one in found.answers])
    columns = ("answered", "status", *RESULTS, "who", "report")
    report.table("Earlier answers", columns, history(env, found.checklist.name))
    done, undone, rest = (sum(one.result == result for one in found.answers) for result in RESULTS)
    title = found.checklist.en
    report.outcome = f"{title}: {done} boxes carried out, {undone} not carried out, {rest} not applicable"


def _judge(report: Report, checklist: Checklist, one: ChecklistAnswer, past: Past | None) -> None:
    before = past.answer(one.phase, one.box) if past else None
    again = f"not carried out on {past.day} either" if past and before and before[2] == NOT_DONE else ""
    report.require(
        f"{one.phase.en}: {one.box.en}",
        one.result != NOT_DONE,
        one.box.how,
        value="; ".join(filter(None, (f"{one.result}: {one.who}", one.note, again))),
        worst=Status.CRITICAL if one.box.must else Status.WARN,
        follow=[Next("run-checklist", "when it is done, answer again", {"checklist": checklist.name})],
    )


def _judge_due(report: Report, env: Environment, found: Answered) -> None:
    last = max(found.at.values()).astimezone(env.zone)
    report.fact("answered", f"{last:%Y-%m-%d %H:%M}")
    late = (last.date() - found.due).days
    report.prefer(
        "answered in time",
        late <= 0,
        "start earlier: remind-checklists lists waiting checklists every day",
        value=f"{late} days late" if late > 0 else f"{last:%Y-%m-%d}",
        expected=f"answered by {found.due}",
    )


def _judge_minutes(report: Report, found: Answered) -> None:
    """The time from answer to answer, if the manual gives a phase minutes."""
    since, rows, long = found.launched, list[tuple[object, ...]](), list[str]()
    for phase in found.checklist.phases:
        at = found.at[phase.id]
        took, since = at - since, at
        rows.append((phase.heading, _clock(at), duration(max(took.total_seconds(), 0.0))))
        if phase.minutes and took > timedelta(minutes=phase.minutes):
            long.append(f"{phase.en}: {duration(took.total_seconds())}")
    if not any(phase.minutes for phase in found.checklist.phases):
        return
    report.table("Phases, from answer to answer", ("phase", "answered", "took"), rows)
    report.prefer(
        "phases within the manual's minutes",
        not long,
        "find out what delayed them; perhaps only the answer was late",
        value="; ".join(long) or "all phases",
    )


def _clock(at: datetime) -> str:
    return clock.text(at)


def _row(env: Environment, one: ChecklistAnswer) -> tuple[str, ...]:
    when = f"{one.at.astimezone(env.zone):%Y-%m-%d %H:%M}"
    return (one.phase.en, one.box.en, one.result, one.who, when, one.note, one.link)
