"""The database server of a full restore: judged while it runs or is down; started, or created where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blocks.environment import START_ORDER, Environment
from blocks.postgres.nodes import ask
from blocks.postgres.refusals import LoginRefused
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices
from flows.database import restore_steps as database
from flows.database.waiting_commits import free_commits, judge_commits
from flows.recovery.full.start import (
    FILES,
    create_and_start,
    judge_lost_databases,
    move_away,
    other_databases,
    start_server,
    wait_while_starting,
)
from flows.recovery.point.server_state import judge_slots
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.kinds import permitted_by
from runbook.next import Next
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.cluster.container import ServerContainer, read_container
from tasks.cluster.recovery_pages import find_invalid_page
from tasks.cluster.stopped import START, StoppedServer, judge_silent, read_stopped
from tasks.cluster.trial import StartRefused, trial
from tasks.host.disk import is_here
from tasks.host.services import ServiceStates, read_services
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.server.requirements import read_offline_requirements, read_preloads
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

Judge = Callable[[Postgres, Server], None]

NOT_JUDGED = "not judged while the server is down"
EVERYTHING = "roles, rights, locale, extensions, prepared transactions, log-in"
_DAMAGE = "damaged pages, which the recovery at its start may find"
_NEW, _ADMINISTRATOR = "new data directory", "log-in of the administrator"


@dataclass(frozen=True)
class FoundServer:
    """The system as the run found it: whether the database server answers, which services ran, the live database.
    `others`: the other databases of a server that is down; None: unknown."""

    presence: Presence
    services: ServiceStates
    live: Identity | None
    others: tuple[str, ...] | None = None

    @property
    def lost_databases(self) -> tuple[str, ...]:
        """The other databases that were lost with its data directory, and that a dump does not restore."""
        return (self.others or ()) if self.presence == "absent" else ()


def judge(report: Report, env: Environment, backup: Backup, jobs: int = 0) -> FoundServer:
    """Judge the server and the services. A database that is down is the reason for a restore, not an obstacle."""
    services = read_services(env.services, env.services_in(START_ORDER))
    state, silence = read_presence(env)
    judge_roles(report, env, *redis_role(env), *([env.postgres.service] if state != "up" else []))
    live, others = None, None
    if state == "up":
        live = _judge_running(report, env, backup, jobs)
        judge_commits(report, env)
    elif silence and (found := judge_silent(env.postgres, env.services, services.running, silence)):
        database.judge_requirements(report, found)
    else:
        others = _judge_stopped(report, env, backup, state, jobs)
        judge_standby(report, env)
    database.judge_space(report, env, content_in(backup).bytes, absent=state == "absent", backup=backup)
    running = ", ".join(role for role, runs in services.running.items() if runs) or "none"
    report.fact("services found running", running)
    return FoundServer(state, services, live, others)


def read_presence(env: Environment) -> tuple[Presence, OpsError | None]:
    """Read whether the server answers, and why it does not. A server that is starting is given time."""
    state = presence(env.postgres)
    if state != "down":
        return state, None
    silence = wait_while_starting(env.postgres)
    return (state if silence else presence(env.postgres)), silence


def judge_roles(report: Report, env: Environment, *roles: str) -> None:
    """Judge whether every service that the run starts or stops has a name under [services.names]."""
    missing = [role for role in roles if role not in env.services.names]
    report.require(
        "services",
        not missing,
        "add them to [services.names]: this run stops and starts them",
        value=f"missing: {', '.join(missing)}" if missing else ", ".join(env.services.names),
        expected=", ".join(roles) or "none",
    )


def redis_role(env: Environment) -> list[str]:
    """Return Redis's role, if the environment has Redis."""
    return ["redis"] if env.has("redis") else []


def _judge_stopped(
    report: Report, env: Environment, backup: Backup, state: Presence, jobs: int
) -> tuple[str, ...] | None:
    """Judge a server that is down or missing on a private instance: with its own catalogs, or those of a new cluster.
    What would fail after the start fails in the plan. Returns its other databases, None if unknown."""
    others: tuple[str, ...] | None = None
    absent = state == "absent"
    what = "missing: this run creates one" if absent else "down: this run starts it"
    report.fact("database server", what)
    if absent:
        judge_slots(report, env)

    def offer(postgres: Postgres, server: Server) -> None:
        nonlocal others
        others = other_databases(env, server, postgres)
        _judge_offer(report, env, backup, server, jobs, on=postgres)

    if stopped := _judge_offline(report, env, backup, offer, absent=absent):
        _judge_damage(report, env, stopped, others)
    hint = "use method=cluster: it restores all databases"
    return judge_lost_databases(report, env, env.name, hint) if absent else others


