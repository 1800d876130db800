"""Restores of the application's database (§1.2): to a staged copy, proven, swapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from blocks.environment import Environment, Stores
from blocks.postgres.server import Connection, execute
from flows.database import expectations, restore_steps
from flows.database import foreign_dumps as foreign
from flows.database.gate import DatabaseCopy, DatabaseGate, gate_of_backup
from flows.database.staged_restore import (
    SWAP_SECONDS,
    RestorableDatabase,
    StagedBuild,
    plan_rename,
    plan_sequences,
    plan_swap,
    report_sequences,
)
from flows.database.superseded import discard_surplus
from flows.database.waiting_commits import let_commits_return, plan_commits
from flows.pinned import pin_database
from flows.store import mark_verified, measured, store_for
from runbook.change import Carrier, Change, Line, State, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect, NoUndo, back_to
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration
from tasks.postgres.dump.foreign import is_foreign, read_foreign
from tasks.postgres.replication.synchronous import Synchrony
from tasks.postgres.restore.staged_copy import (
    Copy,
    building_name,
    check_jobs,
    content_in,
    copy_name,
    dump_in,
    is_reserved,
    oid_of,
)
from tasks.postgres.restore.swap import Swapped, advisory_lock
from tasks.postgres.server.properties import Properties, read_properties
from tasks.postgres.server.server import (
    Identity,
    Server,
    has_own_types,
    read_identity,
    read_server,
)


@dataclass(frozen=True)
class DatabaseReplacement:
    """The lines of a restore that replaces the live database."""

    report: Report
    env: Environment
    commits: Sequence[Change[[], Synchrony]]
    build: StagedBuild
    swap: Change[[Connection, Copy], Swapped]
    sequences: Sequence[Change[[str], None]]

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        return *self.commits, *self.build.lines, self.swap, *self.sequences

    def carry_out(self, carry: Carrier) -> Swapped:
        """Carry them out, except `sequences`.

        Raises:
            RunbookFailed, OpsError: nothing was replaced.
        """
        for one in self.commits:
            let_commits_return(self.report, self.env, carry, one)
        with advisory_lock(self.env.postgres) as guard:
            return carry(self.swap, guard, self.build.carry_out(carry))


@dataclass(frozen=True)
class DatabaseAddition:
    """The lines of a restore that makes another database, and changes nothing live."""

    report: Report
    env: Environment
    commits: Sequence[Change[[], Synchrony]]
    build: StagedBuild
    rename: Change[[Copy], str]

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        return *self.commits, *self.build.lines, self.rename

    def carry_out(self, carry: Carrier) -> None:
        """Carry them out.

        Raises:
            RunbookFailed, OpsError: there is no such database.
        """
        for one in self.commits:
            let_commits_return(self.report, self.env, carry, one)
        with advisory_lock(self.env.postgres):
            carry(self.rename, self.build.carry_out(carry))


def choose(
    report: Report, env: Environment, wanted: str, which: Stores, into: str, server: Server, accept: Sequence[str] = ()
) -> RestorableDatabase:
    """Find the backup or dump that the operator named, and judge it. `accept`: objects that need not be restored.

    Raises:
        OpsError: there is no such backup or file, or it is of another kind.
        RunbookFailed: it is damaged.
    """
    if is_foreign(wanted):
        found = read_foreign(env.postgres, store_for(env, "postgres", which).spool, wanted)
        foreign.judge(report, env, found, into, server)
        source = restore_steps.without_accepted(report, env, found.source, accept)
        report.fail_if_critical()
        return RestorableDatabase(found.name, source, _properties(env), found.estimate_bytes, None, found)
    backup = restore_steps.choose_backup(report, env, wanted, which, failed_too=bool(accept))
    content = content_in(backup)
    report.require(
        "content of the backup",
        content.part == "full" or bool(into),
        f"run restore-tables for chosen tables, or set into to restore {backup.name} as another database",
        value={"full": "everything", "schema": "definitions without rows", "tables": "some tables"}[content.part],
        expected="everything, to replace the live database",
    )
    if into and content.part == "tables":
        report.warn(
            "foreign keys",
            "take a full backup to have them: they reference rows of other tables",
            value="left out",
            expected="all",
        )
    restore_steps.judge_server(report, env, backup, server)
    if not into:
        restore_steps.judge_login(report, env, server)
    source = restore_steps.without_accepted(report, env, dump_in(backup), accept)
    return RestorableDatabase(backup.name, source, content.properties, content.bytes, backup)


def _properties(env: Environment) -> Properties:
    """Owner, locale and rights for a dump without a manifest: those of the live database, or else of a new one."""
    with env.postgres.connect() as connection:
        live = execute(connection, "SELECT 1 FROM pg_database WHERE datname = %s", env.postgres.database)
        found = read_properties(connection, env.postgres.database if live else "template0")
    if live:
        return found
    user = env.postgres.user
    new = {"owner": user, "acl": _new_rights(user), "settings": (), "comment": "", "connection_limit": -1}
    return found.model_copy(update={**new, "template": False})  # template0 is a template


def _new_rights(owner: str) -> tuple[str, ...]:
    """The privileges of a new database: https://www.postgresql.org/docs/current/ddl-priv.html"""
    return (
        *(f"{owner}: {right}" for right in ("CONNECT", "CREATE", "TEMPORARY")),
        "PUBLIC: CONNECT",
        "PUBLIC: TEMPORARY",
    )


