"""Judgements and steps of the backup and the restore of Prefect's own database."""

from __future__ import annotations

import prefect
from prefect.context import FlowRunContext

from blocks.environment import Environment
from flows.store import judge_key
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups.catalogue import Backup
from tasks.backups.retention import read_store
from tasks.host.services import ServiceStates, read_services
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.server.server import Identity
from tasks.prefect.server import (
    PrefectDatabase,
    answers,
    read_api,
    read_prefect_database,
    revisions,
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
