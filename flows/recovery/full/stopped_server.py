"""A database server that is down or gone, judged by the plan of a full restore on a private instance: its own catalogs,
or those of a new cluster. What would refuse the run after the start refuses its plan."""

from __future__ import annotations

from collections.abc import Callable

from blocks.environment import Environment
from blocks.postgres.refusals import LoginRefused
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices
from flows.database import restore_steps as database
from runbook.errors import OpsError
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.cluster.stopped import START, Stopped, read_stopped
from tasks.cluster.trial import StartRefused, trial
from tasks.host.disk import is_here
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.server.requirements import read_offline_requirements, read_preloads
from tasks.postgres.server.server import Server, read_server

Judge = Callable[[Postgres, Server], None]

NOT_JUDGED = "not judged while the server is down"
_EVERYTHING = "roles, rights, locale, extensions, prepared transactions, log-in"
_LATER = "they are judged after its start, before anything is replaced"
_IN_CONTAINER = ("locale of the database", "extensions")
_DAMAGE = "damage in tables' files, which the recovery at its start may find"
_NEW, _ADMINISTRATOR = "new data directory", "log-in of the administrator"


def judge(report: Report, env: Environment, backup: Backup, offer: Judge, *, absent: bool) -> None:
    """By its files first. Where they refuse nothing, `offer` judges a private instance as it judges a live server."""
    found = read_offline_requirements(env.postgres, content_in(backup), absent=absent)
    database.judge_requirements(report, found)
    if not all(item.ok for item in found):
        _leave(report, "correct what is above first")
        return
    in_container = isinstance(env.services, DockerServices)
    stopped = None if absent and is_here(env.postgres.host) else read_stopped(env.postgres, in_container=in_container)
    if stopped:
        database.judge_requirements(report, stopped.requirements)
        refused = not all(item.ok for item in stopped.requirements)
        if why := stopped.unjudged or refused * "correct what is above first":
            _leave(report, why)
            return
    _try(report, env, stopped, offer, in_container=in_container)


def _try(report: Report, env: Environment, stopped: Stopped | None, offer: Judge, *, in_container: bool) -> None:
    try:
        with trial(env.postgres, stopped, in_container=in_container) as postgres:
            report.passed(_ADMINISTRATOR, value="accepted")
            server = read_server(postgres)
            name = env.postgres.maintenance_database
            report.require(
                "maintenance database",
                postgres.maintenance_database == name or name in server.databases,
                "correct [postgres] maintenance_database, or create that database",
                value="there" if name in server.databases else "missing",
                expected=name,
            )
            if stopped and not in_container:
                database.judge_requirements(report, read_preloads(postgres, stopped.preloaded))
            offer(postgres, server)
    except LoginRefused as error:
        report.fail(_ADMINISTRATOR, error.hint, value=error.message, expected="accepted")
    except StartRefused as error:
        report.fail(START if stopped else _NEW, error.hint, value=error.message, expected="it starts")
    except OpsError as error:
        _leave(report, error.message)
    else:
        left = [*(_IN_CONTAINER if in_container else ()), *([_DAMAGE] if stopped else [])]
        if left:
            report.fact(NOT_JUDGED, ", ".join(left))


def _leave(report: Report, why: str) -> None:
    report.warn(NOT_JUDGED, f"nothing to do: {_LATER}", value=f"{_EVERYTHING}: {why}", expected="judged in the plan")


def unknown_in(env: Environment) -> tuple[str, ...]:
    """The requirements that a private instance on this host cannot judge: a container has its own files."""
    return _IN_CONTAINER if isinstance(env.services, DockerServices) else ()