def judge_name(report: Report, env: Environment, into: str) -> None:
    """Whether a new database can have this name.

    Raises:
        OpsError: it is not a valid name.
    """
    if not into.strip() or len(into.encode()) > 63 or "\0" in into:
        raise OpsError(f"“{into[:80]}” cannot name a database", "choose a name of at most 63 bytes")
    live = env.postgres.database
    with env.postgres.connect() as connection:
        taken = bool(oid_of(connection, into))
    reserved = (
        into.startswith(live + "__")
        or into == env.postgres.maintenance_database
        or is_reserved(into)
        or live in (copy_name(into), building_name(live, into))
    )
    why = "is the live database" if into == live else "already exists" if taken else "is reserved" if reserved else ""
    report.require(
        "name of the new database",
        not why,
        "leave into empty to restore the live database"
        if into == live
        else "choose a name that no database has and that is not reserved, or leave into empty",
        value=f"{into} {why}".strip(),
        expected="free",
    )


def _gate(report: Report, env: Environment, chosen: RestorableDatabase, live: Identity) -> DatabaseGate:
    name = env.postgres.database
    if chosen.backup:
        return gate_of_backup(report, env, chosen.backup, live.oid)
    unknown = Loss.not_known(name, "a foreign dump does not say when it began")
    return DatabaseGate(report, env, DatabaseCopy(name, 0, 0, ()), otherwise=lambda _: unknown)


def _effect(env: Environment, chosen: RestorableDatabase, live: Identity, gate: DatabaseGate) -> Effect:
    name = env.postgres.database
    undo = "undo-restore" if live.oid else NoUndo(f"{name} is missing, so nothing of it is kept")
    what = back_to(name, chosen.backup.manifest.taken) if chosen.backup else f"{name} is replaced by {chosen.name}"
    return Effect(what, undo, (gate.plan(),), SWAP_SECONDS)


def prove(
    report: Report, env: Environment, chosen: RestorableDatabase, copy: Copy, *, into: str, strict: bool
) -> object:
    """Prove the copy by content if there is a manifest; otherwise check it as a foreign dump.

    Raises:
        RunbookFailed: the copy differs from the manifest, breaks the expectations, or lacks parts of the live database.
    """
    if chosen.backup:
        return restore_steps.prove_database(report, env, chosen.backup, copy)
    return foreign.prove(report, env, copy, into, strict=strict)


def judge_loss(report: Report, env: Environment, chosen: RestorableDatabase, gate: DatabaseGate) -> None:
    """The writes that the restore loses, and the time against the RPO."""
    if chosen.backup:
        restore_steps.judge_data_loss(report, env, chosen.backup, gate)
    elif chosen.foreign:
        report.loses(gate.measured)
        age = (report.started - chosen.foreign.written).total_seconds()
        report.prefer(
            "data loss against the RPO",
            age <= env.rpo_seconds,
            "take backups with backup-database more often: every write since pg_dump started is lost",
            value=f"more than {duration(age)}",
            expected=f"at most {duration(env.rpo_seconds)}",
        )


