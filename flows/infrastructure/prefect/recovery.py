"""Judgements and steps of the backup and the restore of Prefect's own database."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import prefect
from prefect.context import FlowRunContext

from blocks.environment import Environment
from flows.database import restore_steps
from flows.restart import start_again
from flows.store import judge_key
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.kinds import permitted_by
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups.catalogue import Backup
from tasks.backups.retention import read_store
from tasks.host.services import ServiceStates, read_services, start_services, stop_services
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.restore.swap import Swapped, SwapUnknown
from tasks.postgres.server.roles import create_roles
from tasks.postgres.server.server import Identity, Server
from tasks.prefect.server import (
    PrefectDatabase,
    Settled,
    answers,
    end_lost_runs,
    missing_in,
    read_api,
    read_prefect_database,
    revisions,
    wait_for_api,
)
from tasks.stores.store import Store

HOLDERS_HINT = "wait for them to end, or cancel them; a dead run frees its lock within two minutes. Then run this again"
COMMAND = "python -m flows.infrastructure.prefect.server restore --environment {0} --backup {1} --confirm {0}"


def judge_encrypted(report: Report, store: Store) -> None:
    """The backup must be encrypted: it contains every secret of Prefect."""
    report.require(
        "encryption of the backup",
        bool(store.key.recipients),
        'add recipients = ["age1…", "age1…"] to [backups], one of them escrowed (docs/backup-stores.md)',
        value=f"to {len(store.key.recipients)} keys" if store.key.recipients else "none: [backups] has no recipients",
        expected="encrypted: the database contains the key to all its secrets",
    )


def judge_key_inside(report: Report, env: Environment) -> None:
    """A key that is set by PREFECT_SERVER_ENCRYPTION_KEY is not in the database, nor in its backup."""
    if not read_prefect_database(env.prefect_server).has_key:
        report.warn(
            "key of the secrets",
            "store PREFECT_SERVER_ENCRYPTION_KEY apart from the backups: without it no restored secret is readable (a "
            "Prefect without any secret has no key yet)",
            value="not in the database",
            expected="in the database",
        )


def read_version(report: Report, env: Environment) -> str:
    """The version of the Prefect that wrote the database; WARN if it is down, which does not prevent a backup."""
    try:
        answer = read_api(env.prefect_server)
    except OpsError as error:
        report.warn("Prefect's API", error.hint or "check its log", value=error.message)
        return f"Prefect {prefect.__version__} here"
    report.fact(
        "Prefect",
        f"{answer.version}; {answer.counts['deployments']} deployments, "
        f"{answer.blocks} blocks, {answer.counts['automations']} automations",
    )
    return f"Prefect {answer.version}"


def attach_stored(report: Report, env: Environment, store: Store) -> None:
    """A table of the existing backups of Prefect, newest first."""
    rows = [
        (one.name, duration(one.age_seconds), size(one.manifest.bytes), one.manifest.tool, one.verified or "never")
        for one in reversed(read_store(store, "prefect", env.name).backups)
    ]
    columns = ("backup", "age", "size", "taken with", "verified by a restore")
    report.table("Backups of Prefect", columns, rows, most=20)


def judge_caller(report: Report, env: Environment, confirm: str) -> None:
    """A flow run must not replace the database that it is written to."""
    report.require(
        "launched outside Prefect",
        not (FlowRunContext.get() and confirm),
        f"run on a host that reaches the database: {COMMAND.format(env.name, 'latest')}",
        value="a flow run" if FlowRunContext.get() else "the command line",
        expected="the command line: Prefect stops during a restore and loses this run",
    )
    report.fail_if_critical()


def judge_revision(report: Report, chosen: Backup) -> None:
    """The installed Prefect must be the version that wrote the backup; upgrade it after the restore."""
    content, known = content_in(chosen), revisions()
    judge_key(report, chosen)
    report.fact("taken with", chosen.manifest.tool)
    report.require(
        "revision of Prefect's tables",
        content.revision == known[0],
        f"install the Prefect that took it ({chosen.manifest.tool}), restore, then upgrade (docs/prefect-upgrade.md)"
        if content.revision in known
        else f"install a newer Prefect than {prefect.__version__}: {chosen.manifest.tool} took it",
        value=content.revision or "none",
        expected=f"{known[0]} (Prefect {prefect.__version__})",
    )


def judge_services(report: Report, env: Environment, live: Identity) -> ServiceStates:
    """The running services of Prefect, and the runs whose end would be lost."""
    server = env.prefect_server
    found = read_services(server.manager(env.services), server.roles)
    report.fact("running services", ", ".join(role for role, runs in found.running.items() if runs) or "none")
    if not live.oid:
        report.fact("live database", "none")
        return found
    try:
        inside = read_prefect_database(server)
    except OpsError as error:  # a damaged database is the reason for a restore
        report.warn("live database", "nothing to do: it is kept under another name", value=error.message)
        return found
    runs = ", ".join(inside.runs[:5])
    report.prefer(
        "running flow runs",
        not runs,
        "wait for them or cancel them: the restore loses their results, and their processes continue",
        value=runs or "none",
    )
    judge_holders(report, env, inside)
    return found


def judge_holders(report: Report, env: Environment, inside: PrefectDatabase) -> None:
    """No run may hold a lock: a restore frees all of them, so a second run could change the same environment. If the
    API is down a lease cannot be renewed and lasts at most 90 s: then it is a WARN."""
    holders = "; ".join(inside.holders)
    worst = Status.CRITICAL if holders and answers(env.prefect_server) else Status.WARN
    report.require(
        "runs that hold a lock",
        not holders,
        HOLDERS_HINT,
        value=holders or "none",
        expected="none: a restore frees all locks",
        worst=worst,
    )


def refuse_holders(env: Environment) -> None:
    """Raises OpsError if a run has acquired a lock since the judgement: building and proving a copy takes minutes."""
    try:
        holders = read_prefect_database.work(env.prefect_server).holders
    except OpsError:  # a damaged database is the reason for a restore
        return
    if holders:
        raise OpsError(f"a run acquired a lock during the restore: {'; '.join(holders)}", HOLDERS_HINT)


def plan(report: Report, env: Environment, own: Environment, chosen: Backup, server: Server) -> None:
    """The planned steps, and the command that carries them out."""
    missing = [role for role in content_in(chosen).roles if role not in server.roles]
    if missing:
        report.plan("create roles", ", ".join(missing), by=[create_roles])
    restore_steps.plan_database(report, own, chosen)
    swap = report.plan_steps.pop()
    report.plan("settle the copy", "remove overdue scheduled runs, free the slots of locks", seconds=0.1)
    report.plan("stop Prefect", ", ".join(reversed(env.prefect_server.roles)), seconds=5, by=[stop_services])
    report.plan_steps.append(swap)
    report.plan(
        "start Prefect",
        f"{', '.join(env.prefect_server.roles)}; wait for {env.prefect_server.api_url}",
        seconds=15,
        by=[start_services, wait_for_api],
    )
    report.plan("check", "deployments, automations, every block in clear; mark runs that ended since as cancelled")
    report.fact("to carry it out", COMMAND.format(env.name, chosen.name))


def make_roles(report: Report, permit: Permit, own: Environment, chosen: Backup, server: Server) -> object:
    """Create the backup's roles on a new cluster; nothing on an existing one."""
    if not server.is_bare:
        return None
    with permitted_by(permit):
        made = create_roles.bind(own.postgres, chosen, server.roles)()
    if made.names:
        report.fact("roles created from the backup", ", ".join(made.names))
    return made


