"""A decision tree as it is walked: what was asked, what was answered, the causes in the order of the tree, and what to
launch next. Called with the open report by the diagnoses of this chapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import psycopg

from blocks.environment import Environment
from blocks.postgres import first_line
from blocks.services import ServiceState
from flows.launch import command
from runbook.errors import OpsError
from runbook.form import Forms, read_forms
from runbook.report import Evidence, Finding, Report, Status
from tasks.logs.masking import masked
from tasks.services import names_of

T = TypeVar("T")

CAUSE = "likely cause"
NOTHING = "nothing found"
LOG_LINES = 100


@dataclass(frozen=True)
class Next:
    """A runbook to launch, its parameters filled in, and what for."""

    flow: str
    why: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    reminder: str = ""


@dataclass(frozen=True)
class Cause:
    """What is wrong, in one sentence; what to do; and the runbooks for it, the first one first. Of one `kind` the last
    that was found stands in the place of those before: it knows more."""

    what: str
    hint: str
    follow: tuple[Next, ...] = ()
    status: Status = Status.CRITICAL
    kind: str = ""


@dataclass
class Diagnosis:
    """What is known so far. The first critical cause is the likely one: the tree is walked from what everything else
    depends on."""

    report: Report
    env: Environment
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    unknown: list[tuple[str, OpsError]] = field(default_factory=list)

    def well(self, question: str, answer: object) -> None:
        """A probe that found what it should."""
        self.asked.append((question, str(answer), "as it should be"))

    def told(self, question: str, answer: object) -> None:
        """A probe whose answer alone says neither."""
        self.asked.append((question, str(answer), ""))

    def blame(self, question: str, answer: object, cause: Cause) -> None:
        """A probe that found a cause."""
        self.asked.append((question, str(answer), "a cause"))
        known = [number for number, one in enumerate(self.causes) if cause.kind and one.kind == cause.kind]
        self.causes = [one for number, one in enumerate(self.causes) if number not in known]
        self.causes.insert(known[0] if known else len(self.causes), cause)

    def skip(self, question: str, why: str, hint: str) -> None:
        """A probe that could not be made: the diagnosis is then not OK."""
        self.asked.append((question, why, "could not be asked"))
        self.unknown.append((question, OpsError(why, hint)))

    @contextmanager
    def asking(self, question: str) -> Iterator[None]:
        """A probe that fails is one that was not made."""
        try:
            yield
        except OpsError as error:
            self.skip(question, error.message, error.hint)
        except psycopg.Error as error:
            self.skip(question, f"PostgreSQL refuses: {first_line(error)}", "give the administrator that right")

    def ask(self, question: str, probe: Callable[[], T]) -> T | None:
        """The probe's answer; None where it could not be made."""
        with self.asking(question):
            return probe()
        return None

    def close(self, healthy: str) -> None:
        """The report's findings: the likely cause first, then the others, then what could not be asked."""
        report = self.report
        self.causes.sort(key=lambda one: one.status is not Status.CRITICAL)  # a warning is no cause of an outage
        findings = [Finding(CAUSE if not number else "also found", cause.status, masked(cause.what), "", cause.hint)
                    for number, cause in enumerate(self.causes)]  # fmt: skip
        if not self.causes:
            sure = not self.unknown
            value = NOTHING if sure else f"not found, and {len(self.unknown)} probes could not be made"
            hint = "" if sure else "make those probes possible, or make them by hand: the finding below says how"
            findings = [Finding(CAUSE, Status.OK if sure else Status.WARN, value, "", hint)]
        findings += [Finding(f"not measured: {question}", Status.WARN, masked(error.message), "an answer", error.hint)
                     for question, error in self.unknown]  # fmt: skip
        report.findings[:0] = findings
        report.facts = {CAUSE: findings[0].value, **report.facts}
        report.outcome = findings[0].value if self.causes or self.unknown else f"{NOTHING}: {healthy}"
        evidence, report.evidence = report.evidence, []
        self._tell_next()
        rows = [(question, masked(answer), verdict) for question, answer, verdict in self.asked]
        report.table("Decision tree, as it was walked", ("asked", "answer", "verdict"), rows)
        report.evidence += evidence

    def _tell_next(self) -> None:
        follow = list({(one.flow, str(one.parameters)): one for cause in self.causes for one in cause.follow}.values())
        if not follow:
            return
        forms = read_forms([self.env.name])
        lines = [line_of(number, one, forms, self.env.name) for number, one in enumerate(follow, 1)]
        self.report.attach(Evidence("Run next", text="\n".join(lines)))


def line_of(number: int, one: Next, forms: Forms, environment: str) -> str:
    """A runbook to launch, as a line of Markdown: its form, or its command where Prefect does not know it."""
    given = {"environment": environment, **one.parameters}
    link = forms.link(one.flow, environment, given, command(one.flow, environment, one.parameters))
    return f"{number}. {one.why}: {link}" + (f" — **{one.reminder}**" if one.reminder else "")


def worst_of(report: Report, judge: Callable[[], None], metric: str) -> Status:
    """What a check's own judgement says of one metric; its findings and tables stay in the report."""
    before = len(report.findings)
    judge()
    told = [one.status for one in report.findings[before:] if one.name.startswith(metric)]
    return told[0] if told else Status.WARN


def read_state(found: Diagnosis, role: str) -> tuple[ServiceState | None, str]:
    """What its manager says of a service, and that for people; None where it cannot be asked."""
    services, question = found.env.services, f"does the process of {role} live?"
    if role not in services.names:
        return None, "the environment names no service for it"
    try:
        state = services.state(role)
    except OpsError as error:
        found.skip(question, error.message, error.hint)
        return None, error.message
    told = f"{services.name_of(role)} is {state.told}, process {state.pid or 'none'}"
    found.told(question, told)
    return state, told


def tell_service(report: Report, env: Environment, role: str, shown: Callable[[str], str] = lambda text: text) -> str:
    """The last lines of a service's log (what may be `shown` of them) and the names of its environment, masked; returns
    those lines, "" where they cannot be had."""
    if role not in env.services.names:
        report.fact(f"log of {role}", f"not read: the environment names no service for {role}")
        return ""
    try:
        text = masked(shown(env.services.logs(role, LOG_LINES)))
        report.attach(Evidence(f"Log of {role}, its last {LOG_LINES} lines", text=fenced(text or "(it is empty)")))
    except OpsError as error:
        report.fact(f"log of {role}", f"could not be read: {error.message}")
        text = ""
    try:
        names = env.services.environment(role) or names_of(env.services.state(role).pid)
        told = sorted(names.items()) or [("(none, or neither its manager nor its process tells them)", "")]
        report.table(f"Environment of {role}", ("name", "value"), told)
    except OpsError as error:
        report.fact(f"environment of {role}", f"could not be read: {error.message}")
    return text


def fenced(text: str) -> str:
    """As a block of code."""
    return "```\n" + text.replace("```", "'''") + "\n```"
