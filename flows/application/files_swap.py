"""The swap of the application's live directory: the lines that a restore of the files and its undo have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, ParamSpec

from blocks.environment import Environment
from flows.application.files_gate import USERS, Changes, measured_loss, pass_files
from flows.application.health_checks import report_health
from flows.restart import start_again
from runbook.change import Carrier, Change, Line, State
from runbook.errors import OpsError
from runbook.kinds import Bound
from runbook.report import Report
from tasks.application.connection_string import switch_target
from tasks.application.files import directory_of
from tasks.application.health import wait_healthy
from tasks.application.staged_files import FilesSwapped
from tasks.host.services import StoppedServicesList, read_services, start_services, stop_services

P = ParamSpec("P")

HEALTH_SECONDS = 120
UNCHANGED = State("the live files are unchanged", "fix the findings above, then run this again")
STOPPED = State("services may be stopped; no file was deleted", "run this again: it is safe")


@dataclass(frozen=True)
class FilesSwap(Generic[P]):
    """The lines of a swap. `changes` counts the loss in the replaced directory. `redirect`: the new files may name an
    old database server. `stop`, `start`: of the services that use the directory; none where the run has lines of its
    own for them."""

    report: Report
    changes: Changes
    swap: Change[P, FilesSwapped]
    redirect: Sequence[Change[[], None]]
    stop: Sequence[Change[[], StoppedServicesList]] = ()
    start: Sequence[Change[[object], None]] = ()

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        return [*self.stop, self.swap, *self.redirect, *self.start]

    @property
    def down(self) -> float:
        """Return the estimate of the seconds for which the services are stopped."""
        return sum(line.seconds for line in self.lines) if self.stop else 0.0

    def carry_out(self, carry: Carrier, *args: P.args, **kwargs: P.kwargs) -> FilesSwapped:
        """Swap the directory, report the loss, and start every service of it, also one that did not run before: a
        killed run may have stopped it.

        Raises:
            LossExceeded: more than was confirmed. Nothing was replaced.
        """
        for stopping in self.stop:
            carry(stopping)
        swapped = carry(self.swap, *args, **kwargs)
        self.report.loses(measured_loss(self.report, swapped.kept, self.changes))
        for redirecting in self.redirect:
            carry(redirecting)
        for starting in self.start:
            carry(starting, swapped)
        return swapped


def plan_files_swap(
    report: Report,
    env: Environment,
    action: Bound[P, FilesSwapped],
    incoming: str,
    *,
    replaced: Path,
    changes: Changes,
    what: str,
    needs: Sequence[Callable[[Report], object]] = (),
) -> FilesSwap[P]:
    """Plan the swap, with the services stopped. `incoming` becomes the live directory, `replaced` loses `changes`;
    `what`: the files that are live then."""
    live, roles = env.application.directory, env.services_in(USERS) if env.has("services") else []

    def swap(*args: P.args, **kwargs: P.kwargs) -> FilesSwapped:
        pass_files(report, env, replaced, changes)
        return action(*args, **kwargs)

    line = Change(
        swap,
        "swap",
        f"{live} is kept as {live}.superseded_<time>; {incoming} becomes {live}",
        seconds=0.1,
        by=[action],
        needs=needs,
        begun=STOPPED,
        failed=lambda _: UNCHANGED if directory_of(env.application).exists() else None,
        done=State(f"{what}; backend and frontend may be stopped", STOPPED.hint),
        is_final=True,
    )
    stop = [_plan_stop(StoppedUsers(report, env, roles))] if roles else []
    start = [_plan_start(report, env, roles)] if roles else []
    return FilesSwap(report, changes, line, _plan_connection_string(report, env), stop, start)


@dataclass
class StoppedUsers:
    """The services that use the application's directory, in the order of their stop and start. `wanted`: those that
    ran before."""

    report: Report
    env: Environment
    roles: Sequence[str]
    wanted: Sequence[str] = ()

    def stop(self) -> StoppedServicesList:
        """Stop them, each proven stopped."""
        states = read_services(self.env.services, self.roles)
        self.wanted = states.wanted
        return stop_services.after(states)(self.env.services, self.roles)

    def start_again(self) -> None:
        """Start those that ran before, on the files that are live still."""
        started = start_again(self.report, self.env.services, self.wanted)
        if started and directory_of(self.env.application).exists():
            self.report.state_is("the live files are unchanged; services run as before", UNCHANGED.hint)


def _plan_stop(users: StoppedUsers) -> Change[[], StoppedServicesList]:
    return Change(
        users.stop, "stop services", ", ".join(users.roles), seconds=2, begun=STOPPED, reverse=users.start_again
    )


def _plan_connection_string(report: Report, env: Environment) -> list[Change[[], None]]:
    """The connection string in the new files can be older than a failover."""
    application = env.application
    if not (application.env_file and env.has("postgres")):
        return []
    action = switch_target.bind(application, env.postgres)

    def redirect() -> None:
        try:
            done = action()
        except OpsError as error:
            report.warn("connection string of the application", error.hint, value=error.message)
            return
        if done.changed:
            report.fact("connection string of the application", f"{done.before} → {done.after}")

    server = f"{env.postgres.host}:{env.postgres.port}"
    detail = f"{application.env_file}, if it names another server than {server}"
    return [Change(redirect, "correct the connection string", detail, by=[action])]


def _plan_start(report: Report, env: Environment, roles: Sequence[str]) -> Change[[object], None]:
    return Change(
        partial(_start, report, env, roles),
        "start services",
        f"{', '.join(roles)}, then wait until healthy",
        seconds=8,
    )


def _start(report: Report, env: Environment, roles: Sequence[str], swapped: object) -> None:
    started = start_services.after(swapped)(env.services, roles)
    if "backend" in roles:
        health = wait_healthy.after(started)(env.application, seconds=HEALTH_SECONDS, services=env.services)
        report_health(report, health)
