"""The application's health checks and smoke checks, as `[application]` configures them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx

from blocks.http_step import HttpStep, StepFailed
from blocks.places import Application
from blocks.services.service import Services
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.kinds import action, probe
from runbook.masking import without
from runbook.wait import until
from tasks.application.http_steps import StepClient, secrets_of
from tasks.host.services import refuse_ended

HEALTH_TIMEOUT_SECONDS = 3.0
ONCE_SECONDS = 10.0  # a health check that takes longer has failed
EVERY_SECONDS = 0.25
SHOWN = 200
VALUE = 40
ROLES = ("backend", "frontend")
NO_HEALTH = "not configured: [application] has no health check"
NO_SMOKE = "not configured: [application] has no smoke checks"


class HealthCheck(NamedTuple):
    """One check of one role: GET a URL, connect to host:port, or run a command."""

    role: str
    kind: Literal["path", "port", "command"]
    target: str


@dataclass(frozen=True)
class Health:
    """The checked targets, the number of healthy answers in a row, and the seconds until then. Without a configured
    check `targets` is empty, and `running` has the running services."""

    targets: tuple[str, ...]
    in_a_row: int
    seconds: float
    running: tuple[str, ...] = ()

    @property
    def configured(self) -> bool:
        """Whether the environment configures a health check."""
        return bool(self.targets)

    @property
    def answer(self) -> str:
        """The result as text."""
        if self.targets:
            where = " and ".join(self.targets)
            return f"{where}: healthy {self.in_a_row} times in a row after {self.seconds:.1f} s"
        seen = f"{', '.join(self.running)} run" if self.running else "nothing"
        return f"{NO_HEALTH}; checked: {seen}"


class SmokeCheck(NamedTuple):
    """One smoke check and its result."""

    check: str
    ok: bool
    seconds: float
    detail: str


@dataclass(frozen=True)
class SmokeResult:
    """The checks in order; those after a failed one are not run and not ok. No rows: none is configured."""

    rows: tuple[SmokeCheck, ...]

    @property
    def configured(self) -> bool:
        """Whether the environment configures smoke checks."""
        return bool(self.rows)

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(row.ok for row in self.rows)

    @property
    def detail(self) -> str:
        """The first failure, or that all passed."""
        if not self.rows:
            return NO_SMOKE
        bad = next((row for row in self.rows if not row.ok), None)
        return f"{bad.check}: {bad.detail}" if bad else f"{len(self.rows)} checks passed"


def health_checks(application: Application) -> tuple[HealthCheck, ...]:
    """Every health check that the environment configures."""
    found = list[HealthCheck]()
    for role, url, paths in (
        ("backend", application.url, application.health_path),
        ("frontend", application.frontend_url, application.frontend_health_path),
    ):
        named = [paths] if isinstance(paths, str) else paths
        found += [HealthCheck(role, "path", url.rstrip("/") + path) for path in named if path]
    if application.health_port:
        host = urlsplit(application.url).hostname or "127.0.0.1"
        found.append(HealthCheck("backend", "port", f"{host}:{application.health_port}"))
    if application.health_command:
        found.append(HealthCheck("backend", "command", " ".join(application.health_command)))
    return tuple(found)


@probe
def wait_healthy(
    application: Application, *, seconds: float = 120, in_a_row: int = 3, services: Services | None = None
) -> Health:
    """Run the configured health checks until all passed `in_a_row` times in a row (§8.2, step 7). Without a configured
    check it only checks that the application's `services` run, and the answer states it.

    Raises:
        OpsError: not healthy within `seconds`; the message has the last failure. Or a service has ended permanently.
    """
    checks = health_checks(application)
    roles = [role for role in ROLES if services and role in services.names]
    started, good, last = time.monotonic(), 0, "not checked"
    checked = {role for role in roles if not checks or any(check.role == role for check in checks)}

    def problem(client: httpx.Client) -> str:
        if checks:
            return next(filter(None, (_problem(client, application, check) for check in checks)), "")
        ended = [role for role in roles if services and not services.is_running(role)]
        return f"{', '.join(ended)} is stopped" if ended else ""

    def enough() -> bool:
        nonlocal good, last
        found = problem(client)
        good, last = (0, found) if found else (good + 1, last)
        if found and services:
            for role in checked:
                refuse_ended(services, role)
        return good >= in_a_row

    if not checks and not roles:
        return Health((), 0, 0.0)
    with _client(HEALTH_TIMEOUT_SECONDS) as client:
        try:
            until(enough, what="health", seconds=seconds, every_seconds=EVERY_SECONDS)
        except Unreachable:
            raise OpsError(
                f"the application is not healthy after {seconds:.0f} s: {last}",
                "check the logs of backend and frontend, and the components that the answer names",
            ) from None
    running = () if checks else tuple(roles)
    return Health(tuple(check.target for check in checks), good, time.monotonic() - started, running)


def answers(application: Application, role: str) -> bool:
    """Whether every configured health check of a role passes now; False where it has none."""
    checks = [check for check in health_checks(application) if check.role == role]
    if not checks:
        return False
    with _client(HEALTH_TIMEOUT_SECONDS) as client:
        return not any(_problem(client, application, check) for check in checks)


@probe
def read_problems(application: Application) -> dict[str, str]:
    """One round of health checks: role → problem, "" for a healthy one. A role without a check is missing."""
    found = dict[str, str]()
    with _client(ONCE_SECONDS) as client:
        for check in health_checks(application):
            found[check.role] = found.get(check.role) or _problem(client, application, check)
    return found


def _problem(client: httpx.Client, application: Application, check: HealthCheck) -> str:
    """The problem, e.g. "backend answers 503: database unreachable"; "" if it is healthy."""
    match check.kind:
        case "port":
            return _port_problem(check)
        case "command":
            return _command_problem(application)
    try:
        answer = client.get(check.target)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{check.role} at {check.target} does not answer ({type(error).__name__})"
    if answer.status_code in application.health_status:
        return ""
    body = json_object(answer)
    parts = [f"{part} {state}" for part, state in body.items() if part != "status" and state != "ok"]
    return f"{check.role} answers {answer.status_code}: {', '.join(parts)[:SHOWN] or answer.reason_phrase}"


def _port_problem(check: HealthCheck) -> str:
    host, _, port = check.target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), HEALTH_TIMEOUT_SECONDS).close()
    except OSError as error:
        return f"{check.role} at {check.target} accepts no connections ({error.strerror or type(error).__name__})"
    return ""


def _command_problem(application: Application) -> str:
    try:
        shell.run(
            application.health_command,
            environment=_variables(application),
            inherit=_inherit(application),
            timeout_seconds=ONCE_SECONDS,
        )
    except OpsError as error:
        return without(f"health_command: {error.message}", secrets_of(application))
    return ""


@action
def smoke_check(application: Application) -> SmokeResult:
    """Run the smoke checks (§8.4, phase 5): the configured requests in order, and the configured command.

    The records that the requests write are kept. A failure is a row that is not ok, never an error; secrets are masked.
    """
    rows: list[SmokeCheck] = []
    with StepClient(application, application.smoke) as client:
        checks = [(step.title, _step(client, step)) for step in application.smoke]
        if application.smoke_command:
            checks.append(("smoke_command", lambda: _smoke_command(application)))
        for name, check in checks:
            if rows and not rows[-1].ok:
                rows.append(SmokeCheck(name, False, 0.0, "not run: an earlier check failed"))
                continue
            started = time.monotonic()
            try:
                detail, ok = check(), True
            except StepFailed as error:
                detail, ok = str(error), False
            rows.append(SmokeCheck(name, ok, round(time.monotonic() - started, 3), detail))
    return SmokeResult(tuple(rows))


def _step(client: StepClient, step: HttpStep) -> Callable[[], str]:
    def check() -> str:
        taken = client.run(step)
        shown = (f"{name}: {client.masked(str(value))[:VALUE]}" for name, value in taken.items())  # mask before cutting
        return ", ".join(shown) or "as expected"

    return check


def _smoke_command(application: Application) -> str:
    try:
        done = shell.run(
            application.smoke_command,
            environment=_variables(application),
            inherit=_inherit(application),
            timeout_seconds=application.smoke_seconds,
        )
    except OpsError as error:
        raise StepFailed(without(error.message, secrets_of(application))) from None
    return without(done.stdout.strip().rpartition("\n")[2][:SHOWN], secrets_of(application)) or "exit status 0"


def _inherit(application: Application) -> tuple[str, ...]:
    return (*shell.NETWORK, *application.inherit)


def _variables(application: Application) -> dict[str, str]:
    """The environment of a command, with secrets: they never go into its argv."""
    return {
        "OPS_APPLICATION_URL": application.url,
        "OPS_APPLICATION_USER": application.user,
        "OPS_APPLICATION_PASSWORD": application.password.get_secret_value(),
        **{name: str(value) for name, value in application.secrets.get_secret_value().items()},
    }


def json_object(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer; {} if it is something else."""
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _client(timeout: float) -> httpx.Client:
    """A client without a proxy, which may not know an internal address."""
    return httpx.Client(timeout=timeout, trust_env=False)
