"""What restore-database restores: one of our backups, or a dump that was left without a manifest."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.environment import Environment, Stores
from blocks.postgres import execute
from flows.database import expectations, steps
from flows.store import store_for
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import duration, size
from runbook.report import Report, Status
from tasks.catalogue import Backup
from tasks.postgres.content import read_counts
from tasks.postgres.copy import MAKE, REPLACE, Copy, content_in, copy_name, dump_in, oid_of
from tasks.postgres.fill import Source
from tasks.postgres.foreign import ForeignDump, is_foreign, read_foreign
from tasks.postgres.properties import Properties, read_properties
from tasks.postgres.server import Server

MOST_TABLES = 50


@dataclass(frozen=True)
class Restorable:
    """A dump, the attributes that its database gets, and the backup that can prove it: None where nothing can."""

    name: str
    source: Source
    properties: Properties
    bytes: int
    backup: Backup | None
    foreign: ForeignDump | None = None


def choose(report: Report, env: Environment, wanted: str, which: Stores, into: str, server: Server) -> Restorable:
    """Find what an operator means, and judge it.

    Raises:
        OpsError: there is no such backup or file, or it is not one for this.
        RunbookFailed: it is damaged.
    """
    if is_foreign(wanted):
        return _choose_foreign(report, env, wanted, which, server)
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
    return Restorable(backup.name, dump_in(backup), content.properties, content.bytes, backup)


def _choose_foreign(report: Report, env: Environment, wanted: str, which: Stores, server: Server) -> Restorable:
    found = read_foreign(env.postgres, store_for(env, "postgres", which).spool, wanted)
    report.fact("dump", f"{found.path}, written {found.written:%Y-%m-%d %H:%M:%S UTC}")
    report.warn(
        "no manifest",
        "it cannot be proven; take backups with backup-database: those can",
        value=f"{found.name} is a file of {size(found.path.stat().st_size)} and no more",
        expected="a backup with a manifest",
    )
    report.expect("end of the dump", found.complete, "take another: pg_dump did not end, rows are missing",
                  value="there" if found.complete else "missing", expected="pg_dump's last line")  # fmt: skip
    report.expect("server version", found.major <= server.major, f"restore to PostgreSQL {found.major} or newer",
                  value=server.text, expected=f"{found.major or 'not stated'} or newer")  # fmt: skip
    if found.database not in ("", env.postgres.database):
        report.warn("database in the dump", "make sure that this is meant", value=found.database,
                    expected=env.postgres.database)  # fmt: skip
    report.fail_if_critical()
    return Restorable(found.name, found.source, _properties(env), found.estimate_bytes, None, found)


def _properties(env: Environment) -> Properties:
    """A dump without a manifest says nothing of the database's owner, locale and rights: the live one's are taken."""
    with env.postgres.connect() as connection:
        there = execute(connection, "SELECT 1 FROM pg_database WHERE datname = %s", env.postgres.database)
        found = read_properties(connection, env.postgres.database if there else "template0")
    if there:
        return found
    return found.model_copy(update={"owner": env.postgres.user, "acl": (), "settings": (), "comment": ""})


def judge_name(report: Report, env: Environment, into: str) -> None:
    """Whether a database may be made under that name.

    Raises:
        OpsError: it is no name.
    """
    if not into.strip() or len(into.encode()) > 63 or "\0" in into:
        raise OpsError(f"“{into[:80]}” cannot name a database", "choose a name of at most 63 bytes")
    reserved = into.startswith(env.postgres.database + "__") or into == env.postgres.maintenance_database
    with env.postgres.connect() as connection:
        taken = bool(oid_of(connection, into))
    report.expect(
        "name of the new database",
        not taken and not reserved,
        "choose a name that nobody has; leave into empty to replace the live database",
        value=f"{into} is {'there already' if taken else 'reserved'}" if taken or reserved else into,
        expected="free",
    )


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
    report.plan(f"restore {chosen.name} beside", f"into {copy_name(target)}", size=chosen.bytes, seconds=seconds)
    proof = "against the manifest" if chosen.backup else "by the expectations alone: nothing says what was in it"
    report.plan("judge the copy", proof, seconds=seconds / 5)
    end = f"{copy_name(target)} becomes {target}"
    report.plan("name" if into else "swap", end if into else f"{end}; the old one is kept as {target}__old_…")


def prove(report: Report, env: Environment, chosen: Restorable, copy: Copy) -> object:
    """By content where there is a manifest; else what can be said without one.

    Raises:
        RunbookFailed: the copy is not what the manifest says, or breaks the application's rules.
    """
    if chosen.backup:
        return steps.prove_database(report, env, chosen.backup, copy)
    checking = expectations.start(report, env, copy.database, after=copy)
    counts = read_counts.after(copy)(env.postgres, copy.database)
    rows = sorted(counts.rows, key=lambda row: -row[1])
    report.expect("rows in the copy", sum(row[1] for row in rows) > 0, "choose another dump: this one has no rows",
                  value=f"{sum(row[1] for row in rows):,} in {len(rows)} tables")  # fmt: skip
    more = f" (the {MOST_TABLES} largest of {len(rows)})" if len(rows) > MOST_TABLES else ""
    report.table(f"In the copy{more}, compared with nothing", ("table", "rows"),
                 [(table, f"{count:,}") for table, count in rows[:MOST_TABLES]])  # fmt: skip
    expectations.tell(report, checking, "on the copy", migrated=False)
    report.fail_if_critical()
    return counts


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
