"""What a run found, did and took: one object, from which the page, the JSON file and the status are derived."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runbook.errors import NotConfirmed, RunbookFailed
from runbook.files.journal import DeadRun, Journal
from runbook.finding import Evidence as Evidence
from runbook.finding import Finding as Finding
from runbook.finding import Status as Status
from runbook.finding import StepTime as StepTime
from runbook.guard.effect import Effect
from runbook.guard.guards import Approving, Held, PinnedPlan
from runbook.guard.loss import Loss, losses_text
from runbook.guard.permit import Act, CarriesOut, Permit, Pin, PlannedStep, PlanOnly, Tolerance
from runbook.language.say import Language
from runbook.masking import without_logins
from runbook.metrics import Measure, Metric
from runbook.next import Next
from runbook.progress import StepLog
from runbook.submitted import Submitted

NOT_CONFIGURED = "not configured"


@dataclass
class Report:
    """Collects; never prints. Minted by `runbook(...)` only."""

    runbook: str
    environment: str
    confirm: str = ""
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished: datetime | None = None
    steps: list[StepTime] = field(default_factory=list)
    permitted_steps: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    plan_steps: list[PlannedStep] = field(default_factory=list)
    step_log: StepLog = field(default_factory=StepLog)
    facts: dict[str, str] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)
    outcome: str = ""
    planned: bool = False
    form: str = ""
    pins: dict[str, object] = field(default_factory=dict)
    states: dict[str, Pin] = field(default_factory=dict)
    pinned: PinnedPlan | None = None
    permitted: bool = False
    judged: int = 0
    refused: str = ""
    lock: Held | None = None
    acts: tuple[Act, ...] = ()
    effect: Effect | None = None
    losses: dict[str, Loss] = field(default_factory=dict)
    undo: tuple[Next, ...] = ()
    gate: Approving | None = None
    approved: str = ""
    contained: str = ""
    unattended: bool = False
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    state: Finding | None = None
    journal: Journal = field(default_factory=Journal)
    dead_runs: tuple[DeadRun, ...] = ()
    submitted: list[Submitted] = field(default_factory=list)
    path: Path | None = None
    previous: str = ""
    hash: str = ""
    headline: str = ""
    language: Language = "en"

    @property
    def status(self) -> Status:
        """Derived: CRITICAL before PLANNED before WARN before OK."""
        found = {finding.status for finding in self.findings}
        if Status.CRITICAL in found:
            return Status.CRITICAL
        if self.planned:
            return Status.PLANNED
        return Status.WARN if Status.WARN in found else Status.OK

    @property
    def is_stopped(self) -> bool:
        """Whether something critical was found that ends the run."""
        return any(finding.status is Status.CRITICAL and finding.stops for finding in self.findings)

    @property
    def may_change(self) -> bool:
        """Whether it was launched to change something, not to see a plan."""
        return self.unattended or self.confirm == self.environment

    @property
    def known_broken(self) -> str:
        """What is critical and does not stop the run."""
        return "; ".join(one.value for one in self.findings if one.status is Status.CRITICAL and not one.stops)

    @property
    def seconds(self) -> float:
        """Wall time so far, or of the whole run."""
        return ((self.finished or datetime.now(UTC)) - self.started).total_seconds()

    @property
    def started_at(self) -> str:
        """When the run began, as text."""
        return self.started.isoformat(timespec="seconds")

    def require(
        self,
        name: str,
        ok: bool,
        hint: str,
        *,
        value: object = "",
        expected: object = "",
        worst: Status = Status.CRITICAL,
        stops: bool = True,
        follow: Sequence[Next] = (),
    ) -> bool:
        """Record a condition: OK if it holds, otherwise `worst`, with the next step (`hint`) and the runbooks for it.
        `stops=False`: the run continues even if the finding is CRITICAL. Returns `ok`."""
        found = Finding(name, Status.OK, without_logins(str(value)), str(expected), stops=stops)
        if not ok:
            found = replace(found, status=worst, hint=without_logins(hint), follow=tuple(follow))
        self.findings.append(found)
        return ok

    def prefer(
        self,
        name: str,
        ok: bool,
        hint: str,
        *,
        value: object = "",
        expected: object = "",
        follow: Sequence[Next] = (),
    ) -> bool:
        """Record a condition that is a WARN if it does not hold. Returns `ok`."""
        return self.require(name, ok, hint, value=value, expected=expected, worst=Status.WARN, follow=follow)

    def passed(self, name: str, *, value: object = "", expected: object = "") -> None:
        """Record an OK."""
        self.require(name, True, "", value=value, expected=expected)

    def warn(
        self,
        name: str,
        hint: str,
        *,
        value: object = "",
        expected: object = "",
        follow: Sequence[Next] = (),
        alternative: bool = False,
    ) -> None:
        """Record a WARN: an operator should know it, the run continues. `alternative`: see `Finding`."""
        self.prefer(name, False, hint, value=value, expected=expected, follow=follow)
        self.findings[-1] = replace(self.findings[-1], alternative=alternative)

    def settle(self) -> None:
        """The run has done what it was permitted: what it advised in place of that is no longer to be done."""
        settled = {"status": Status.OK, "hint": "", "follow": ()}
        self.findings = [replace(one, **settled) if one.alternative else one for one in self.findings]  # type: ignore[arg-type]

    @property
    def most_urgent(self) -> list[Finding]:
        """The findings, worst first. A warning about the result comes before those of the time before the change."""

        def rank(number: int) -> tuple[int, bool]:
            one = self.findings[number]
            early = self.permitted and number < self.judged and one.status is Status.WARN
            return -list(Status).index(one.status), early

        return [self.findings[number] for number in sorted(range(len(self.findings)), key=rank)]

    def fail(
        self,
        name: str,
        hint: str,
        *,
        value: object = "",
        expected: object = "",
        worst: Status = Status.CRITICAL,
        stops: bool = True,
        follow: Sequence[Next] = (),
    ) -> None:
        """Record a CRITICAL, or a finding of the status `worst`."""
        self.require(name, False, hint, value=value, expected=expected, worst=worst, stops=stops, follow=follow)

    def judge(
        self,
        metric: Metric,
        value: float,
        hint: str = "",
        *,
        of: str = "",
        worst: Status = Status.CRITICAL,
        follow: Sequence[Next] = (),
    ) -> Status:
        """Compare a value with the environment's limits of a metric, or with its defaults.

        `of`: what was measured. `worst=WARN`: the run continues, whatever the value.
        """
        warn, critical = self.limit(metric)
        status = Status.OK if value <= warn else Status.WARN if value <= critical else worst  # NaN is `worst`
        limits = f"≤ {metric.show(warn)} (critical above {metric.show(critical)})"
        name = f"{metric.name} ({of})" if of else metric.name
        self.require(
            name, status is Status.OK, hint, value=metric.show(value), expected=limits, worst=status, follow=follow
        )
        return status

    def limit(self, metric: Metric) -> tuple[float, float]:
        """WARN above the first, CRITICAL above the second: the environment's thresholds, or the metric's defaults."""
        return self.limits.get(metric.name, metric.limits)

    def attach(self, evidence: Evidence) -> None:
        """Keep something to look at."""
        rows = tuple(tuple(map(without_logins, row)) for row in evidence.rows)
        kept = replace(evidence, rows=rows, text=without_logins(evidence.text), csv=without_logins(evidence.csv))
        self.evidence.append(kept)

    def table(
        self,
        name: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        most: int | None = None,
        csv: str = "",
    ) -> None:
        """Keep a table, every cell as text. With `most`, one more row states how many rows are left out. Without it the
        JSON has every row; the page shows 200. `csv`: all of it, for spreadsheets and pandas (`DataFrame.to_csv`)."""
        shown = [tuple(str(cell) for cell in row) for row in rows[:most]]
        if most is not None and len(rows) > most:
            shown.append((f"… {len(rows) - most:,} more", *[""] * (len(columns) - 1)))
        self.attach(Evidence(name, tuple(columns), tuple(shown), csv=csv))

    def fact(self, name: str, value: object) -> None:
        """One line of the page's head: what somebody reads first."""
        self.facts[name] = without_logins(str(value))

    def loses(self, *losses: Loss) -> None:
        """Record how much each replaced part lost, measured behind the fence: the page, the JSON report and those who
        read it have no other figure."""
        self.losses |= {loss.part: loss for loss in losses}
        self.fact("lost", losses_text(tuple(self.losses.values()), detailed=True))

    def undo_is(self, *runbooks: Next) -> None:
        """Record what undoes this run: the head of the page links their forms."""
        self.undo = runbooks
        self.fact("undo", ", ".join(map(str, runbooks)))

    def leave_out(self, *parts: str) -> None:
        """Parts that the environment lacks, and that this run therefore leaves out: one fact, no finding."""
        known = self.facts.get(NOT_CONFIGURED, "").split(", ")
        self.facts[NOT_CONFIGURED] = ", ".join(sorted({*filter(None, known), *parts}))

    def measure(self, what: str, size: int = 0, seconds: float = 0.0) -> None:
        """What this run did, and how long it took: `database backup`, so many bytes. By default it took all of the
        run's time until now."""
        self.measures.append(Measure(what, size, round(seconds or self.seconds, 3)))

    def plan(
        self,
        step: str,
        detail: str,
        *,
        size: int = 0,
        seconds: float = 0.0,
        by: Sequence[CarriesOut] = (),
        shared: bool = False,
    ) -> None:
        """One planned step with its bytes and an estimate of its seconds. `by` and `shared`: see `PlannedStep`. The log
        of the run names the step when it begins and when it ends."""
        self.plan_steps.append(PlannedStep(step, detail, size, seconds, tuple(one.name for one in by), shared))

    def pin(self, parameter: str, value: object) -> None:
        """What a parameter such as `latest` meant when this was judged: the plan's form says that instead."""
        self.pins[parameter] = value

    def pin_state(
        self,
        what: str,
        value: object,
        *,
        written: int = -1,
        lost: bool = False,
        tolerance: Tolerance | None = None,
        items: Sequence[str] = (),
    ) -> None:
        """What the plan found and a confirmed run must find again, such as the live database's OID. `written`: a
        position in bytes that ordinary writes advance (LSN, replication offset); `lost`: it is replaced, and later
        writes are lost. `tolerance`: how far a number may be from the planned one. `items`: digests of a list."""
        self.states[what] = Pin(str(value), written, lost, tolerance, tuple(items))

    def pin_question(self, what: str, asked: str) -> str:
        """Return what a parameter asked for, such as `latest`, and pin it. A plan's form has the answer instead (see
        `pin`), so a run that confirms the plan gets the question back from its fingerprint."""
        question = (self.pinned.planned(what) if self.pinned else "") or asked
        self.pin_state(what, question)
        return question

    def state_is(self, what: str, hint: str) -> None:
        """What state the system is in from here on, and what to run next, should the run fail from any cause."""
        self.state = Finding("state of the system", Status.CRITICAL, what, "", hint)
        self.journal.state(what, hint)

    def at_end(self, work: Callable[[], object]) -> None:
        """Do this when the run ends, however it ends: what it brought here for itself goes again."""
        self.closing.callback(work)

    def add_step(self, step: StepTime) -> None:
        """Called by probes and actions."""
        self.steps.append(step)

    def fail_if_critical(self) -> None:
        """End the run here where something critical was found that stops it.

        Raises:
            RunbookFailed: a finding is CRITICAL, and stops the run.
        """
        if self.is_stopped:
            raise RunbookFailed(self)

    def permit(self, *acts: Act, effect: Effect) -> Permit:
        """A permit for several changes at once; see `allow`. What `runbook.change` carries out needs none."""
        self.allow(*acts, effect=effect)
        return Permit(self.environment, acts)

    def allow(self, *acts: Act, effect: Effect) -> None:
        """Go on only where the run may change the system. `effect` is the plan's headline: what these acts do to the
        environment.

        Raises:
            RunbookFailed: a critical finding stands.
            PlanOnly: `confirm` is empty and the run not unattended (caught by `runbook(...)`, which ends PLANNED).
            NotConfirmed: `confirm` is something else than the environment's name, a schedule filled it in, the plan no
                longer fits, or nobody approved it.
        """
        self.fail_if_critical()
        self.acts, self.effect = acts, effect
        if self.pinned:
            self.pinned.describe(self)
        if not self.confirm and not self.unattended:
            self.planned = True
            if self.gate:
                self.gate.describe(self)
            raise PlanOnly
        if self.confirm and self.confirm != self.environment:
            raise NotConfirmed(
                f"confirm is “{self.confirm[:40]}”, which is not the environment's name",
                f"type {self.environment} in the field confirm, or leave it empty to see the plan",
            )
        if self.refused:
            raise NotConfirmed(self.refused, "name the runbook in unattended in the TOML, or remove confirm from it")
        if self.pinned:
            self.pinned.require(self)
        if self.gate:
            self.gate.require(self)
        self.require_lock()
        if self.lock and (also := self.lock.exclude()):
            self.fact("also locked", also)
        if self.pinned:
            self.pinned.begin(self)
        self.permitted, self.judged = True, len(self.findings)

    def require_lock(self) -> None:
        """Raises LockLost when another run may be changing the environment."""
        if self.lock:
            self.lock.require()

    @property
    def titled_sentence(self) -> str:
        """The sentence for a reader outside Prefect's page: it names the runbook and the environment."""
        return f"{self.runbook} on {self.environment}: {self.headline or self.sentence()}"

    def sentence(self, say: Callable[[str], str] = str, label: Callable[[str], str] = str) -> str:
        """Status, then what was done or is planned, the first reasons, and the next step; in English, or as `say` and
        `label` translate it: `headline` is in the environment's language."""
        found = self.most_urgent
        critical = [f for f in found if f.status is Status.CRITICAL]
        bad = critical or [f for f in found if f.status is Status.WARN]
        why = "; ".join(f"{label(f.name)}: {say(f.value)}".removesuffix(": ") for f in bad[:3])
        why += say(f" (and {len(bad) - 3} more)") if len(bad) > 3 else ""
        hint = next((text for f in bad if (text := f.next_step)), "")
        if self.status is Status.PLANNED:
            planned = say(f"{self.effect}. Nothing has changed." if self.effect else "Nothing has changed.")
            says = planned + (f" {label('Warning')}: {why}" if why else "")
        else:
            says = "; ".join(filter(None, ("" if self.is_stopped else say(self.outcome), why)))
        text = ": ".join(filter(None, (self.status, says))) + (f". {label('Next')}: {say(hint)}" if hint else "")
        return " ".join(text.split())

    def as_json(self) -> dict[str, Any]:
        """The JSON report, without `hash`."""
        return {
            "runbook": self.runbook,
            "environment": self.environment,
            "status": self.status.value,
            "started": self.started.isoformat(),
            "finished": (self.finished or datetime.now(UTC)).isoformat(),
            "seconds": round(self.seconds, 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "outcome": self.outcome,
            "facts": self.facts,
            "losses": [loss.as_json() for loss in self.losses.values()],
            "measures": [asdict(measure) for measure in self.measures],
            "steps": [
                {"name": s.name, "started": s.started.isoformat(), "seconds": round(s.seconds, 3), "status": s.status}
                for s in sorted(self.steps, key=lambda step: step.started)
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "plan": [asdict(step) for step in self.plan_steps],
            "evidence": [{**asdict(one), "csv": _sha256(one.csv)} for one in self.evidence],
            "previous": self.previous,
        }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest() if text else ""
