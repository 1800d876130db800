"""The log-ins that a restore of the whole cluster needs, judged before its copy exists."""

from __future__ import annotations

from blocks.environment import Environment
from blocks.postgres.refusals import LoginRefused
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices
from flows.recovery.destruction import WalTarget
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.cluster.container import read_container
from tasks.cluster.stopped import read_stopped
from tasks.cluster.trial import trial
from tasks.postgres.server.requirements import Requirement, is_role_newer, read_login, read_superuser
from tasks.postgres.server.server import Presence, read_server

NOT_JUDGED = "not judged in the plan: log-ins to the restored cluster"
_ADMINISTRATOR = "log-in of the administrator"


def judge_logins(report: Report, env: Environment, presence: Presence, target: WalTarget) -> None:
    """Judge the log-ins of the administrator and the application, with the passwords, rights and pg_hba.conf of the
    live server, or of the files of a stopped one. If the application's role was changed after the target, the copy has
    it as it was before: what is refused now is a WARN."""
    try:
        found, changed = _read(env.postgres, target) if presence == "up" else _read_stopped(env, presence, target)
    except LoginRefused as error:
        found, changed = [Requirement(_ADMINISTRATOR, False, error.message, "accepted", error.hint)], False
    except OpsError as error:
        hint = "check the passwords in the environment and pg_hba.conf; the run judges the copy before it replaces data"
        report.warn(NOT_JUDGED, hint, value=error.message, expected="judged in the plan")
        return
    worst = Status.WARN if changed else Status.CRITICAL
    for one in found:
        report.require(one.name, one.ok, one.hint, value=one.value, expected=one.expected, worst=worst)


def _read(postgres: Postgres, target: WalTarget) -> tuple[list[Requirement], bool]:
    """Read them, and whether the application's role was changed after the target."""
    administrator = read_superuser(postgres)
    login = read_login(postgres, read_server(postgres), postgres.database)
    first = target.destruction.end if target.destruction else target.stop.after
    changed = bool(first and administrator.ok and is_role_newer(postgres, first.xid))
    return [administrator, *login], changed


def _read_stopped(env: Environment, presence: Presence, target: WalTarget) -> tuple[list[Requirement], bool]:
    """Read them from a private instance with the stopped server's catalogs and pg_hba.conf.

    Raises:
        LoginRefused: it refuses the administrator.
        OpsError: there is no such instance.
    """
    if presence == "absent":
        raise OpsError("the data directory is missing")
    container = read_container(env.postgres, env.services) if isinstance(env.services, DockerServices) else None
    stopped = read_stopped(env.postgres, container)
    if wrong := [item for item in stopped.requirements if not item.ok]:
        raise OpsError(f"{wrong[0].name}: {wrong[0].value}")
    if stopped.unjudged:
        raise OpsError(stopped.unjudged)
    with trial(env.postgres, stopped, container) as postgres:
        return _read(postgres, target)
