"""What a backup and a restore of Prefect's own database consist of, called with the open report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import prefect
from prefect.context import FlowRunContext

from blocks.environment import Environment
from flows.database import restore_steps
from flows.store import judge_key
from runbook.errors import OpsError
from runbook.guard.permit import Permit
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

HOLDERS_HINT = (
    "wait for them to end, or cancel them; a run that died frees its lock within two minutes. Then run it again"
)
COMMAND = "python -m flows.infrastructure.prefect.server restore --environment {0} --backup {1} --confirm {0}"
MOST_SHOWN = 20


def judge_encrypted(report: Report, store: Store) -> None:
    """Whoever has the dump has every secret that is in Prefect."""
    report.require(
        "encryption of the backup",
        bool(store.key.recipients),
        'add recipients = ["age1…", "age1…"] to [backups], one of them escrowed (docs/backup-stores.md)',
        value=f"to {len(store.key.recipients)} keys" if store.key.recipients else "none: [backups] has no recipients",
        expected="encrypted: the database holds the key to every secret in it",
    )


def judge_key_inside(report: Report, env: Environment) -> None:
    """Where the secrets' key is set outside (PREFECT_SERVER_ENCRYPTION_KEY), no backup of the database has it."""
    if not read_prefect_database(env.prefect_server).has_key:
        report.warn(
            "key of the secrets",
            "keep PREFECT_SERVER_ENCRYPTION_KEY where the backups are not: without it no "
            "secret can be read again; a Prefect without any secret has none yet",
            value="not in the database",
            expected="in the database",
        )


def version_told(report: Report, env: Environment) -> str:
    """Which Prefect wrote the database, where it answers: a backup is worth having of one that is down, too."""
    try:
        answer = read_api(env.prefect_server)
    except OpsError as error:
        report.warn("Prefect's API", error.hint or "look at its log", value=error.message)
        return f"Prefect {prefect.__version__} here"
    report.fact(
        "Prefect",
        f"{answer.version}; {answer.counts['deployments']} deployments, "
        f"{answer.blocks} blocks, {answer.counts['automations']} automations",
    )
    return f"Prefect {answer.version}"


def tell_stored(report: Report, env: Environment, store: Store) -> None:
    """The backups of Prefect that there are, newest first."""
    rows = [
        (one.name, duration(one.age_seconds), size(one.manifest.bytes), one.manifest.tool, one.verified or "never")
        for one in reversed(read_store(store, "prefect", env.name).backups)
    ]
    columns = ("backup", "age", "size", "taken with", "verified by a restore")
    report.table("Backups of Prefect", columns, rows[:MOST_SHOWN])


def judge_caller(report: Report, env: Environment, confirm: str) -> None:
    """A flow run would replace the database that it is written to."""
    report.require(
        "launched outside of Prefect",
        not (FlowRunContext.get() and confirm),
        f"on a host that reaches the database: {COMMAND.format(env.name, 'latest')}",
        value="a flow run" if FlowRunContext.get() else "the command line",
        expected="the command line: Prefect stops meanwhile, and forgets this run",
    )
    report.fail_if_critical()


def judge_revision(report: Report, chosen: Backup) -> None:
    """The Prefect that will run on it must be the one that wrote it; it is upgraded afterwards."""
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
    """What runs of Prefect, and which runs would be forgotten."""
    server = env.prefect_server
    found = read_services(server.manager(env.services), server.roles)
    report.fact("services found running", ", ".join(role for role, runs in found.running.items() if runs) or "none")
    if not live.oid:
        report.fact("live database", "there is none")
        return found
    try:
        inside = read_prefect_database(server)
    except OpsError as error:  # a damaged database is the reason for a restore
        report.warn("live database", "nothing to do: it is kept aside", value=error.message)
        return found
    runs = ", ".join(inside.runs[:5])
    report.prefer(
        "runs that are under way",
        not runs,
        "wait for them or cancel them: their ends would be forgotten, their processes go on",
        value=runs or "none",
    )
    judge_holders(report, env, inside)
    return found


def judge_holders(report: Report, env: Environment, inside: PrefectDatabase) -> None:
    """A restore frees every lock: a run that holds one would lose it half-way through its work, and another run could
    change the same environment. Where the API does not answer, a lease cannot be renewed, and lasts 90 s at most."""
    held = "; ".join(inside.holders)
    otherwise = Status.CRITICAL if held and answers(env.prefect_server) else Status.WARN
    report.require(
        "runs that hold a lock",
        not held,
        HOLDERS_HINT,
        value=held or "none",
        expected="none: a restore frees all locks",
        worst=otherwise,
    )


