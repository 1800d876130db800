"""Earlier answers, from past reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from blocks.environment import Environment
from flows.routine.checklist.texts import DRILL, Box, Checklist, Phase
from runbook.errors import OpsError
from tasks.reports.past import FiledReport, filed, last

RUNBOOK = "run-checklist"
DRILL_RUNBOOK, DRILL_TABLE = "dr-drill", "Training checklist (§8.4)"
TABLE, FACT = "Checklist", "checklist"
COLUMNS = ("phase", "box", "result", "who", "when", "note", "link")
MOST = 12
MOST_NOTE = 160


@dataclass(frozen=True)
class Past:
    """The last answers to a checklist: (phase, box) → the row of its report."""

    filed: FiledReport
    rows: Mapping[tuple[str, str], list[str]]

    @property
    def day(self) -> str:
        """The date of the answers."""
        return f"{self.filed.finished:%Y-%m-%d}"

    def hint(self, phase: Phase, box: Box) -> str:
        """The box's text in the form: how to do it, and the last answer."""
        row = self.rows.get((phase.title, box.text))
        if not row:
            return box.how
        _, _, result, who, _, note, link = row
        said = " ".join(filter(None, (note[:MOST_NOTE], link)))
        return f"{box.how} ／ 前回 {self.day}: {result} ({who}){' — ' if said else ''}{said}"

    def summary(self) -> str:
        """The last answers in one line, for the head of the form."""
        undone = [box for (_, box), row in self.rows.items() if row[2] == "未実施"]
        return f"前回 {self.day}: 未実施 {'、'.join(undone) if undone else 'なし'}"


def hint_for(box: Box, phase: Phase, past: Past | None, drilled: Mapping[str, str]) -> str:
    """A box's text in its form: how to do it, the newest drill's measurement, and the last answer."""
    parts = [past.hint(phase, box) if past else box.how]
    if box.measured and box.text in drilled:
        parts.append(drilled[box.text])
    return " ／ ".join(parts)


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
        results = [row[2] for row in found.rows(TABLE)]
        counts = (str(results.count(result)) for result in ("実施", "未実施", "対象外"))
        who = ", ".join(dict.fromkeys(row[3] for row in found.rows(TABLE)))
        rows.append((f"{found.finished:%Y-%m-%d}", found.status, *counts, who, found.path.name))
    return rows
