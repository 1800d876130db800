"""The application follows a failover (§8.3): its connection string, its restart, its health."""

from __future__ import annotations

import contextlib
from functools import partial

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices
from flows.recovery.postgres.promotion import Phases
from runbook.change import Change, Check, Line
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.kinds import Bound
from runbook.next import Next
from runbook.report import Report
from tasks.application.connection_string import Switched, read_target, switch_target
from tasks.application.health import wait_healthy
from tasks.host.services import start_services, started_if_cancelled, stop_services
from tasks.postgres.replication.synchronous import address

HEALTH_SECONDS = 120


def plan_application(
    report: Report, env: Environment, new: Postgres, phases: Phases, *, restart: bool
) -> Line[[], None] | None:
    """Return the line by which the application uses the new primary; None without an application. `restart`: it has to
    be restarted, also where its connection string names the new primary already."""
    if not env.has("application"):
        return None
    roles = env.services_in(("backend",))
    if env.application.env_file and (restart or names_another(env, new)):
        switch = switch_target.bind(env.application, new)
        work = partial(_redirect, report, env, phases, switch, restart=restart)
        redirected = f"the application: {env.application.env_file}, then restart it"
        return Change(work, "redirect", redirected, seconds=10.0, by=[switch])
    work = partial(_redirect, report, env, phases, None, restart=restart)
    if restart and roles:
        return Change(work, "restart", "the application; its connection string is changed by hand", seconds=10.0)
    return Check(work, "verify", "the application is healthy")


def names_another(env: Environment, new: Postgres) -> str:
    """Return the server in the application's connection string if that is not the new primary; "" otherwise."""
    if not (env.has("application") and env.application.env_file):
        return ""
    target = read_target(env.application)
    return "" if address(new) in target.split(",") else target


def _redirect(
    report: Report, env: Environment, phases: Phases, switch: Bound[[], Switched] | None, *, restart: bool
) -> None:
    """Change the application's connection string, restart it, and wait until it is healthy.

    Raises:
        OpsError: it does not become healthy.
    """
    last: object = None
    with phases.timed("application"):
        if switch:
            last = switched = switch()
            restart |= switched.changed
            report.fact(
                "connection string",
                f"{switched.before} → {switched.after}" if switched.changed else switched.after,
            )
        elif not env.application.env_file:
            report.warn(
                "connection string of the application",
                "change it by hand and restart the application; set its file in [application] env_file",
                value="[application] env_file is not set",
            )
        roles = env.services_in(("backend",))
        if not roles:
            report.fact("application", "not restarted: the environment has no service for it")
            return
        _report_fixed_variable(report, env, roles[0])
        if restart:
            with started_if_cancelled(env.services, roles):
                stopped = stop_services.after(last)(env.services, roles)
                failpoint("failover: application stopped")
                last = start_services.after(stopped)(env.services, roles)
        health = wait_healthy.after(last)(env.application, seconds=HEALTH_SECONDS, services=env.services)
    if health.configured:
        report.passed("application", value=health.answer)
    else:
        report.fact("application", health.answer)


def _report_fixed_variable(report: Report, env: Environment, role: str) -> None:
    """A container keeps the variables that it was created with: a restart does not read the file again."""
    if not isinstance(env.services, DockerServices):
        return
    with contextlib.suppress(OpsError):  # the restart that follows reports a missing container
        if env.application.dsn_variable in env.services.environment(role):
            report.warn(
                "connection string of the container",
                "recreate the container: a restart does not read the file again",
                value="set in the container",
                follow=[Next("deploy-application", "recreate it", {"recreate": True})],
            )
