"""The start of a database server that was down. Files too damaged for crash recovery are replaced by a new cluster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres.refusals import Starting
from blocks.postgres.server import Postgres
from flows.database import restore_steps as database
from flows.database.waiting_commits import reattaching
from flows.store import store_for
from runbook.errors import OpsError, Unreachable
from runbook.report import Report
from runbook.wait import until
from tasks.backups.catalogue import Backup, find_backup
from tasks.cluster.content import cluster_in
from tasks.host.services import start_services, stop_services
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.restore.superseded import KEPT
from tasks.postgres.server.log_reasons import LogReason, find_reason, own_log
from tasks.postgres.server.new_cluster import create_cluster
from tasks.postgres.server.requirements import read_offline_requirements
from tasks.postgres.server.server import Server, has_tables

START_SECONDS = 60.0
RECOVERY_SECONDS = 12 * 3600.0
LOG_LINES = 200
DAMAGE = "damage"
FILES = "files of the database server"


def other_databases(env: Environment, server: Server, on: Postgres) -> tuple[str, ...]:
    """The databases of the server `on` that are neither the environment's nor a replaced copy. The maintenance database
    and `postgres` count if they have tables, or cannot be read."""
    names = _foreign(env, server.databases)
    return tuple(sorted(name for name in names if name not in _spare(env) or _may_have_tables(on, name)))


def other_databases_in(env: Environment, backup: Backup) -> tuple[str, ...]:
    """Return the databases of a base backup that are neither the environment's nor a replaced copy, nor the maintenance
    database or `postgres`: nobody can ask whether these have tables."""
    return tuple(name for name in _foreign(env, cluster_in(backup).databases) if name not in _spare(env))


def judge_lost_databases(report: Report, env: Environment, source: str, hint: str) -> tuple[str, ...]:
    """Warn about the other databases of a lost cluster, which no dump restores, by the newest base backup of `source`.
    Returns their names.

    Raises:
        Unreachable: the store does not answer.
    """
    try:
        backup = find_backup.work(store_for(env, "cluster"), "cluster", environment=source)
    except Unreachable:
        raise
    except (OpsError, ValueError):  # there is none
        return ()
    names = other_databases_in(env, backup)
    if names:
        value = f"{', '.join(names)}: in the lost cluster, and not in this dump"
        report.warn("other databases of the cluster", hint, value=value)
    return names


def _foreign(env: Environment, names: Iterable[str]) -> list[str]:
    return [name for name in names if name != env.postgres.database and not KEPT.search(name)]


def _spare(env: Environment) -> set[str]:
    return {env.postgres.maintenance_database, "postgres"}


def _may_have_tables(postgres: Postgres, database: str) -> bool:
    try:
        return has_tables(postgres, database)
    except OpsError:
        return True


def plan_of(others: tuple[str, ...] | None) -> str:
    """The plan's step: start a server that is down, also if crash recovery fails. None: its databases are unknown."""
    if others is None:
        return "start it; if its files are too damaged to start, this run stops: its databases are not known"
    if others:
        return f"start it; if its files are too damaged to start, this run stops: it also has {', '.join(others)}"
    return "start it; if its files are too damaged to start, keep them under another name and create a new cluster"


def move_away(env: Environment, others: tuple[str, ...] | None) -> str:
    """What a person does with a data directory that is too damaged to start, and may have other databases."""
    first = f"save its other databases ({', '.join(others)})" if others else "see that it has no other database"
    return f"{first}, then mv {env.postgres.data_directory} {env.postgres.data_directory}.damaged and run this again"


def start_server(report: Report, env: Environment, backup: Backup, others: tuple[str, ...] | None) -> bool:
    """Start a server that was down. Returns whether its data directory had to be replaced by a new cluster.

    The data directory is replaced only if the server's log names damage and the server has no other database; it is
    renamed, never deleted (https://www.postgresql.org/docs/current/wal-reliability.html).

    Raises:
        OpsError: the server does not start.
    """
    try:
        start_and_wait(env)
        return False
    except OpsError as error:
        reason = _read_reason(env)
        if reason is None or reason.kind != DAMAGE:
            raise
        if others != ():
            raise OpsError(error.message, f"{move_away(env, others)}; its log: {reason.line}") from None
    report.warn(
        FILES,
        "nothing to do: its data directory is kept under another name until you delete it",
        value=f"too damaged to start: {reason.line}",
    )
    database.judge_requirements(report, read_offline_requirements(env.postgres, content_in(backup), absent=True))
    report.fail_if_critical()
    create_and_start(report, env)
    return True


def create_and_start(report: Report, env: Environment) -> None:
    """A new cluster in the place of the data directory, started."""
    stop_services(env.services, [env.postgres.service])
    _leave_receiver(report, env)
    create_cluster.bind(env.postgres)()
    start_and_wait(env)


def _leave_receiver(report: Report, env: Environment) -> None:
    """Keep the WAL of a new cluster apart from that of the lost one, which a restore to a point may still need."""
    if env.has("standby") or env.has("wal"):
        report.warn("standby and WAL receiver", reattaching(env), value="out of date: they belong to the lost cluster")
    if env.has("wal") and env.wal.service in env.services.names:
        stop_services(env.services, [env.wal.service])


def start_and_wait(env: Environment) -> None:
    """Start the server's service and wait for an answer.

    Raises:
        OpsError: it does not start.
    """
    start_services(env.services, [env.postgres.service])
    wait_started(env)


def _read_reason(env: Environment) -> LogReason | None:
    """Why the server did not start, by its log. None: the log does not name the cause, or is not readable."""
    service = ""
    with contextlib.suppress(OpsError):
        service = env.services.logs(env.postgres.service, LOG_LINES)
    return find_reason(f"{service}\n{own_log(env.postgres)}")


def wait_while_starting(postgres: Postgres) -> OpsError | None:
    """Wait while a server reports that it is starting, at most START_SECONDS. Returns why it still does not answer."""
    last: OpsError | None = None

    def settled() -> bool:
        nonlocal last
        try:
            postgres.connect().close()
        except OpsError as error:
            last = error
            return not isinstance(error, Starting)
        last = None
        return True

    with contextlib.suppress(Unreachable):
        until(settled, what="the start of PostgreSQL", seconds=START_SECONDS)
    return last


def wait_started(env: Environment) -> None:
    """Wait until the server answers: while it reports that it is starting, it replays WAL, for hours if need be.

    Raises:
        OpsError: it does not start.
    """
    last = Unreachable("")

    def answers() -> bool:
        nonlocal last
        try:
            env.postgres.connect().close()
        except Unreachable as error:
            last = error
            raise
        return True

    data, end = Path(env.postgres.data_directory), time.monotonic() + RECOVERY_SECONDS
    while True:
        try:
            until(answers, what="the start of PostgreSQL", seconds=START_SECONDS)
            return
        except OpsError as error:
            if isinstance(error, Unreachable) and isinstance(last, Starting) and time.monotonic() < end:
                continue
            hint = f"check its log; if its files are damaged: mv {data} {data}.damaged, then run this again"
            raise OpsError(error.message, hint) from None
