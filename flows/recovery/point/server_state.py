"""What belongs to the server and not to its databases, where a cluster is replaced as a whole: its configuration, which
stays, and is tried before the swap; its slots and settings, which do not stay and are named."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import psycopg

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices
from flows.database import restore_steps as database
from runbook.errors import OpsError
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from runbook.units import first_of
from tasks.cluster.configuration import AUTO, OWN, live_configuration, main_file
from tasks.cluster.container import ServerContainer, read_container
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.rehearsal import rehearse_start
from tasks.cluster.replaced import read_log_in_errors, read_role_settings, read_slots
from tasks.cluster.stopped import judge_configuration
from tasks.cluster.trial import StartRefused

CONFIGURATION, SLOTS = "configuration of the server", "replication slots"
SETTINGS = "settings of databases and roles"


REHEARSE = PlannedStep(
    "start the copy",
    "once, on a separate port, with exactly the configuration that the live server will use",
    seconds=1,
)


def judge(report: Report, env: Environment) -> None:
    """Judge the configuration that stays, and name the slots that are lost."""
    _judge_kept(report, env)
    judge_slots(report, env)


def _judge_kept(report: Report, env: Environment) -> None:
    postgres = env.postgres
    live, configuration = Path(postgres.data_directory).resolve(), live_configuration(postgres)
    check = "check pg_hba.conf and postgresql.auto.conf (ALTER SYSTEM) after the restore: later changes are missing"
    if configuration is None:
        report.warn(
            CONFIGURATION, check, value=f"from the base backup: {live} is missing", expected="of the live server"
        )
        return
    needed = OWN if not main_file(postgres) else (AUTO,)
    if missing := [name for name in configuration.missing if name in needed]:
        value = f"from the base backup: {', '.join(missing)}, missing in {live}"
        report.warn(CONFIGURATION, check, value=value, expected="of the live server")
    if configuration.skipped:
        hint = f"copy them into {live} after the restore, from the replaced directory"
        report.warn(
            "files of the configuration", hint, value=f"unreadable or too large: {', '.join(configuration.skipped)}"
        )
    report.fact("configuration kept", ", ".join(configuration.files) or "none in the data directory")
    if live.is_dir():
        with contextlib.suppress(OpsError):  # the run judges it by the start of the copy
            found = judge_configuration(postgres, _container(env))
            database.judge_requirements(report, [replace(one, name=CONFIGURATION) for one in found])
        _judge_log_in(report, env)


def _judge_log_in(report: Report, env: Environment) -> None:
    """A running server goes on with its former pg_hba.conf if the file has an error; it would not start again."""
    with contextlib.suppress(OpsError, psycopg.Error):  # it is down, or this login may not read them
        if errors := read_log_in_errors(env.postgres):
            hint = "correct that line, then run this again: the server would not start again with it"
            report.fail(CONFIGURATION, hint, value=first_of(errors), expected="can be read")


def judge_slots(report: Report, env: Environment, kept: Collection[str] = ()) -> None:
    """Name the slots that nothing makes again: the run makes the WAL receiver's, rejoin-standby the standby's. `kept`:
    those that the replacing cluster has."""
    own = {*kept, env.wal.slot} if env.has("wal") else {*kept}
    own |= {node.slot for node in env.nodes()}
    try:
        slots = [one for one in read_slots(env.postgres) if one.name not in own]
    except OpsError as error:
        report.warn(SLOTS, error.hint, value=f"not known: {error.message}")
        return
    if slots:
        report.warn(
            SLOTS,
            "stop their consumers first. Afterwards create the slots again; a logical subscriber needs a new copy of "
            "its tables (ALTER SUBSCRIPTION … REFRESH PUBLICATION, or a new subscription)",
            value=first_of([f"{one.name} ({'logical' if one.is_logical else 'physical'})" for one in slots], 10),
            expected="none: the restored cluster does not have them",
        )


def read_live_settings(env: Environment) -> frozenset[str] | None:
    """Read the settings of databases and roles before the server is stopped; None where it does not answer."""
    with contextlib.suppress(OpsError):
        return frozenset(read_role_settings.work(env.postgres))
    return None


def judge_copy(report: Report, live: frozenset[str] | None, copy: Postgres) -> None:
    """Name the settings of databases and roles that the promoted copy has, other than the `live` ones."""
    restored = read_role_settings(copy)
    differing = [f"{one} (no longer set)" for one in sorted((live or restored) - restored)]
    differing += sorted(restored - (live or restored))
    if differing:
        hint = "set them again after the restore (ALTER DATABASE … SET, ALTER ROLE … SET), if they are still right"
        report.warn(SETTINGS, hint, value=first_of(differing, 10), expected="as they are live")


def rehearse(report: Report, env: Environment, instance: PrivateInstance) -> None:
    """Start the proven copy once as the live server will start.

    Raises:
        OpsError, RunbookFailed: it does not start, or refuses the administrator. Nothing live was replaced.
    """
    live = Path(env.postgres.data_directory).resolve()
    try:
        found = rehearse_start(env.postgres, instance, _container(env))
    except StartRefused as error:
        if live.exists() or f"{live}/" not in error.message:
            raise
        hint = "nothing to do: the configuration names files in the data directory, which is missing until the swap"
        report.warn("start of the copy", hint, value=f"not tried: {error.message}")
        return
    database.judge_requirements(report, found)
    report.fail_if_critical()
    report.passed("start of the copy", value="with the configuration of the live server")


def _container(env: Environment) -> ServerContainer | None:
    """The server's container, if it runs in one."""
    return read_container(env.postgres, env.services) if isinstance(env.services, DockerServices) else None