def _judge_damage(report: Report, env: Environment, stopped: StoppedServer, others: tuple[str, ...] | None) -> None:
    """Judge the pages that the recovery at the start reads. Where only the environment's database has damaged ones, the
    run keeps the data directory under another name."""
    try:
        invalid = find_invalid_page(env.postgres, stopped)
    except OpsError as error:
        hint = f"nothing to do, unless the start fails: then {move_away(env, others)}"
        report.warn(NOT_JUDGED, hint, value=f"{_DAMAGE}: {error.message}", expected="judged in the plan")
        return
    if not invalid:
        report.passed(FILES, value="every page that the recovery at the start reads is valid")
    elif others == ():
        hint = "nothing to do: this run keeps them under another name, and creates a new cluster"
        report.warn(FILES, hint, value=f"too damaged to start: {invalid}")
        judge_slots(report, env)
    else:
        report.fail(FILES, move_away(env, others), value=f"too damaged to start: {invalid}")


def judge_standby(report: Report, env: Environment) -> None:
    """A running standby has writes that no backup has."""
    standing = ask(env.standby) if env.has("standby") else None
    if standing and standing.in_recovery:
        hint = "promote it (postgres-failover) instead, unless its data is corrupt too: that loses less than any backup"
        report.warn(
            "standby",
            hint,
            value=f"{env.standby.host}:{env.standby.port} answers",
            follow=[Next("postgres-failover", "promote the standby", {"mode": "unplanned"})],
            alternative=True,
        )


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
) -> None:
    """Judge what the run needs from a server. `on`: a private instance, on which the backup's roles are created."""
    postgres = on or env.postgres
    database.judge_server(report, env, backup, server, roles_are_made=True, jobs=jobs, on=on)
    if server.is_bare:
        database.judge_requirements(report, try_roles(postgres, backup, server.roles, keep=on is not None))
        server = read_server(postgres)
    database.judge_login(report, env, server, on)
    database.judge_obstacles(report, find_obstacles(postgres, env.postgres.database))


def _judge_offline(
    report: Report, env: Environment, backup: Backup, offer: Judge, *, absent: bool
) -> StoppedServer | None:
    """Judge its files first. If they are fit, `offer` judges a private instance as it judges a live server. Returns the
    stopped server if that was possible."""
    found = read_offline_requirements(env.postgres, content_in(backup), absent=absent)
    database.judge_requirements(report, found)
    if not all(item.ok for item in found):
        _leave(report)
        return None
    try:
        here = is_here(env.postgres.host)
        container = None
        if here and isinstance(env.services, DockerServices):
            container = read_container(env.postgres, env.services)
        stopped = None if absent and here else read_stopped(env.postgres, container)
    except OpsError as error:
        _refuse(report, env, error.message)
        return None
    if stopped:
        database.judge_requirements(report, stopped.requirements)
        if not all(item.ok for item in stopped.requirements):
            _leave(report)
            return None
        if stopped.unjudged:
            _refuse(report, env, stopped.unjudged)
            return None
    return stopped if _try(report, env, stopped, offer, container) else None


def _try(
    report: Report, env: Environment, stopped: StoppedServer | None, offer: Judge, container: ServerContainer | None
) -> bool:
    """Judge a private instance. Returns whether it ran."""
    try:
        with trial(env.postgres, stopped, container) as postgres:
            report.passed(_ADMINISTRATOR, value="accepted")
            server = read_server(postgres)
            name = env.postgres.maintenance_database
            report.require(
                "maintenance database",
                postgres.maintenance_database == name or name in server.databases,
                "correct [postgres] maintenance_database, or create that database",
                value="present" if name in server.databases else "missing",
                expected=name,
            )
            if stopped:
                database.judge_requirements(report, read_preloads(postgres, stopped.preloaded))
            offer(postgres, server)
    except LoginRefused as error:
        report.fail(_ADMINISTRATOR, error.hint, value=error.message, expected="accepted")
    except StartRefused as error:
        report.fail(START if stopped else _NEW, error.hint, value=error.message, expected="starts")
    except OpsError as error:
        _refuse(report, env, error.message)
    else:
        return True
    return False


def _leave(report: Report) -> None:
    report.warn(NOT_JUDGED, "fix the findings above, then plan again", value=EVERYTHING, expected="judged in the plan")


def _refuse(report: Report, env: Environment, why: str) -> None:
    """What cannot be judged could refuse the run after the start: a person starts the server first."""
    role, host = env.postgres.service, env.postgres.host
    hint = f"start it ({env.services.names.get(role, role)}), then plan again: a running server is judged in the plan"
    if not is_here(host):
        hint += f". If it does not start, run this on a worker of {host}: it can create a new cluster"
    report.fail(NOT_JUDGED, hint, value=f"{EVERYTHING}: {why}", expected="judged in the plan")


def start_database(
    report: Report, permit: Permit, env: Environment, backup: Backup, found: FoundServer, jobs: int = 0
) -> Identity:
    """Start the server, or create one, and create the backup's roles. Returns the identity of the live database.

    Raises:
        OpsError: the server does not start.
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
        with permitted_by(permit):
            made = create_roles.bind(env.postgres, backup, server.roles)()
        if made.names:
            report.fact("roles created from the backup", ", ".join(made.names))
        if made.without_password:
            report.warn(
                "passwords of roles",
                "set them (ALTER ROLE … PASSWORD): a backup contains no passwords",
                value=", ".join(made.without_password),
            )
    return live
