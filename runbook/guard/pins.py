"""What a plan pins: a confirmed run changes only what its plan found, and each plan is carried out once.

A plan's link fills in the parameter `plan`: when it was made, its acts, and what its flow pinned with
`report.pin_state`. What was carried out is recorded by plan, flow run and runbook (runbook/guard/carried_out.py). A run
without `plan` is compared with nothing: whoever restores at night types `confirm` only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote

from prefect.context import FlowRunContext

from runbook import metrics
from runbook.errors import NotConfirmed
from runbook.guard.carried_out import LAST, PLAN, RUN, CarriedOut, CarriedOutPlan, Records, current_run
from runbook.guard.permit import Pin
from runbook.page.address import ui_address
from runbook.report import Report
from runbook.units import size

PARAMETER = "plan"
WRITES = metrics.PLAN_WRITES
VALID = timedelta(days=7)
AGAIN = "run it with an empty confirm to see a new plan"
NO_ANSWER = "no answer"
_TIME, _ACTS = "at", "acts"
_COUNTS = re.compile(r"(: )?\d[\d,]* (rows|keys|others)\b")
"""In acts, numbers that ordinary writes change: their runbooks have a tolerance for them."""


class PlanChanged(NotConfirmed):
    """The plan is no longer the one that was confirmed."""


def digest(lines: Iterable[object]) -> str:
    """12 hexadecimal digits for a list: another list has others."""
    return hashlib.sha256(json.dumps([str(line) for line in lines]).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """A fingerprint: when it was made, the digest of its acts, and its pins."""

    at: datetime
    acts: str
    pins: Mapping[str, Pin]

    @property
    def text(self) -> str:
        """As the parameter `plan`: one word, without anything that a shell or Markdown would read differently."""
        rows = [(_TIME, self.at.isoformat()), (_ACTS, self.acts)]
        rows += [(name, f"{pin.value}@{pin.written}") for name, pin in self.pins.items()]
        return ",".join(f"{quote(name, safe='')}={quote(value, safe=':/@')}" for name, value in rows)

    def changes(self, now: Plan) -> list[tuple[str, str, str]]:
        """What differs: (what, in this plan, now). Bytes that were written since are not among it."""
        names = dict.fromkeys([*self.pins, *now.pins])
        rows = [(name, _shown(self.pins, name), _shown(now.pins, name)) for name in names if not self._fits(name, now)]
        rows += [
            (name, str(pin.written), str(now.pins[name].written))
            for name, pin in self.pins.items()
            if name in now.pins and pin.written > now.pins[name].written
        ]
        return [*rows, *([("acts", self.acts, now.acts)] if self.acts != now.acts else [])]

    def _fits(self, name: str, now: Plan) -> bool:
        before, after = self.pins.get(name), now.pins.get(name)
        if before is None or after is None:
            return before is after
        return before.value == after.value or bool(after.tolerance and self.has_grown(name, now) is None)

    def has_grown(self, name: str, now: Plan) -> bool | None:
        """Of a number: whether it is larger than this plan's by more than the tolerance; None where it fits."""
        before, after = self.pins[name], now.pins[name]
        if not (after.tolerance and before.value.isdecimal() and after.value.isdecimal()):
            return False
        planned, found = int(before.value), int(after.value)
        return None if abs(found - planned) <= after.tolerance.around(planned) else found > planned

    def written(self, now: Plan) -> dict[str, int]:
        """Bytes that were written since this plan, by pin."""
        return {
            name: pin.written - self.pins[name].written
            for name, pin in now.pins.items()
            if name in self.pins and pin.written >= 0 <= self.pins[name].written
        }


def _shown(pins: Mapping[str, Pin], name: str) -> str:
    return pins[name].value if name in pins else "nothing"


def described(name: str, pin: Pin) -> str:
    """For people: what is pinned, and how far a number may be from it."""
    if not pin.tolerance or not pin.value.isdecimal():
        return f"{name} {pin.value}"
    return f"{name} {int(pin.value):,} (± {pin.tolerance.around(int(pin.value)):,})"


