"""A decision tree as it is walked: what was asked, what was answered, the causes in the order of the tree, and what to
launch next. Called with the open report by the diagnoses of this chapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import psycopg

from blocks.environment import Environment
from blocks.postgres.server import first_line
from blocks.services.service import ServiceState
from runbook.errors import OpsError
from runbook.masking import MASK, masked, secret_parts, without
from runbook.next import Next
from runbook.page.form import Forms, read_forms
from runbook.page.markdown import escaped, fenced
from runbook.report import Evidence, Finding, Report, Status
from runbook.wait import within
from tasks.application.env_file import read_variables
from tasks.host.services import names_of
from tasks.postgres.upkeep.session import as_ops_error
from tasks.reports.evidence import secrets_of

T = TypeVar("T")

CAUSE = "likely cause"
NOTHING = "nothing found"
LOG_LINES = 100
PROBE_SECONDS = 60.0


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
        except psycopg.errors.InsufficientPrivilege as error:
            self.skip(question, f"PostgreSQL refuses: {first_line(error)}", "give the administrator that right")
        except psycopg.Error as error:
            refused = as_ops_error(error)
            self.skip(question, refused.message, refused.hint)
        except OSError as error:
            self.skip(question, f"{error.filename or 'this host'}: {error.strerror or error}", "let this user do that")

    def ask(self, question: str, probe: Callable[[], T]) -> T | None:
        """The probe's answer; None where it could not be made."""
        with self.asking(question):
            return within(PROBE_SECONDS, probe, "an answer")
        return None

    def clean(self, text: str) -> str:
        """What may stand in a report: none of the environment's own secrets, nor of its application's variables."""
        return masked(without(text, self._secrets))

    @cached_property
    def _secrets(self) -> frozenset[str]:
        with contextlib.suppress(OpsError):  # who cannot read them cannot have logged them either
            return frozenset(secrets_of(self.env.whole().values())) | secret_parts(self.variables)
        return frozenset()

    @cached_property
    def variables(self) -> dict[str, str]:
        """The application's own, of its file."""
        with contextlib.suppress(OpsError):
            return read_variables.work(self.env.application) if self.env.has("application") else {}
        return {}

    def close(self, healthy: str) -> None:
        """The report's findings: the likely cause first, then the others, then what could not be asked."""
        report = self.report
        self.causes.sort(key=lambda one: one.status is not Status.CRITICAL)  # a warning is no cause of an outage
        findings = [
            Finding(CAUSE if not number else "also found", cause.status, self.clean(cause.what), "", cause.hint)
            for number, cause in enumerate(self.causes)
        ]
        if not self.causes:
            sure = not self.unknown
            value = NOTHING if sure else f"not found, and {len(self.unknown)} probes could not be made"
            hint = "" if sure else "make those probes possible, or make them by hand: the finding below says how"
            findings = [Finding(CAUSE, Status.OK if sure else Status.WARN, value, "", hint)]
        for question, error in self.unknown:
            what, said = f"not measured: {question}", self.clean(error.message)
            findings.append(Finding(what, Status.WARN, said, "an answer", error.hint))
        report.findings[:0] = findings
        report.facts = {CAUSE: findings[0].value, **report.facts}
        report.outcome = findings[0].value if self.causes or self.unknown else f"{NOTHING}: {healthy}"
        evidence, report.evidence = report.evidence, []
        self._tell_next()
        rows = [(question, self.clean(answer), verdict) for question, answer, verdict in self.asked]
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
    """A runbook to launch, as a line of Markdown."""
    address = forms.next(replace(one, why=""), environment)
    return f"{number}. {escaped(one.why)}: {address}" + (f" — **{escaped(one.reminder)}**" if one.reminder else "")


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


def tell_service(found: Diagnosis, role: str, shown: Callable[[str], str] = lambda text: text) -> str:
    """The last lines of a service's log (what may be `shown` of them) and the names of its environment, masked; returns
    those lines, "" where they cannot be had."""
    report, env = found.report, found.env
    if role not in env.services.names:
        report.fact(f"log of {role}", f"not read: the environment names no service for {role}")
        return ""
    try:
        text = found.clean(shown(env.services.logs(role, LOG_LINES)))
        report.attach(Evidence(f"Log of {role}, its last {LOG_LINES} lines", text=fenced(text or "(it is empty)")))
    except OpsError as error:
        report.fact(f"log of {role}", f"could not be read: {error.message}")
        text = ""
    _tell_environment(found, role)
    return text


def _tell_environment(found: Diagnosis, role: str) -> None:
    """A unit tells what stands in it, its process what it has of files too; of a dead one its file is left."""
    services, names = found.env.services, dict[str, str]()
    if role == "backend":
        names.update(dict.fromkeys(found.variables, MASK))
    try:
        if services.is_here:
            names.update(names_of(services.state(role).pid))
        names.update(services.environment(role))
    except OpsError as error:
        found.report.fact(f"environment of {role}", f"could not be read: {error.message}")
    told = sorted(names.items()) or [("(none, or neither its manager nor its process tells them)", "")]
    found.report.table(f"Environment of {role}", ("name", "value"), told)
