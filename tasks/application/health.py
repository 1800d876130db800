"""The application as its users see it: whether it is healthy, and whether its described smoke checks pass."""

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
ONCE_SECONDS = 10.0  # a health that takes longer is none
EVERY_SECONDS = 0.25
SHOWN = 200
VALUE = 40
ROLES = ("backend", "frontend")
NO_HEALTH = "not configured: [application] names no health check"
NO_SMOKE = "not configured: [application] describes no smoke checks"


class HealthCheck(NamedTuple):
    """One question to one part: GET an address, connect to host:port, or run a command."""

    role: str
    kind: Literal["path", "port", "command"]
    target: str


@dataclass(frozen=True)
class Health:
    """What was checked, how many times in a row it was healthy, and how long it took until then. Without a described
    check `targets` is empty, and `running` are the services that were seen to run."""

    targets: tuple[str, ...]
    in_a_row: int
    seconds: float
    running: tuple[str, ...] = ()

    @property
    def configured(self) -> bool:
        """Whether the environment describes a health check."""
        return bool(self.targets)

    @property
    def answer(self) -> str:
        """For a report."""
        if self.targets:
            times = f"{self.in_a_row} times in a row after {self.seconds:.1f} s"
            return f"{' and '.join(self.targets)} answered well {times}"
        seen = f"{', '.join(self.running)} run" if self.running else "nothing"
        return f"{NO_HEALTH}; checked: {seen}"


class Check(NamedTuple):
    """One row of phase 5."""

    check: str
    ok: bool
    seconds: float
    detail: str


@dataclass(frozen=True)
class SmokeResult:
    """The checks in order; after the first that fails the others are not run, and not ok. No rows: none described."""

    rows: tuple[Check, ...]

    @property
    def configured(self) -> bool:
        """Whether the environment describes smoke checks."""
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
    """Every check that the environment describes; none where it describes none."""
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
    """Run the described health checks until all passed `in_a_row` times in a row (§8.2, step 7). Where none is
    described, only that the `services` of the application run is checked, and the answer says so.

    Raises:
        OpsError: that did not happen within `seconds`; the last bad answer is in the message. Or one of `services` has
            ended for good: nobody waits for it.
    """
    checks = health_checks(application)
    roles = [role for role in ROLES if services and role in services.names]
    started, good, last = time.monotonic(), 0, "nothing was asked"
    asked = {role for role in roles if not checks or any(check.role == role for check in checks)}

    def problem(client: httpx.Client) -> str:
        if checks:
            return next(filter(None, (_problem(client, application, check) for check in checks)), "")
        ended = [role for role in roles if services and not services.is_running(role)]
        return f"{', '.join(ended)} does not run" if ended else ""

    def enough() -> bool:
        nonlocal good, last
        found = problem(client)
        good, last = (0, found) if found else (good + 1, last)
        if found and services:
            for role in asked:
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
                "look at the logs of backend and frontend, and at what the answer names",
            ) from None
    running = () if checks else tuple(roles)
    return Health(tuple(check.target for check in checks), good, time.monotonic() - started, running)


@probe
def read_problems(application: Application) -> dict[str, str]:
    """One round of health checks: role → what is wrong, "" where nothing is. A role without a check is missing."""
    found = dict[str, str]()
    with _client(ONCE_SECONDS) as client:
        for check in health_checks(application):
            found[check.role] = found.get(check.role) or _problem(client, application, check)
    return found


def _problem(client: httpx.Client, application: Application, check: HealthCheck) -> str:
    """What is wrong, e.g. "backend answers 503: database unreachable"; empty when it is healthy."""
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
        return f"{check.role} at {check.target} takes no connections ({error.strerror or type(error).__name__})"
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
    """Phase 5 of §8.4: the described requests one after the other, or the described command; nothing where none is.

    It leaves behind what its requests write. What fails is a row that is not ok, never an error; no secret is in any.
    """
    rows: list[Check] = []
    with StepClient(application, application.smoke) as client:
        checks = [(step.title, _step(client, step)) for step in application.smoke]
        if application.smoke_command:
            checks.append(("smoke_command", lambda: _smoke_command(application)))
        for name, check in checks:
            if rows and not rows[-1].ok:
                rows.append(Check(name, False, 0.0, "not run: the check before failed"))
                continue
            started = time.monotonic()
            try:
                detail, ok = check(), True
            except StepFailed as error:
                detail, ok = str(error), False
            rows.append(Check(name, ok, round(time.monotonic() - started, 3), detail))
    return SmokeResult(tuple(rows))


def _step(client: StepClient, step: HttpStep) -> Callable[[], str]:
    def check() -> str:
        taken = client.run(step)
        shown = (f"{name}: {client.masked(str(value))[:VALUE]}" for name, value in taken.items())  # a cut one is a part
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
    """What a command gets: secrets too, and never in its argv."""
    return {
        "OPS_APPLICATION_URL": application.url,
        "OPS_APPLICATION_USER": application.user,
        "OPS_APPLICATION_PASSWORD": application.password.get_secret_value(),
        **{name: str(value) for name, value in application.secrets.get_secret_value().items()},
    }


def json_object(answer: httpx.Response) -> dict[str, Any]:
    """What an answer holds; nothing where it is something else."""
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _client(timeout: float) -> httpx.Client:
    """Never through a proxy: an internal address would be asked of it."""
    return httpx.Client(timeout=timeout, trust_env=False)