def refuse_holders(env: Environment) -> None:
    """Raises OpsError where a run has taken a lock since it was judged: building and proving a copy takes minutes."""
    try:
        held = read_prefect_database.work(env.prefect_server).holders
    except OpsError:  # a damaged database is the reason for a restore
        return
    if held:
        raise OpsError(f"a run took a lock during the restore: {'; '.join(held)}", HOLDERS_HINT)


def plan(report: Report, env: Environment, own: Environment, chosen: Backup, server: Server) -> None:
    """The plan's lines, and how to carry it out."""
    missing = [role for role in content_in(chosen).roles if role not in server.roles]
    if missing:
        report.plan("create roles", ", ".join(missing))
    restore_steps.plan_database(report, own, chosen)
    swap = report.plan_steps.pop()
    report.plan("settle the copy", "scheduled runs that are overdue go, slots of locks are freed", seconds=0.1)
    report.plan("stop Prefect", ", ".join(reversed(env.prefect_server.roles)), seconds=5)
    report.plan_steps.append(swap)
    report.plan(
        "start Prefect", f"{', '.join(env.prefect_server.roles)}; wait for {env.prefect_server.api_url}", seconds=15
    )
    report.plan("look", "deployments, automations, every block in clear; runs that ended since are marked cancelled")
    report.fact("to carry it out", COMMAND.format(env.name, chosen.name))


def make_roles(report: Report, permit: Permit, own: Environment, chosen: Backup, server: Server) -> object:
    """On a new cluster."""
    if not server.is_bare:
        return None
    made = create_roles(permit, own.postgres, chosen, server.roles)
    if made.names:
        report.fact("roles created from the backup", ", ".join(made.names))
    return made


@contextlib.contextmanager
def stopped(report: Report, env: Environment, found: ServiceStates, live: Identity) -> Iterator[None]:
    """Prefect's services, stopped; started again where the swap failed, or a run holds a lock."""
    server = env.prefect_server
    manager, roles = server.manager(env.services), list(reversed(server.roles))
    was_answering = bool(live.oid) and answers(server)
    try:
        if was_answering:
            refuse_holders(env)
        stop_services(manager, roles)
        if was_answering:  # from here on nobody takes one
            refuse_holders(env)
        yield
    except SwapUnknown:
        raise
    except BaseException:
        with contextlib.suppress(OpsError):
            start_services(manager, [role for role in server.roles if found.running.get(role)])
        report.state_is(
            "Prefect's database was not replaced; its services were started again",
            "look whether they run, then launch this again",
        )
        raise


def tell_swapped(report: Report, chosen: Backup, swapped: Swapped, settled: Settled) -> None:
    """What is live from here on, should the rest fail."""
    report.state_is(
        f"{chosen.name} is live, proven; the database it replaced is kept as {swapped.kept or 'nothing'}",
        "do not restore again: start Prefect's services by hand and look at their logs",
    )
    report.fact("old database", f"kept as {swapped.kept}" if swapped.kept else "there was none")
    report.fact("settled", f"{settled.overdue} overdue scheduled runs removed, {settled.slots} slots freed")


def bring_up(report: Report, env: Environment, rows: Mapping[str, int], swapped: Swapped) -> None:
    """The API first, then what works in the background; then whether all is there."""
    server = env.prefect_server
    manager = server.manager(env.services)
    started = start_services.after(swapped)(manager, server.roles[:1])
    ready = wait_for_api.after(started)(server)
    lost = end_lost_runs.after(ready)(server)
    started = start_services.after(lost)(manager, server.roles[1:]) if server.roles[1:] else started
    answer = read_api.after(started)(server)
    missing = missing_in(rows, answer)
    report.require(
        "what the API knows",
        not missing,
        "look at its log",
        value="; ".join(missing) or "everything",
        expected="every deployment and automation of the backup",
    )
    report.passed("secrets", value=f"{answer.blocks} blocks read in clear")
    report.fact("Prefect", f"{answer.version}; {', '.join(f'{n} {what}' for what, n in answer.counts.items())}")
    if lost:
        report.table(
            "Runs whose end is not in the backup (marked cancelled; their reports say how they ended)",
            ("run",),
            [(name,) for name in lost],
        )
