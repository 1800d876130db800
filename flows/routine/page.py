"""The page of routine runbooks: a source that does not answer is one finding, and the other checks continue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.metrics import Metric
from runbook.page.form import Forms, read_forms
from runbook.report import Report, Status

T = TypeVar("T")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Page:
    """An open report, its environment, and the forms of its deployments."""

    report: Report
    env: Environment
    forms: Forms
    left_out: list[str] = field(default_factory=list)
    """Parts that a check needs and the environment lacks."""

    @classmethod
    def of(cls, report: Report, env: Environment) -> Page:
        """A page; it reads the forms once."""
        return cls(report, env, read_forms([env.name]))

    def launch(self, flow: str, **parameters: object) -> str:
        """A link to the filled-in form of a runbook, or its name."""
        return self.forms.link(flow, self.env.name, {"environment": self.env.name, **parameters})

    def part(self, name: str, work: Callable[[], T], *, hint: str = "", otherwise: Status = Status.WARN) -> T | None:
        """One measurement; an error is one finding. `hint`: the next step, before the error's own."""
        try:
            return work()
        except OpsError as error:
            told = "; ".join(text for text in (hint, error.hint) if text) or "fix this error, then run this again"
            value = f"{NOT_MEASURED}: {error.message}"
            self.report.fail(name, told, value=value, worst=otherwise)
            return None

    def not_measured(self, name: str, why: str, hint: str) -> None:
        """A WARN: a value without a source is never OK."""
        self.report.warn(name, hint, value=f"{NOT_MEASURED}: {why}")

    def names(self, *parts: str) -> bool:
        """Whether the environment has the parts that a check needs; if not, the check is left out."""
        missing = [one for one in parts if not self.env.has(one)]
        if missing:
            self.left_out.extend(missing)
            self.report.leave_out(*missing)
        return not missing

    def log_begins(self, name: str, began: datetime | None, hint: str) -> None:
        """A WARN: the log covers only a part of the span."""
        told = f"{began.astimezone(self.env.zone):%Y-%m-%d %H:%M} {self.env.zone.key}" if began else "no known time"
        self.not_measured(name, f"the log begins at {told}, after the beginning of the span", hint)

    def judge(self, metric: Metric, value: float, hint: str, *, of: str, worst: Status = Status.CRITICAL) -> Status:
        """`Report.judge`."""
        return self.report.judge(metric, value, hint, of=of, worst=worst)
