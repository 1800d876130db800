"""What restore-database restores: one of our backups, or a dump that was left without a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blocks.environment import Environment, Stores
from blocks.postgres import execute
from flows.database import foreign, steps
from flows.store import store_for
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import duration
from runbook.report import Report, Status
from tasks.catalogue import Backup
from tasks.postgres.copy import (
    MAKE,
    REPLACE,
    Copy,
    building_name,
    content_in,
    copy_name,
    dump_in,
    is_reserved,
    oid_of,
)
from tasks.postgres.fill import Source
from tasks.postgres.foreign import ForeignDump, is_foreign, read_foreign
from tasks.postgres.properties import Properties, read_properties
from tasks.postgres.server import Server
from tasks.postgres.superseded import Superseded

NEWEST = "newest"


@dataclass(frozen=True)
class Restorable:
    """A dump, the attributes that its database gets, and the backup that can prove it: None where nothing can."""

    name: str
    source: Source
    properties: Properties
    bytes: int
    backup: Backup | None
    foreign: ForeignDump | None = None


def choose(
    report: Report, env: Environment, wanted: str, which: Stores, into: str, server: Server, accept: Sequence[str] = ()
) -> Restorable:
    """Find what an operator means, and judge it. `accept`: what may be left out.

    Raises:
        OpsError: there is no such backup or file, or it is not one for this.
        RunbookFailed: it is damaged.
    """
    if is_foreign(wanted):
        found = read_foreign(env.postgres, store_for(env, "postgres", which).spool, wanted)
        foreign.judge(report, env, found, into, server)
        source = steps.without_accepted(report, env, found.source, accept)
        report.fail_if_critical()
        return Restorable(found.name, source, _properties(env), found.estimate_bytes, None, found)
    backup = steps.choose_backup(report, env, wanted, which)
    content = content_in(backup)
    report.expect(
        "what is in the backup",
        content.part == "full" or bool(into),
        f"restore-tables puts chosen tables into the live database; into=… makes another database of {backup.name}",
        value={"full": "everything", "schema": "definitions without rows", "tables": "some tables"}[content.part],
        expected="everything, to take the live database's place",
    )
    if into and content.part == "tables":
        report.warn("foreign keys", "they would need other tables' rows; take a full backup to have them",
                    value="left out", expected="none is missing")  # fmt: skip
    steps.judge_server(report, env, backup, server)
    if not into:
        steps.judge_login(report, env, server)
    source = steps.without_accepted(report, env, dump_in(backup), accept)
    return Restorable(backup.name, source, content.properties, content.bytes, backup)


def _properties(env: Environment) -> Properties:
    """A dump without a manifest says nothing of the database's owner, locale and rights: the live one's are taken, a
    new one's where there is none."""
    with env.postgres.connect() as connection:
        there = execute(connection, "SELECT 1 FROM pg_database WHERE datname = %s", env.postgres.database)
        found = read_properties(connection, env.postgres.database if there else "template0")
    if there:
        return found
    user = env.postgres.user
    new = {"owner": user, "acl": _new_rights(user), "settings": (), "comment": "", "connection_limit": -1}
    return found.model_copy(update={**new, "template": False})  # template0 itself is one


def _new_rights(owner: str) -> tuple[str, ...]:
    """Those that CREATE DATABASE gives: https://www.postgresql.org/docs/current/ddl-priv.html"""
    return (*(f"{owner}: {right}" for right in ("CONNECT", "CREATE", "TEMPORARY")),
            "PUBLIC: CONNECT", "PUBLIC: TEMPORARY")  # fmt: skip


def judge_name(report: Report, env: Environment, into: str) -> None:
    """Whether a database may be made under that name.

    Raises:
        OpsError: it is no name.
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
    why = "is the live database" if into == live else "is there already" if taken else "is reserved" if reserved else ""
    report.expect(
        "name of the new database",
        not why,
        "leave into empty to restore the live database"
        if into == live
        else "choose a name that nobody has, without our endings; leave into empty to replace the live database",
        value=f"{into} {why}".strip(),
        expected="free",
    )


def choose_superseded(report: Report, found: Sequence[Superseded], kept: str) -> Superseded:
    """The database to go back to.

    Raises:
        OpsError: there is none of that name.
    """
    chosen = [old for old in found if kept in (NEWEST, old.name)]
    if not chosen:
        there = ", ".join(old.name for old in found[:5])
        hint = f"those that are there, newest first: {there}" if there else "no restore has replaced a database here"
        raise OpsError(f"there is no database “{kept[:80]}” to go back to", hint)
    report.fact("database to go back to", chosen[0].name)
    report.pin("kept", chosen[0].name)
    return chosen[0]


def act(env: Environment, into: str) -> Act:
    """The deed that needs the permit."""
    return Act(MAKE, into) if into else Act(REPLACE, env.postgres.database)


def plan(report: Report, env: Environment, chosen: Restorable, into: str) -> None:
    """The plan's lines."""
    if chosen.backup and not into:
        steps.plan_database(report, env, chosen.backup)
        return
    seconds = chosen.bytes / steps.RESTORE_BYTES_PER_SECOND
    target = into or env.postgres.database
    beside = building_name(env.postgres.database, into) if into else copy_name(target)
    with env.postgres.connect() as connection:
        if oid_of(connection, beside):
            report.plan("drop", f"{beside}: what a run that ended early left")
    report.plan(f"restore {chosen.name} beside", f"into {beside}", size=chosen.bytes, seconds=seconds)
    proof = "against the manifest" if chosen.backup else "by the expectations alone: nothing says what was in it"
    report.plan("judge the copy", proof, seconds=seconds / 5)
    end = f"{beside} becomes {target}"
    report.plan("name" if into else "swap", end if into else f"{end}; the old one is kept as {target}__old_…")


def prove(report: Report, env: Environment, chosen: Restorable, copy: Copy, into: str, *, strict: bool) -> object:
    """By content where there is a manifest; else what can be said without one.

    Raises:
        RunbookFailed: the copy is not what the manifest says, breaks the application's rules, or lacks what the live
            database has.
    """
    if chosen.backup:
        return steps.prove_database(report, env, chosen.backup, copy)
    return foreign.prove(report, env, copy, into, strict=strict)


def tell_lost(report: Report, env: Environment, chosen: Restorable) -> None:
    """What is lost by going back to it."""
    if chosen.backup:
        steps.tell_window(report, env, chosen.backup)
    elif chosen.foreign:
        age = (report.started - chosen.foreign.written).total_seconds()
        report.expect(
            "data loss against the RPO",
            age <= env.rpo_seconds,
            "every write since pg_dump began is lost; the file's date says when it ended",
            value=f"more than {duration(age)}",
            expected=f"at most {duration(env.rpo_seconds)}",
            otherwise=Status.WARN,
        )