@contextlib.contextmanager
def services_stopped(report: Report, env: Environment, found: ServiceStates, live: Identity) -> Iterator[None]:
    """Stop Prefect's services during the block; start them again if the swap fails or a run holds a lock."""
    server = env.prefect_server
    manager, roles = server.manager(env.services), list(reversed(server.roles))
    was_answering = bool(live.oid) and answers(server)
    try:
        if was_answering:
            refuse_holders(env)
        stop_services(manager, roles)
        if was_answering:  # from here on no run can acquire one
            refuse_holders(env)
        yield
    except SwapUnknown:
        raise
    except BaseException:
        again = start_again(report, manager, [role for role in server.roles if role in found.wanted])
        if again:
            report.state_is("Prefect's database was not replaced; its services run again", "run this again")
        else:
            what = "Prefect's database was not replaced; its services do not all run again"
            report.state_is(what, "start them by hand, then run this again")
        raise


def report_swapped(report: Report, chosen: Backup, swapped: Swapped, settled: Settled) -> None:
    """The live database from here on, also if a later step fails."""
    report.state_is(
        f"{chosen.name} is live, proven; the database it replaced is kept as {swapped.kept or 'nothing'}",
        "do not restore again: start Prefect's services by hand and check their logs",
    )
    report.fact("old database", f"kept as {swapped.kept}" if swapped.kept else "none")
    report.fact("changed in the copy", f"{settled.overdue} overdue scheduled runs removed, {settled.slots} slots freed")


def bring_up(report: Report, env: Environment, rows: Mapping[str, int], swapped: Swapped) -> None:
    """Start the API, then the background services; then check that everything is restored."""
    server = env.prefect_server
    manager = server.manager(env.services)
    started = start_services.after(swapped)(manager, server.roles[:1])
    ready = wait_for_api.after(started)(server)
    lost = end_lost_runs.after(ready)(server)
    started = start_services.after(lost)(manager, server.roles[1:]) if server.roles[1:] else started
    answer = read_api.after(started)(server)
    missing = missing_in(rows, answer)
    report.require(
        "content of the API",
        not missing,
        "check its log",
        value="; ".join(missing) or "everything",
        expected="every deployment and automation of the backup",
    )
    report.passed("secrets", value=f"{answer.blocks} blocks read in clear")
    report.fact("Prefect", f"{answer.version}; {', '.join(f'{n} {what}' for what, n in answer.counts.items())}")
    if lost:
        report.table(
            "Runs that ended after the backup (marked cancelled; their reports have the results)",
            ("run",),
            [(name,) for name in lost],
        )