def read_plan(text: str) -> Plan:
    """A fingerprint from the parameter `plan`.

    Raises:
        NotConfirmed: the text is none.
    """
    try:
        pairs = (pair.partition("=") for pair in text.strip().split(","))
        rows = {unquote(name): unquote(value) for name, _, value in pairs}
        at, acts = datetime.fromisoformat(rows.pop(_TIME)), rows.pop(_ACTS)
        parts = {name: value.rpartition("@") for name, value in rows.items()}
        plan = Plan(at, acts, {name: Pin(value, int(written)) for name, (value, _, written) in parts.items()})
        if at.tzinfo is not None:
            return plan
    except (KeyError, ValueError):
        pass
    raise NotConfirmed(
        f"plan is “{text[:40]}”, which is no plan's fingerprint",
        "use the link in the plan's report, or leave plan empty",
    )


@dataclass
class Pinned:
    """The plan of one run: `given` is its parameter `plan`. `inner`: another runbook called this one."""

    records: Records
    key: str
    given: str = ""
    inner: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    judged: bool = False
    begun: CarriedOutPlan | None = None

    def refuse_second_use(self) -> None:
        """Call it once the lock is held, before anything is judged. A run that goes on with what a killed or failed one
        was permitted may find its half-done work, but not that what it would replace was replaced since.

        Raises:
            CarriedOut: this plan, or an earlier attempt of this flow run, was carried out.
        """
        if self.given and (done := self.records.find(f"{PLAN}{_name(self.given)}")):
            self.begun = done
            if done.ended:
                raise CarriedOut(f"this plan was carried out {done.described}: nothing was changed now", AGAIN)
        run, attempt = _own_run()
        done = self.records.find(f"{RUN}{run}") if run and not self.inner else None
        if done and done.attempt != attempt:
            if done.ended:
                raise CarriedOut(
                    f"this flow run was carried out {done.described}: a retry changes nothing",
                    "launch the runbook anew with an empty confirm to see a new plan",
                )
            self.given, self.begun = self.given or done.plan, done

    def planned(self, what: str) -> str:
        """Return what the confirmed plan pinned under this name; "" without a plan, or where it pinned nothing.

        Raises:
            NotConfirmed: the parameter `plan` is no fingerprint.
        """
        return pin.value if self.given and (pin := read_plan(self.given).pins.get(what)) else ""

    def describe(self, report: Report) -> None:
        """Pin the plan in the report."""
        report.pins[PARAMETER] = self._now(report).text
        counted = [name for name, pin in report.states.items() if pin.written >= 0]
        if report.states and not report.confirm:
            told = "; ".join(described(name, pin) for name, pin in report.states.items())
            most = f"; refused after {size(report.limit(WRITES)[1])} more writes" if counted else ""
            report.fact("pinned", f"{told}{most}")

    def require(self, report: Report) -> None:
        """The confirmed plan against what is found now; once in a run.

        Raises:
            PlanChanged: it no longer fits. The report has the new plan.
        """
        if not self.given or self.judged:
            return
        self.judged = True
        planned, now = read_plan(self.given), self._now(report)
        changes = planned.changes(now)
        if self.begun:
            changes = [row for row in changes if self._concerns(self.begun, row[0], planned, now)]
        if (done := self.records.find(f"{LAST}{self.key}")) and datetime.fromisoformat(done.at) > planned.at:
            changes.append(("the same runbook", "not yet carried out", f"carried out {done.described}"))
        if now.at - planned.at > VALID:
            changes.append(("age of the plan", f"{planned.at:%Y-%m-%d}", f"more than {VALID.days} days"))
        self._judge_writes(report, planned.written(now), changes)
        if changes:
            report.table("What changed since the plan", ("what", "in the plan", "now"), changes)
            raise PlanChanged(
                "the plan no longer fits, and nothing was changed: "
                + "; ".join(f"{what} was {before}, is {after}" for what, before, after in changes[:3]),
                "check the new plan in this report, then confirm that one in its form; "
                "a new run with an empty plan is compared with nothing",
            )

    @staticmethod
    def _concerns(begun: CarriedOutPlan, name: str, planned: Plan, now: Plan) -> bool:
        """Whether a change concerns a run that goes on with what another one began: what is replaced was replaced
        since; or more is deleted than was planned. (It stopped a server itself, perhaps: nobody writes there.)"""
        if name not in now.pins or name not in planned.pins:
            return False
        pin = now.pins[name]
        if pin.tolerance:
            return planned.has_grown(name, now) is True
        if pin.items:
            return not set(pin.items) <= set(begun.items.get(name, ()))
        return pin.lost and pin.value != NO_ANSWER

    def _judge_writes(self, report: Report, written: Mapping[str, int], changes: list[tuple[str, str, str]]) -> None:
        warn, most = report.limit(WRITES)
        for name, number in written.items():
            end = "; this run's loss includes those that it replaces" if report.states[name].lost else ""
            report.fact(f"writes since the plan ({name})", f"{size(number)}{end}")
            if number > most:
                changes.append((f"writes ({name})", "none", f"{size(number)}, more than {size(most)}{end}"))
            elif number > warn:
                report.warn(
                    f"writes since the plan ({name})",
                    "nothing to do if that was expected; else stop and plan again",
                    value=f"{size(number)}{end}",
                    expected=f"at most {size(warn)}",
                )

    def begin(self, report: Report) -> None:
        """Note what this run is permitted, for one that goes on with it."""
        self._write(report, self._own_names(), ended=False)

    def record(self, report: Report) -> None:
        """Note that the run did what it was permitted, or found nothing to do: a retry would find something else.
        Called before the lock is free."""
        done = report.permitted
        self._write(report, [f"{LAST}{self.key}", *self._own_names()] if done else self._own_run_name())

    def link(self, report: Report) -> None:
        """Where no flow run can be linked, the record names the report, once it has a path."""
        if self.given and not _own_run()[0]:
            self._write(report, [f"{PLAN}{_name(self.given)}"])

    def _own_names(self) -> list[str]:
        """Of the records for this plan and this flow run."""
        return [*([f"{PLAN}{_name(self.given)}"] if self.given else []), *self._own_run_name()]

    def _own_run_name(self) -> list[str]:
        run, _ = _own_run()
        return [f"{RUN}{run}"] if run and not self.inner else []

    def _write(self, report: Report, names: Sequence[str], *, ended: bool = True) -> None:
        """That it cannot be noted makes a good recovery no worse."""
        run, attempt = _own_run()
        link = (ui_address(f"runs/flow-run/{run}") if run else "") or str(report.path or "")
        if not names:
            return
        items = {name: pin.items for name, pin in report.states.items() if pin.items}
        plan, at = self._now(report).text, datetime.now(UTC).isoformat()
        try:
            self.records.write(names, CarriedOutPlan(report.runbook, at, plan, ended, attempt, link, items))
        except OSError as error:
            report.warn(
                "record that the plan was carried out",
                "do not retry this run: nothing would refuse it",
                value=f"cannot be written to {self.records.directory}: {error.strerror}",
            )
        if self.records.is_local and (run or self.given):
            report.fact(
                "record of this run",
                "on this host only: Prefect does not answer. Do not confirm this plan on "
                "another host, and do not retry this run there",
            )
        else:
            report.facts.pop("record of this run", None)

    def _now(self, report: Report) -> Plan:
        return Plan(self.started, digest(_COUNTS.sub("", str(act)) for act in report.acts), report.states)


def _name(plan: str) -> str:
    return hashlib.sha256(plan.strip().encode()).hexdigest()[:24]


def _own_run() -> tuple[str, str]:
    """This flow run, and this attempt at it; empty outside Prefect."""
    context = FlowRunContext.get()
    return (str(run.id), context.start_time.isoformat()) if context and (run := current_run()) else ("", "")
