"""What a dump without a manifest is judged by: what it says of itself, the expectations, and the live database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psycopg

from blocks.environment import Environment
from blocks.postgres.server import first_line
from flows.database import expectations
from runbook.errors import OpsError, Unreachable
from runbook.report import Report, Status
from runbook.units import size
from tasks.integrity import Expectations
from tasks.postgres.content import relations
from tasks.postgres.content.content import RowCounts, read_counts
from tasks.postgres.content.relations import Relation, read_parts, read_relations
from tasks.postgres.dump.foreign import ForeignDump
from tasks.postgres.restore.staged_copy import Copy
from tasks.postgres.server.server import Server, read_identity

MOST_SHOWN = 50
Relations = Mapping[str, Relation]
INTO = "into=… makes another database of it and touches nothing live"
RIGHTS = (
    "take the dump with owners and rights (pg_dump without -O and -x); if this is the only one: restore it with into=…"
    ", GRANT and ALTER … OWNER TO there, dump that database (pg_dump -F c) and restore the new dump"
)
MISSING = (
    f"{INTO}. Is it the whole of an older state? Create there what is missing (migrations), dump it (pg_dump -F c) and "
    "restore the new dump"
)


def judge(report: Report, env: Environment, found: ForeignDump, into: str, server: Server) -> None:
    """Before anything is built.

    Raises:
        RunbookFailed: it is not whole, of a newer server, or lacks tables that the live database has.
    """
    report.fact("dump", f"{found.path}, written {found.written:%Y-%m-%d %H:%M:%S UTC}")
    report.warn(
        "no manifest",
        "it cannot be proven, and its SQL runs as administrator: name only a dump that you "
        "trust; take backups with backup-database: those can",
        value=f"{found.name} is a dump of {size(found.bytes)} and no more",
        expected="a backup with a manifest",
    )
    report.require(
        "end of the dump",
        found.complete,
        "take another: pg_dump did not end, rows are missing",
        value="there" if found.complete else "missing",
        expected="pg_dump's last line",
    )
    report.require(
        "server version",
        found.major <= server.major,
        f"restore to PostgreSQL {found.major} or newer",
        value=server.text,
        expected=f"{found.major or 'not stated'} or newer",
    )
    if found.database not in ("", env.postgres.database):
        report.warn(
            "database in the dump", "make sure that this is meant", value=found.database, expected=env.postgres.database
        )
    if not found.fenced:
        report.warn(
            "psql",
            r"update PostgreSQL's programs: only newer ones (15.14, 16.10, 17.6, 18) have \restrict",
            value="no command to psql was found in the text; psql itself does not refuse them",
            expected="it does",
        )
    if found.orphans:
        report.fail(
            "foreign keys to tables that are not in the dump",
            INTO if not into else "take a dump of the whole database to have them",
            value="left out: " + _some([one.removeprefix(" FK CONSTRAINT ") for one in found.orphans]),
            expected="none",
            worst=_severity(into),
        )
    if found.tables is not None and not into and (live := _read_live(report, env)):
        lacking = [
            one.key for one in live.values() if one.kind == "table" and f"{one.schema}.{one.name}" not in found.tables
        ]
        report.require(
            "tables in the dump",
            not lacking,
            MISSING,
            value=f"missing: {_some(lacking)}" if lacking else len(found.tables),
            expected="every table of the live database",
        )
    report.fail_if_critical()


def prove(report: Report, env: Environment, copy: Copy, into: str, *, strict: bool) -> object:
    """What can be said of the copy: its rows, the application's rules, and how it compares with the live database. With
    no live database a broken rule does not end the run, unless it is `strict`.

    Raises:
        RunbookFailed: it has no rows, breaks the rules, lacks what is live, or shuts the application's role out.
    """
    gone = not into and not read_identity(env.postgres, env.postgres.database).oid
    counts = read_counts.after(copy)(env.postgres, copy.database)
    rows = sum(row[1] for row in counts.rows)
    live = _read_live(report, env)
    tables = frozenset((one.schema, one.name) for one in live.values() if one.kind == "table" and not into)
    origin = expectations.Origin(tables=tables)
    checking = expectations.start(report, env, copy.database, after=counts, origin=origin) if rows else None
    _tell_rows(report, counts, rows, into)
    copied = read_relations.after(counts)(env.postgres, copy.database, env.postgres.user)
    lacking = relations.missing(live, copied)
    if live:
        had = read_parts(env.postgres, env.postgres.database)
        has = read_parts.after(counts)(env.postgres, copy.database)
        _judge_missing(report, live, (*lacking, *relations.missing_parts(had, has)), into)
    _judge_rights(report, env, live, copied, into)
    if checking:
        _tell_expectations(report, checking.result(), into, stops=strict or not gone)
    elif env.suites:
        report.warn("expectations on the copy", "there are no rows that they could be about", value="not measured")
    report.fail_if_critical()
    return counts


def _severity(into: str) -> Status:
    """What would be an outage under the live name is worth knowing under another."""
    return Status.WARN if into else Status.CRITICAL


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_live(report: Report, env: Environment) -> Relations:
    """What is live; nothing where there is no live database, or where it is too damaged to be read."""
    name = env.postgres.database
    if not read_identity(env.postgres, name).oid:
        return {}
    try:
        return read_relations(env.postgres, name, env.postgres.user)
    except Unreachable:
        raise
    except (OpsError, psycopg.Error) as error:
        why = error.message if isinstance(error, OpsError) else first_line(error)
        report.warn(
            "comparison with the live database",
            "make sure yourself that nothing is missing in the dump",
            value=f"not measured: {name} cannot be read: {why}",
        )
        return {}


def _tell_rows(report: Report, counts: RowCounts, total: int, into: str) -> None:
    rows = sorted(counts.rows, key=lambda row: -row[1])
    hint = (
        "it has definitions only; choose another dump to have rows"
        if into
        else f"choose another dump: this one has definitions only ({INTO})"
    )
    report.require(
        "rows in the copy",
        total > 0,
        hint,
        value=f"{total:,} in {len(rows)} tables",
        expected="some",
        worst=_severity(into),
    )
    more = f" (the {MOST_SHOWN} largest of {len(rows)})" if len(rows) > MOST_SHOWN else ""
    report.table(
        f"In the copy{more}, compared with nothing",
        ("table", "rows"),
        [(table, f"{count:,}") for table, count in rows[:MOST_SHOWN]],
    )


def _judge_missing(report: Report, live: Relations, lacking: Sequence[str], into: str) -> None:
    if into and lacking:
        report.fact("not in the copy, but live", _some(lacking))
    elif not into:
        report.require(
            "everything that is live is in the copy",
            not lacking,
            MISSING,
            value=f"missing: {_some(lacking)}"
            if lacking
            else f"{len(live)} tables, views, sequences, functions and types, with their columns, "
            "constraints, indexes, triggers and policies",
            expected="nothing is missing",
        )
    if lacking:
        report.table("Live, and not in the copy", ("what",), [(key,) for key in lacking[:MOST_SHOWN]])


def _judge_rights(report: Report, env: Environment, live: Relations, copied: Relations, into: str) -> None:
    """What the application could do before the swap it must be able to do after it."""
    lost = relations.lost_rights(live, copied) if live else relations.unreadable(copied)
    report.require(
        f"rights of {env.postgres.user} in the copy",
        not lost,
        RIGHTS if not into else f"GRANT them before {env.postgres.user} uses it, or take the dump without -O and -x",
        value=f"missing: {_some(lost)}" if lost else f"{len(copied)} objects",
        expected="as in the live database" if live else "may read every table",
        worst=_severity(into),
    )
    if lost:
        shown = [(one,) for one in lost[:MOST_SHOWN]]
        report.table(f"What {env.postgres.user} may not do in the copy", ("what",), shown)
    if others := relations.other_owners(live, copied):
        report.warn(
            "owners in the copy",
            "ALTER … OWNER TO, where that is not meant",
            value=_some(others),
            expected="as in the live database",
        )


def _tell_expectations(report: Report, found: Expectations, into: str, *, stops: bool) -> None:
    """A table that is live must be there; one that nobody has yet may be missing."""
    expectations.tell_not_applicable(report, found, "on the copy")
    report.table("Expectations on the copy", ("table", "expectation", "holds", "observed"), found.rows)
    if found.rows:
        hint = "the data breaks the application's rules: look at the table of expectations, choose another dump"
        if not stops:
            hint = "the dump breaks this rule, and no database is live: correct the rows, or restore another dump"
        value = "; ".join(found.failed[:3]) or f"{len(found.rows)} hold"
        report.require(
            "expectations on the copy",
            found.ok,
            hint,
            value=value,
            expected="all hold",
            stops=stops,
            worst=_severity(into),
        )
    else:
        report.warn(
            "expectations on the copy",
            "the dump has no table that they are about: look at the rows yourself",
            value="not measured",
            expected="all hold",
        )
