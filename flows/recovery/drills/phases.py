"""The six phases of §8.4: when each began, how long it took, and the manual's minutes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from flows.routine.checklist.texts import checklist
from runbook import clock
from runbook.report import Report, Status, StepTime
from runbook.units import duration

_DAY = checklist("drill_day").phases
NAMES = tuple(phase.short for phase in _DAY)
MINUTES = tuple(phase.minutes for phase in _DAY)


@dataclass
class DrillPhases:
    """Phase number (1 to 6) → its begin, its duration in seconds, and whether it completed."""

    begun: dict[int, datetime] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    ok: dict[int, bool] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, number: int, since: datetime | None = None) -> Iterator[None]:
        """Time a phase; phase 1 runs `since` the fault."""
        self.begun[number] = since or datetime.now(UTC)
        self.ok[number] = False
        try:
            yield
            self.ok[number] = True
        finally:
            self.seconds[number] = (datetime.now(UTC) - self.begun[number]).total_seconds()

    def split(self, run: Report) -> None:
        """Phase 4 begins when the runbook starts the application."""
        steps = sorted(run.steps, key=lambda step: step.started)
        healthy = next((step.started for step in steps if step.name == "wait_healthy"), None)
        starts = [
            step.started for step in steps if step.name == "start_services" and healthy and step.started < healthy
        ]
        if not starts:
            return
        end = self.begun[3].timestamp() + self.seconds[3]
        self.begun[4], self.ok[4] = starts[-1], self.ok[3]
        self.seconds[3] = (starts[-1] - self.begun[3]).total_seconds()
        self.seconds[4] = end - starts[-1].timestamp()

    def add(self, number: int, since: datetime) -> None:
        """A phase that `split` began ends now."""
        self.begun.setdefault(number, since)
        self.seconds[number] = (datetime.now(UTC) - self.begun[number]).total_seconds()
        self.ok[number] = True

    def bars(self) -> list[StepTime]:
        """Bars of the timeline."""
        return [
            StepTime(
                f"{number} {NAMES[number - 1]}",
                begun,
                self.seconds.get(number, 0.0),
                Status.OK if self.ok.get(number) and self.within(number) else Status.CRITICAL,
            )
            for number, begun in sorted(self.begun.items())
        ]

    def within(self, number: int) -> bool:
        """Whether it took at most the manual's minutes."""
        return self.seconds.get(number, 0.0) <= MINUTES[number - 1] * 60

    def report_results(self, report: Report) -> None:
        """Each phase against the manual's minutes."""
        rows = []
        for number, name in enumerate(NAMES, 1):
            took = duration(self.seconds[number]) if number in self.seconds else "not reached"
            judged = "yes" if number in self.seconds and self.ok.get(number) and self.within(number) else "no"
            begun = clock.time_of_day(self.begun[number]) if number in self.begun else ""
            rows.append((number, name, begun, took, f"{MINUTES[number - 1]} min", judged))
            if number in self.seconds:
                self._judge(report, number, took)
        report.table("Phases (§8.4)", ("#", "phase", clock.heading("began"), "took", "manual", "within"), rows)

    def _judge(self, report: Report, number: int, took: str) -> None:
        name, limit = f"phase {number} {NAMES[number - 1]}", f"at most {MINUTES[number - 1]} min"
        report.prefer(name, self.within(number), "find the longest step in the timeline", value=took, expected=limit)
