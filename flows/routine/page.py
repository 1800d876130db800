"""What routine runbooks have in common: a page on which a source that does not answer is one finding, and the others go
on; and links to what to launch next."""

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
    """An open report, the environment that it is about, and the forms of its deployments."""

    report: Report
    env: Environment
    forms: Forms
    left_out: list[str] = field(default_factory=list)
    """The parts that were asked for and that the environment does not have."""

    @classmethod
    def of(cls, report: Report, env: Environment) -> Page:
        """The forms are asked for once."""
        return cls(report, env, read_forms([env.name]))

    def launch(self, flow: str, **parameters: object) -> str:
        """What to launch next: a link to its form, filled in, or its name."""
        return self.forms.link(flow, self.env.name, {"environment": self.env.name, **parameters})

    def part(self, name: str, work: Callable[[], T], *, hint: str = "", otherwise: Status = Status.WARN) -> T | None:
        """One measurement: what cannot be read is one finding. `hint` is what to do, before what the error says."""
        try:
            return work()
        except OpsError as error:
            told = "; ".join(text for text in (hint, error.hint) if text) or "look at it"
            value = f"{NOT_MEASURED}: {error.message}"
            self.report.fail(name, told, value=value, worst=otherwise)
            return None

    def not_measured(self, name: str, why: str, hint: str) -> None:
        """What has no source is never well."""
        self.report.warn(name, hint, value=f"{NOT_MEASURED}: {why}")

    def names(self, *parts: str) -> bool:
        """Whether the environment has what a measurement needs; where it has not, the measurement is left out."""
        missing = [one for one in parts if not self.env.has(one)]
        if missing:
            self.left_out.extend(missing)
            self.report.leave_out(*missing)
        return not missing

    def log_begins(self, name: str, began: datetime | None, hint: str) -> None:
        """A log that does not reach back over the whole span: what is counted is of a part of it."""
        told = f"{began.astimezone(self.env.zone):%Y-%m-%d %H:%M} {self.env.zone.key}" if began else "no known time"
        self.not_measured(name, f"the log begins at {told}, later than that", hint)

    def judge(self, metric: Metric, value: float, hint: str, *, of: str, worst: Status = Status.CRITICAL) -> Status:
        """`Report.judge`."""
        return self.report.judge(metric, value, hint, of=of, worst=worst)
