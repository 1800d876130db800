"""Services of an environment: their states, and stopping and starting them in order, each step proven."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.services.service import Services
from runbook.current import leaves, removed
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.log import logger
from runbook.masking import MASK
from runbook.wait import until

RESTART = "restart"
PROVE_SECONDS = 30.0
LOG_LINES = 3
Answers = Callable[[str], bool]


@dataclass(frozen=True)
class ServiceStates:
    """Role → whether its process runs. `wanted`: the roles that run, or that their manager starts again by itself: a
    run that ends before its change leaves these running."""

    running: Mapping[str, bool]
    wanted: tuple[str, ...]

    @property
    def stopped(self) -> tuple[str, ...]:
        """The stopped roles."""
        return tuple(role for role, runs in self.running.items() if not runs)


@dataclass(frozen=True)
class StoppedServicesList:
    """Roles in the order in which they were stopped, and which of them ran, or were being started."""

    roles: tuple[str, ...]
    were_running: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """Roles in the order in which they were started."""

    roles: tuple[str, ...]


@probe
def read_services(services: Services, roles: Sequence[str]) -> ServiceStates:
    """The states of the roles.

    Raises:
        Unreachable: the service manager does not answer.
        OpsError: it does not know a role.
    """
    running = {role: services.is_running(role) for role in roles}
    return ServiceStates(running, tuple(role for role in roles if running[role] or services.state(role).comes_back))


@action(idempotent=True)
def stop_services(services: Services, roles: Sequence[str]) -> StoppedServicesList:
    """Stop roles one after the other; the next one only when the one before is proven stopped (§8.2, step 1).

    Raises:
        Unreachable: the service manager does not answer.
        OpsError: a role cannot be stopped, or still runs afterwards.
    """
    were_running = tuple(role for role in roles if services.state(role).comes_back)
    for role in roles:
        if role in were_running:
            leaves(stopped(role), f"start {services.names[role]}, or run the runbook again")
        services.stop(role)
        _prove(services, role, running=False)
        logger().info("%s is stopped", role)
    return StoppedServicesList(tuple(roles), were_running)


@action(idempotent=True)
def start_services(
    services: Services, roles: Sequence[str], *, seconds: float = PROVE_SECONDS, answers: Answers | None = None
) -> Started:
    """Start roles one after the other (§8.2, step 6), then see that all run, each within `seconds`. That says little:
    see `wait_healthy`.

    `answers`: whether a role already serves. That proves its start too, and sooner: a manager reports a service as
    running only when it has survived its first second or more (supervisor's startsecs).

    Raises:
        Unreachable: the service manager does not answer.
        OpsError: a role does not start; the end of its log is in the hint.
    """
    for role in roles:
        start_one(services, role)
    for role in roles:
        with _told(services, role):
            _prove(services, role, running=True, seconds=seconds, answers=answers)
    logger().info("started: %s", ", ".join(roles))
    return Started(tuple(roles))


@action(of=lambda role: Act(RESTART, role), idempotent=True)
def restart_service(services: Services, role: str) -> Started:
    """Stop a role, then start it.

    Raises:
        as `stop_services` and `start_services`.
    """
    stop_services.work(services, [role])
    return start_services.work(services, [role])


@dataclass(frozen=True)
class StartedAgain:
    """The roles that run, and for each other one why it does not, with the end of its log."""

    running: tuple[str, ...]
    problems: Mapping[str, str]


@action(idempotent=True)
def start_again(services: Services, roles: Sequence[str]) -> StartedAgain:
    """Start the services that a failed or cancelled run had stopped. One that does not start keeps no other one
    stopped."""
    problems = dict[str, str]()
    for attempt in (start_one, _require_running):
        for role in (role for role in roles if role not in problems):
            try:
                attempt(services, role)
            except OpsError as error:
                if attempt is start_one and _comes_back(services, role):
                    continue  # a WAL receiver ends until its server, which was started before it, answers
                problems[role] = f"{error.message}; {error.hint}" if error.hint else error.message
    running = tuple(role for role in roles if role not in problems)
    logger().info("started again: %s", ", ".join(running) or "none")
    return StartedAgain(running, problems)


@contextlib.contextmanager
def started_if_cancelled(services: Services, roles: Sequence[str]) -> Iterator[None]:
    """If the run is cancelled inside the block, which restarts services, start them."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        start_again(services, roles)
        raise


def _comes_back(services: Services, role: str) -> bool:
    with contextlib.suppress(OpsError):
        return services.state(role).comes_back
    return False


def _require_running(services: Services, role: str) -> None:
    with _told(services, role):
        _prove(services, role, running=True)


def start_one(services: Services, role: str) -> None:
    """Start a role, without waiting for it.

    Raises:
        Unreachable: the service manager does not answer.
        OpsError: it does not start; the end of its log is in the hint.
    """
    with _told(services, role):
        services.start(role)
    removed(stopped(role))


def stopped(role: str) -> str:
    """A service that a run stopped, as reports name it."""
    return f"the service {role} is stopped"


@contextlib.contextmanager
def _told(services: Services, role: str) -> Iterator[None]:
    try:
        yield
    except Unreachable:
        raise
    except OpsError as error:
        raise OpsError(f"{role} does not start: {error.message}", _end_of_log(services, role)) from None


def _prove(
    services: Services,
    role: str,
    *,
    running: bool,
    seconds: float = PROVE_SECONDS,
    answers: Answers | None = None,
) -> None:
    """Wait for the state that the manager reports: "start" may return before it is RUNNING. A service that its manager
    has given up is not awaited."""
    wanted = "run" if running else "end"

    def answered() -> bool:
        with contextlib.suppress(OpsError):  # the manager's word counts, too
            return bool(answers and answers(role))
        return False

    def proven() -> bool:
        if services.is_running(role) is running or answered():
            return True
        state = services.state(role)
        if running and not state.comes_back:
            raise OpsError(f"{role} is stopped: {state.told}", "check its log and its processes")
        return False

    try:
        until(proven, what=f"that {role} {wanted}s", seconds=seconds)
    except Unreachable as error:
        raise OpsError(f"{role} does not {wanted}: {error.message}", "check its log and its processes") from None


def refuse_ended(services: Services, role: str) -> None:
    """A start is believed at once; what ends a moment later is found by whoever waits for its answer.

    Raises:
        OpsError: it has ended, and nothing starts it again.
    """
    try:
        state = services.state(role)
    except OpsError:  # its manager does not answer: the service's state is unknown
        return
    if not state.comes_back:
        raise OpsError(f"{role} has ended again: {state.told}", _end_of_log(services, role))


def names_of(pid: int) -> dict[str, str]:
    """The variables of a process of this host, with masked values; none if they cannot be read."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace") if pid else ""
    except OSError:
        return {}
    return {word.split("=", 1)[0]: MASK for word in text.split("\0") if "=" in word}


def _end_of_log(services: Services, role: str) -> str:
    try:
        last = [line.strip() for line in services.logs(role, LOG_LINES).splitlines() if line.strip()]
    except OpsError:
        last = []
    return f"its log ends: {' / '.join(last[-LOG_LINES:])[:500]}" if last else f"check the log of {role}"