@flow(name="restore-database", flow_run_name=RunName("restore-database {environment} {backup}"))
def restore_database(
    environment: str,
    backup: str = "latest",
    source: Stores = "backups",
    into: str = "",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    advance: bool = False,
    strict: bool = False,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    plan: str = "",
    confirm: str = "",
) -> Report:
    """データベースのリストア手順 (§1.2)

    Restores the database from a backup: builds a staged copy, proves it equal to the backup's snapshot, then swaps both
    names in one transaction. Run it when data was lost or corrupted and the rest of the system is healthy; otherwise
    run full-restore. With `into` it creates another database and changes nothing live.

    Services keep running; their sessions end at the swap (a fraction of a second) and must reconnect. The old database
    is kept: undo-restore swaps back, discard-superseded deletes it. Evidence: the table of the comparison.

    A pg_dump file (.dump, .sql, .sql.gz) or directory without a manifest restores as unproven. It must pass the
    expectations and contain every object and privilege of the live database. Its SQL runs as the administrator: name
    only a dump that you trust.

    Departs from the manual: nothing gets the live name before it is checked, nothing is dropped, and a truncated dump,
    an SQL error or a psql meta-command stops the restore.

    Args:
        environment: Environment (lab, staging, production …)
        backup: latest, a date (YYYYMMDD), a backup's name, or the path of a file (.dump, .sql, .sql.gz) or directory
        source: Store. copies: the replica store
        into: Restore to a database of this name (e.g. app_db_new). Empty: replace the live database
        jobs: Parallel jobs. 0: number of CPUs
        advance: Advance sequences to the numbers that the old database already used
        strict: Stop if a file without a manifest violates expectations, even if there is no live database
        accept: Objects to leave unrestored (a refused restore's report names them). Empty: restore everything
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    if is_foreign(backup):
        expectations.prepare(env)
    with runbook("Restore database", env, confirm, plan, changes=True, rank="recovery") as report:
        workers = check_jobs(jobs)
        if into:
            judge_name(report, env, into)
        chosen = choose(report, env, backup, source, into, read_server(env.postgres), accept)
        live = read_identity(env.postgres, env.postgres.database)
        what = f"{live.database} is unchanged" if live.oid else f"there is no database {live.database} yet"
        begun = State(what, "fix the findings above, then run this again")
        commits = plan_commits(report, env, begun)
        proof = partial(prove, report, env, chosen, into=into, strict=strict)
        build = StagedBuild.plan(report, env, chosen, workers, into, proof, begun)
        if into:
            _add(report, env, chosen, DatabaseAddition(report, env, commits, build, plan_rename(env, into)), into)
        else:
            gate = _gate(report, env, chosen, live)
            swap = plan_swap(report, env, chosen, live, gate, partial(_swapped, chosen))
            sequences = [plan_sequences(report, env)] if advance and live.oid else []
            replacement = DatabaseReplacement(report, env, commits, build, swap, sequences)
            _replace(report, env, chosen, replacement, _effect(env, chosen, live, gate), gate)
        if chosen.backup:
            mark_verified(report, chosen.backup)
            report.measure(*measured(chosen.backup))
        expectations.render(report, env)
    return report


def _add(report: Report, env: Environment, chosen: RestorableDatabase, addition: DatabaseAddition, into: str) -> None:
    pins = [lambda report: pin_database(report, env.postgres)]
    effect = Effect(f"{chosen.name} is restored as the new database {into}", f"DROP DATABASE {into}")
    with carrying_out(report, *addition.lines, effect=effect, pins=pins) as carry:
        addition.carry_out(carry)
    how = _proof_of(chosen)
    report.outcome = f"{into} is restored from {chosen.name}, {how}; nothing else was changed"


def _replace(
    report: Report,
    env: Environment,
    chosen: RestorableDatabase,
    replacement: DatabaseReplacement,
    effect: Effect,
    gate: DatabaseGate,
) -> None:
    pins = [lambda report: pin_database(report, env.postgres, replaced=True)]
    with carrying_out(report, *replacement.lines, effect=effect, pins=pins) as carry:
        swapped = replacement.carry_out(carry)
        if swapped.kept:
            report.undo_is(Next("undo-restore", "", {"kept": swapped.kept}))
        else:
            report.fact("undo", "none: there was no database before, so nothing is kept")
        for one in replacement.sequences:
            carry(one, swapped.kept)
    if not replacement.sequences:
        report_sequences(report, env, swapped.kept, advance=False)
    judge_loss(report, env, chosen, gate)
    report.fact("outage for clients", f"{swapped.outage_seconds:.2f} s")
    report.fact("old database", f"kept as {swapped.kept}" if swapped.kept else "there was none")
    if swapped.kept and "backend" in env.services.names and has_own_types(env.postgres, env.postgres.database):
        name = env.services.names["backend"]
        report.fact("restart", f"{name}: drivers (psycopg, asyncpg) cache the OIDs of the database's own types")
    how = _proof_of(chosen)
    report.outcome = f"{env.postgres.database} is restored from {chosen.name}, {how}"
    discard_surplus(report, env)


def _proof_of(chosen: RestorableDatabase) -> str:
    return "proven by content" if chosen.backup else "not proven: there is no manifest"


def _swapped(chosen: RestorableDatabase, swapped: Swapped) -> State:
    proven = "proven" if chosen.backup else "not proven"
    return State(
        f"{chosen.name} is live, {proven}; "
        + (f"the replaced database is kept as {swapped.kept}" if swapped.kept else "there was no database to keep"),
        "do not restore again: that would lose the writes since"
        + (f". To go back, run undo-restore with kept={swapped.kept}" if swapped.kept else ""),
    )
