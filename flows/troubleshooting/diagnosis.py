"""A decision tree: its questions, their answers, the causes in the order of the tree, and the runbooks to run next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import psycopg

from blocks.environment import Environment
from blocks.postgres.server import first_line
from blocks.services.service import ServiceState
from runbook.errors import OpsError
from runbook.masking import MASK, masked, secret_parts, without
from runbook.metrics import Metric
from runbook.next import Next
from runbook.page.markdown import fenced
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
    """What is wrong, in one sentence; the next step; the runbooks for it, best first. A later cause of the same `kind`
    replaces the earlier one: it is more precise."""

    what: str
    hint: str
    follow: tuple[Next, ...] = ()
    status: Status = Status.CRITICAL
    kind: str = ""


@dataclass
class Diagnosis:
    """The answers so far. The first critical cause is the likely one: the tree begins with what the rest needs."""

    report: Report
    env: Environment
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    unmeasured: list[tuple[str, OpsError]] = field(default_factory=list)

    def note(self, question: str, answer: object) -> None:
        """Record an answer that is neither good nor bad by itself."""
        self.answers.append((question, str(answer), ""))

    def record(self, question: str, answer: object, cause: Cause | None = None) -> None:
        """Record an answer: as expected, or with the cause that it shows."""
        self.answers.append((question, str(answer), "cause" if cause else "as expected"))
        if not cause:
            return
        known = [number for number, one in enumerate(self.causes) if cause.kind and one.kind == cause.kind]
        self.causes = [one for number, one in enumerate(self.causes) if number not in known]
        self.causes.insert(known[0] if known else len(self.causes), cause)

    def skip(self, question: str, why: str, hint: str) -> None:
        """Record a probe that could not run: the diagnosis is then at least WARN."""
        self.answers.append((question, why, "not measured"))
        self.unmeasured.append((question, OpsError(why, hint)))

    @contextmanager
    def asking(self, question: str) -> Iterator[None]:
        """Record a probe that fails as not measured."""
        try:
            yield
        except OpsError as error:
            self.skip(question, error.message, error.hint)
        except psycopg.errors.InsufficientPrivilege as error:
            self.skip(question, f"PostgreSQL refuses: {first_line(error)}", "grant this right to the administrator")
        except psycopg.Error as error:
            refused = as_ops_error(error)
            self.skip(question, refused.message, refused.hint)
        except OSError as error:
            reason = f"{error.filename or 'this host'}: {error.strerror or error}"
            self.skip(question, reason, "give the worker's user access to it")

    def ask(self, question: str, probe: Callable[[], T]) -> T | None:
        """Run a probe; None if it fails or takes longer than PROBE_SECONDS."""
        with self.asking(question):
            return within(PROBE_SECONDS, probe, "an answer")
        return None

    def clean(self, text: str) -> str:
        """Mask the environment's secrets and the values of the application's variables."""
        return masked(without(text, self._secrets))

    @cached_property
    def _secrets(self) -> frozenset[str]:
        with contextlib.suppress(OpsError):  # a process that cannot read them cannot have logged them
            return frozenset(secrets_of(self.env.whole().values())) | secret_parts(self.variables)
        return frozenset()

    @cached_property
    def variables(self) -> dict[str, str]:
        """The application's variables, from its env file."""
        with contextlib.suppress(OpsError):
            return read_variables.work(self.env.application) if self.env.has("application") else {}
        return {}

    def close(self, healthy: str) -> None:
        """Write the findings: the likely cause, the other causes, then the probes that could not run."""
        report = self.report
        self.causes.sort(key=lambda one: one.status is not Status.CRITICAL)  # a warning does not cause an outage
        findings = [
            Finding(
                CAUSE if not number else "also found",
                cause.status,
                self.clean(cause.what),
                hint=cause.hint,
                follow=cause.follow,
            )
            for number, cause in enumerate(self.causes)
        ]
        if not self.causes:
            complete = not self.unmeasured
            value = NOTHING if complete else f"not found; probes that could not run: {len(self.unmeasured)}"
            hint = "" if complete else "fix the probes that the findings below name, or answer their questions by hand"
            findings = [Finding(CAUSE, Status.OK if complete else Status.WARN, value, "", hint)]
        for question, error in self.unmeasured:
            reason = self.clean(error.message)
            findings.append(Finding(f"not measured: {question}", Status.WARN, reason, "an answer", error.hint))
        report.findings[:0] = findings
        report.facts = {CAUSE: findings[0].value, **report.facts}
        report.outcome = findings[0].value if self.causes or self.unmeasured else f"{NOTHING}: {healthy}"
        evidence, report.evidence = report.evidence, []
        rows = [(question, self.clean(answer), verdict) for question, answer, verdict in self.answers]
        report.table("Decision tree", ("question", "answer", "verdict"), rows)
        report.evidence += evidence


def status_of(report: Report, judge: Callable[[], None], metric: Metric) -> Status:
    """The status that a check gives to a metric; its findings and tables stay in the report."""
    before = len(report.findings)
    judge()
    found = [one.status for one in report.findings[before:] if one.name.startswith(metric.name)]
    return found[0] if found else Status.WARN


def read_state(found: Diagnosis, role: str) -> tuple[ServiceState | None, str]:
    """A service's state and its description; None if its manager does not answer."""
    services, question = found.env.services, f"is the process of {role} running?"
    if role not in services.names:
        return None, "the environment names no service for it"
    try:
        state = services.state(role)
    except OpsError as error:
        found.skip(question, error.message, error.hint)
        return None, error.message
    described = f"{services.name_of(role)} is {state.told}, process {state.pid or 'none'}"
    found.note(question, described)
    return state, described


def attach_service(found: Diagnosis, role: str, shown: Callable[[str], str] = lambda text: text) -> str:
    """Attach the end of a service's log, filtered by `shown`, and the names of its variables, all masked. Returns the
    log; "" if it cannot be read."""
    report, env = found.report, found.env
    if role not in env.services.names:
        report.fact(f"log of {role}", f"not read: the environment names no service for {role}")
        return ""
    try:
        text = found.clean(shown(env.services.logs(role, LOG_LINES)))
        report.attach(Evidence(f"Log of {role}, last {LOG_LINES} lines", text=fenced(text or "(empty)")))
    except OpsError as error:
        report.fact(f"log of {role}", f"not read: {error.message}")
        text = ""
    _attach_variables(found, role)
    return text


def _attach_variables(found: Diagnosis, role: str) -> None:
    """The service manager knows the unit's variables, the process also those of files; a dead process only its file."""
    services, names = found.env.services, dict[str, str]()
    if role == "backend":
        names.update(dict.fromkeys(found.variables, MASK))
    try:
        if services.is_here:
            names.update(names_of(services.state(role).pid))
        names.update(services.environment(role))
    except OpsError as error:
        found.report.fact(f"environment of {role}", f"not read: {error.message}")
    rows = sorted(names.items()) or [("(none found)", "")]
    found.report.table(f"Environment of {role}", ("name", "value"), rows)
