"""Earlier answers, from past reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from blocks.environment import Environment
from flows.routine.checklist.forms import NOT_DONE, RESULTS, result_of
from flows.routine.checklist.texts import DRILL, Box, Checklist, Phase
from runbook.errors import OpsError
from runbook.language.say import label, say
from tasks.reports.past import FiledReport, filed, last

RUNBOOK = "run-checklist"
DRILL_RUNBOOK, DRILL_TABLE = "dr-drill", "Training checklist (§8.4)"
TABLE, FACT = "Checklist", "checklist"
COLUMNS = ("phase", "box", "result", "who", "when", "note", "link")
MOST = 12
MOST_NOTE = 160


@dataclass(frozen=True)
class Past:
    """The last answers to a checklist: (phase, box) → the row of its report. Older reports are Japanese."""

    filed: FiledReport
    rows: Mapping[tuple[str, str], list[str]]

    @property
    def day(self) -> str:
        """The date of the answers."""
        return f"{self.filed.finished:%Y-%m-%d}"

    def answer(self, phase: Phase, box: Box) -> list[str] | None:
        """The row of a box, with its result in English."""
        row = self.rows.get((phase.en, box.en)) or self.rows.get((phase.ja, box.ja))
        return [*row[:2], result_of(row[2]), *row[3:]] if row else None

    def hint(self, phase: Phase, box: Box) -> str:
        """The last answer, for the form; empty if there is none."""
        row = self.answer(phase, box)
        if not row:
            return ""
        _, _, result, who, _, note, link = row
        said = " ".join(filter(None, (note[:MOST_NOTE], link)))
        return f"{say(f'last time, on {self.day}')}: {say(result)} ({who}){': ' if said else ''}{said}"

    def undone(self) -> list[list[str]]:
        """The rows of the boxes that were not carried out."""
        return [row for row in self.rows.values() if result_of(row[2]) == NOT_DONE]

    def summary(self) -> str:
        """The last answers in one line, for the head of the form."""
        undone = ", ".join(say(row[1]) for row in self.undone())
        return f"{say(f'last time, on {self.day}')}: {say('not carried out')}: {undone or label('none')}"


def hint_for(box: Box, phase: Phase, past: Past | None, drilled: Mapping[str, str]) -> str:
    """A box's text in its form: how to do it, the newest drill's measurement, and the last answer."""
    measured = (drilled.get(box.en) or drilled.get(box.ja, "")) if box.measured else ""
    return " ／ ".join(filter(None, (say(box.how), past.hint(phase, box) if past else "", measured)))


def drilled(env: Environment, checklist: Checklist) -> Mapping[str, str]:
    """Box → the newest drill's measurement, for the drill checklists."""
    if checklist.name not in DRILL:
        return {}
    try:
        where = Environment.find(env.drill_environment) if env.drill_environment else env
        found = last(where.reports_directory, where.name, DRILL_RUNBOOK)
    except OpsError:
        return {}
    rows = found.rows(DRILL_TABLE) if found else []
    return {row[2]: f"run-drill {found.finished:%Y-%m-%d}: {row[3]}" for row in rows if found and row[1] == "☑"}


def answered(env: Environment, name: str) -> Iterator[FiledReport]:
    """Reports with answers to a checklist, newest first."""
    for found in filed(env.reports_directory, env.name, RUNBOOK):
        if found.facts.get(FACT, "").startswith(f"{name}:") and found.rows(TABLE):
            yield found


def last_time(env: Environment, checklist: Checklist) -> Past | None:
    """The last answers; None: there are none."""
    found = next(answered(env, checklist.name), None)
    if found is None:
        return None
    rows = {(row[0], row[1]): row for row in found.rows(TABLE) if len(row) == len(COLUMNS)}
    return Past(found, rows)


def history(env: Environment, name: str) -> list[tuple[str, ...]]:
    """A row for each answered checklist, newest first."""
    rows = []
    for found in islice(answered(env, name), MOST):
        results = [result_of(row[2]) for row in found.rows(TABLE)]
        counts = (str(results.count(result)) for result in RESULTS)
        who = ", ".join(dict.fromkeys(row[3] for row in found.rows(TABLE)))
        rows.append((f"{found.finished:%Y-%m-%d}", found.status, *counts, who, found.path.name))
    return rows
