"""A decision tree: its questions, their answers, the causes, and the runbooks to run next.

One rule orders the causes; the first one is the likely cause:

1. what hides the answers to other questions (HIDES): nothing else can be judged until it is fixed;
2. what clients suffer from now (HURTS);
3. what they do not notice now (THREATENS): it is over, or it will hurt;
4. within each of these, CRITICAL before WARN.

A cause that explains another one precedes it, with its rank and severity. Equal causes keep the order of the tree,
which begins with what the rest depends on. No cause is less severe than a later one: a page sorts by severity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import TypeVar

import psutil
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


class Impact(IntEnum):
    """How much a cause matters now: the order of the causes."""

    HIDES = 1
    HURTS = 2
    THREATENS = 3


@dataclass(frozen=True)
class Cause:
    """What is wrong, in one sentence; the next step; the runbooks for it, best first. A later cause of the same `kind`
    replaces the earlier one: it is more precise. `explains`: the kinds of causes that are its effects."""

    what: str
    hint: str
    follow: tuple[Next, ...] = ()
    status: Status = Status.CRITICAL
    kind: str = ""
    impact: Impact = Impact.HURTS
    explains: tuple[str, ...] = ()


def in_order(causes: Sequence[Cause]) -> list[Cause]:
    """The causes by the rule of this module; each as severe as what it explains."""

    def effects(cause: Cause) -> list[Cause]:
        direct = [one for one in causes if one.kind in cause.explains]
        return direct + [two for one in direct for two in effects(one)]

    def raised(cause: Cause) -> Cause:
        same = [cause, *effects(cause)]
        status = Status.CRITICAL if any(one.status is Status.CRITICAL for one in same) else cause.status
        return replace(cause, status=status, impact=min(one.impact for one in same))

    depth = {id(cause): sum(cause in effects(one) for one in causes) for cause in causes}
    ranked = [(raised(cause), depth[id(cause)]) for cause in causes]
    ranked.sort(key=lambda one: (one[0].impact, one[0].status is not Status.CRITICAL, one[1]))
    ordered = [cause for cause, _ in ranked]
    last = max((number for number, one in enumerate(ordered) if one.status is Status.CRITICAL), default=-1)
    return [replace(one, status=Status.CRITICAL) for one in ordered[: last + 1]] + ordered[last + 1 :]


@dataclass
class Diagnosis:
    """The answers so far, and the causes that they show."""

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
        self.causes = in_order(self.causes)
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


def stopped_process(found: Diagnosis, role: str) -> tuple[str, str]:
    """Whether a signal has stopped a service's process (SIGSTOP): what it means and the command that continues it."""
    services = found.env.services
    with contextlib.suppress(OpsError, psutil.Error):
        if role in services.names and services.is_here and role not in services.hosts:
            pid = services.state(role).pid
            if pid and psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                return f"a signal has stopped its process {pid} (SIGSTOP)", f"continue it: kill -CONT {pid}"
    return "", ""


def start_hint(found: Diagnosis, role: str) -> str:
    """How to start a service: `start it`, with the command for its manager where the environment names one."""
    services = found.env.services
    return f"start it: {services.start_command(role)}" if role in services.names else "start it"


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
