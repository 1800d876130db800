"""The database server of a full restore: judged where it runs; started, or made anew, where it does not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from blocks.environment import START_ORDER, Environment
from blocks.postgres.nodes import ask
from blocks.postgres.server import Postgres
from flows.database import restore_steps as database
from flows.database.waiting_commits import free_commits, judge_commits
from flows.recovery.full import stopped_server
from flows.recovery.full.start import create_and_start, other_databases, start_server
from runbook.guard.permit import Permit
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.host.services import ServiceStates, read_services
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.server.roles import create_roles, try_roles
from tasks.postgres.server.server import (
    Identity,
    Presence,
    Server,
    find_obstacles,
    presence,
    read_identity,
    read_server,
)


@dataclass(frozen=True)
class Found:
    """How the run found the system: the database server, which services ran, the database behind the live name.
    `others`: the other databases of a server that is down; None: unknown."""

    presence: Presence
    services: ServiceStates
    live: Identity | None
    others: tuple[str, ...] | None = None


def judge(report: Report, env: Environment, backup: Backup, jobs: int = 0) -> Found:
    """Inspect the server and the services. A dead database is the reason for a restore, not an obstacle to it."""
    services = read_services(env.services, env.services_in(START_ORDER))
    state = presence(env.postgres)
    _judge_roles(report, env, state)
    live, others = None, None
    if state == "up":
        live = _judge_running(report, env, backup, jobs)
        judge_commits(report, env)
    else:
        others = _judge_stopped(report, env, backup, state, jobs)
        _judge_standby(report, env)
    database.judge_space(report, env, content_in(backup).bytes, absent=state == "absent")
    running = ", ".join(role for role, runs in services.running.items() if runs) or "none"
    report.fact("services found running", running)
    return Found(state, services, live, others)


def _judge_roles(report: Report, env: Environment, state: Presence) -> None:
    """Every service that the run starts or stops has a name under [services.names]."""
    needed = [*(["redis"] if env.has("redis") else []), *([env.postgres.service] if state != "up" else [])]
    missing = [role for role in needed if role not in env.services.names]
    report.require(
        "services",
        not missing,
        "name them under [services.names]: this run stops and starts them",
        value=f"not named: {', '.join(missing)}" if missing else ", ".join(env.services.names),
        expected=", ".join(needed) or "none is needed",
    )


def _judge_stopped(
    report: Report, env: Environment, backup: Backup, state: Presence, jobs: int
) -> tuple[str, ...] | None:
    """Judge a server that is down or missing on a private instance. Returns its other databases, None if unknown."""
    others: tuple[str, ...] | None = None
    absent = state == "absent"
    what = "gone: a new one will be created" if absent else "down: it will be started"
    report.warn("database server", "nothing to do: this run restores it", value=what)

    def offer(postgres: Postgres, server: Server) -> None:
        nonlocal others
        others = other_databases(env, server)
        unknown = stopped_server.unknown_in(env)
        _judge_offer(report, env, backup, server, jobs, on=postgres, unknown=unknown)

    stopped_server.judge(report, env, backup, offer, absent=absent)
    return others


def _judge_standby(report: Report, env: Environment) -> None:
    """A standby that lives has what no backup has yet."""
    standing = ask(env.standby) if env.has("standby") else None
    if standing and standing.in_recovery:
        hint = "promote it (postgres-failover) instead, unless its data is bad too: that loses less than any backup"
        report.warn("standby", hint, value=f"{env.standby.host}:{env.standby.port} answers")


def _judge_running(report: Report, env: Environment, backup: Backup, jobs: int) -> Identity:
    _judge_offer(report, env, backup, read_server(env.postgres), jobs)
    return read_identity(env.postgres, env.postgres.database)


def _judge_offer(
    report: Report,
    env: Environment,
    backup: Backup,
    server: Server,
    jobs: int,
    *,
    on: Postgres | None = None,
    unknown: Collection[str] = (),
) -> None:
    """What a server must offer to this run. `on`: a private instance, on which the roles of the backup are created."""
    postgres = on or env.postgres
    database.judge_server(report, env, backup, server, roles_are_made=True, jobs=jobs, on=on, unknown=unknown)
    if server.is_bare:
        database.judge_requirements(report, try_roles(postgres, backup, server.roles, keep=on is not None))
        server = read_server(postgres)
    database.judge_login(report, env, server, on)
    database.judge_obstacles(report, find_obstacles(postgres, env.postgres.database))


def revive(report: Report, permit: Permit, env: Environment, backup: Backup, found: Found, jobs: int = 0) -> Identity:
    """A running server that holds the backup's roles; returns what is behind the live name now.

    Raises:
        OpsError: the server does not start, and what to do.
    """
    new = False
    if found.live is None:
        if new := found.presence == "absent":
            create_and_start(report, permit, env)
        else:
            new = start_server(report, permit, env, backup, found.others)
        live = _judge_running(report, env, backup, jobs)
        report.fail_if_critical()
    else:
        live = found.live
    free_commits(report, permit, env, after=live, new=new)
    server = read_server(env.postgres)
    if server.is_bare:
        made = create_roles(permit, env.postgres, backup, server.roles)
        if made.names:
            report.fact("roles created from the backup", ", ".join(made.names))
        if made.without_password:
            report.warn(
                "passwords of roles",
                "set them (ALTER ROLE … PASSWORD): a backup holds none",
                value=", ".join(made.without_password),
            )
    return live
