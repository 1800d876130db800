"""The parts of a report: its status, one finding, one step's time, one piece of evidence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from runbook.next import Next


class Status(StrEnum):
    """How a run, a finding or a step ended, from good to bad."""

    PLANNED = "PLANNED"
    OK = "OK"
    WARN = "WARN"
    CRITICAL = "CRITICAL"


@dataclass(frozen=True)
class Finding:
    """One judgement: what was seen, what was expected, and what to do about it. A CRITICAL one ends the run at its next
    `fail_if_critical`, but for one that does not `stop`: then the run goes on, and is CRITICAL when it ends.
    `alternative`: it advises something else in place of the run, and has no meaning once that has succeeded."""

    name: str
    status: Status
    value: str = ""
    expected: str = ""
    hint: str = ""
    stops: bool = True
    follow: tuple[Next, ...] = ()
    alternative: bool = False

    @property
    def next_step(self) -> str:
        """The hint, with the first runbook to follow where the hint does not name it."""
        first = str(self.follow[0]) if self.follow and self.follow[0].flow not in self.hint else ""
        return f"{self.hint}: {first}" if self.hint and first else self.hint or first


@dataclass(frozen=True)
class StepTime:
    """One probe or action: when it began and how long it took."""

    name: str
    started: datetime
    seconds: float
    status: Status


@dataclass(frozen=True)
class Evidence:
    """A table (columns and rows), text (Markdown), or a picture (SVG). `csv`: the whole table with plain numbers, filed
    as `csv_path`; the JSON has its SHA-256."""

    name: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    text: str = ""
    svg: str = ""
    csv: str = ""

    def csv_path(self, report: Path) -> Path:
        """`….json` → `…-slow-statements.csv`."""
        name = re.sub(r"\W+", "-", self.name).strip("-")[:60]
        return report.with_name(f"{report.stem}-{name}.csv")
