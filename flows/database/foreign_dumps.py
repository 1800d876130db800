"""Checks of a dump without a manifest: its own header, the expectations, and the live database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psycopg

from blocks.environment import Environment
from blocks.postgres.server import first_line
from flows.database import expectations
from runbook import clock
from runbook.errors import OpsError, Unreachable
from runbook.report import Report, Status
from runbook.units import first_of, size
from tasks.integrity import Expectations
from tasks.postgres.content import relations
from tasks.postgres.content.content import RowCounts, read_counts
from tasks.postgres.content.relations import ContentRelation, read_parts, read_relations
from tasks.postgres.dump.foreign import ForeignDump
from tasks.postgres.restore.staged_copy import Copy
from tasks.postgres.server.server import Server, read_identity

MOST_SHOWN = 50
Relations = Mapping[str, ContentRelation]
INTO = "set into to restore it as another database, which changes nothing live"
RIGHTS = (
    "take the dump with owners and rights (pg_dump without -O and -x). If this is the only dump: restore it with into=…"
    ", GRANT and ALTER … OWNER TO there, dump that database (pg_dump -F c) and restore the new dump"
)
MISSING = (
    f"{INTO}. If it is a complete older state, create the missing objects there (migrations), dump it (pg_dump -F c) "
    "and restore the new dump"
)


def judge(report: Report, env: Environment, found: ForeignDump, into: str, server: Server) -> None:
    """Judge the file before anything is built.

    Raises:
        RunbookFailed: it is truncated, of a newer server, or lacks tables of the live database.
    """
    report.fact("dump", f"{found.path}, written {clock.text(found.written)}")
    report.warn(
        "no manifest",
        "continue only with a dump that you trust: it cannot be proven, and its SQL runs as the administrator. Backups "
        "by backup-database have a manifest",
        value=f"{found.name} is a dump of {size(found.bytes)} without one",
        expected="a backup with a manifest",
    )
    report.require(
        "end of the dump",
        found.complete,
        "choose another dump: pg_dump was interrupted, rows are missing",
        value="present" if found.complete else "missing",
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
        hint = "check that this is the intended dump"
        report.warn("database in the dump", hint, value=found.database, expected=env.postgres.database)
    if not found.fenced:
        report.warn(
            "psql",
            r"update PostgreSQL's programs: only 15.14, 16.10, 17.6, 18 and later have \restrict",
            value="no psql meta-command was found in the text, but this psql does not block them",
            expected="psql blocks them",
        )
    _judge_tables(report, env, found, into)
    report.fail_if_critical()


def _judge_tables(report: Report, env: Environment, found: ForeignDump, into: str) -> None:
    """Whether every table of the live database is in the dump, with its foreign keys."""
    if found.orphans:
        report.fail(
            "foreign keys to tables that are not in the dump",
            "take a dump of the whole database to have them" if into else INTO,
            value="left out: " + first_of([one.removeprefix(" FK CONSTRAINT ") for one in found.orphans], 5),
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
            value=f"missing: {first_of(lacking, 5)}" if lacking else len(found.tables),
            expected="every table of the live database",
        )


def prove(report: Report, env: Environment, copy: Copy, into: str, *, strict: bool) -> object:
    """Check the copy's rows, the expectations, and its differences from the live database.

    Without a live database a broken expectation ends the run only if `strict`.

    Raises:
        RunbookFailed: it has no rows, breaks an expectation, or lacks objects or rights of the live database.
    """
    lost = not into and not read_identity(env.postgres, env.postgres.database).oid
    counts = read_counts.after(copy)(env.postgres, copy.database)
    rows = sum(row[1] for row in counts.rows)
    live = _read_live(report, env)
    tables = frozenset((one.schema, one.name) for one in live.values() if one.kind == "table" and not into)
    origin = expectations.ExpectationsOrigin(tables=tables)
    # Its constraints prove nothing: such a file may load rows with the triggers of a foreign key switched off.
    checking = expectations.start(report, env, copy.database, after=counts, origin=origin) if rows else None
    _judge_rows(report, counts, rows, into)
    copied = read_relations.after(counts)(env.postgres, copy.database, env.postgres.user)
    lacking = relations.missing(live, copied)
    if live:
        had = read_parts(env.postgres, env.postgres.database)
        has = read_parts.after(counts)(env.postgres, copy.database)
        _judge_missing(report, live, (*lacking, *relations.missing_parts(had, has)), into)
    _judge_rights(report, env, live, copied, into)
    if checking:
        _judge_expectations(report, checking.result(), into, stops=strict or not lost)
    elif env.suites:
        hint = "choose a dump with rows to have them checked"
        report.warn("expectations on the copy", hint, value="not measured: the copy has no rows")
    report.fail_if_critical()
    return counts


def _severity(into: str) -> Status:
    """A fault that would be an outage under the live name is only a warning under another."""
    return Status.WARN if into else Status.CRITICAL


def _read_live(report: Report, env: Environment) -> Relations:
    """The relations of the live database; none if it is missing or too damaged to be read."""
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
            "check by hand that the dump lacks nothing",
            value=f"not measured: {name} cannot be read: {why}",
        )
        return {}


def _judge_rows(report: Report, counts: RowCounts, total: int, into: str) -> None:
    rows = sorted(counts.rows, key=lambda row: -row[1])
    report.require(
        "rows in the copy",
        total > 0,
        "choose another dump to have rows: this one has definitions only" + ("" if into else f". Or {INTO}"),
        value=f"{total:,} in {len(rows)} tables",
        expected="some",
        worst=_severity(into),
    )
    report.table(
        "In the copy, compared with nothing",
        ("table", "rows"),
        [(table, f"{count:,}") for table, count in rows],
        most=MOST_SHOWN,
    )


def _judge_missing(report: Report, live: Relations, lacking: Sequence[str], into: str) -> None:
    if into and lacking:
        report.fact("not in the copy, but live", first_of(lacking, 5))
    elif not into:
        report.require(
            "objects of the live database in the copy",
            not lacking,
            MISSING,
            value=f"missing: {first_of(lacking, 5)}"
            if lacking
            else f"{len(live)} tables, views, sequences, functions and types, with their columns, "
            "constraints, indexes, triggers and policies",
            expected="nothing is missing",
        )
    if lacking:
        report.table("Live, and not in the copy", ("object",), [(key,) for key in lacking], most=MOST_SHOWN)


def _judge_rights(report: Report, env: Environment, live: Relations, copied: Relations, into: str) -> None:
    """Whether the application's role keeps every right after the swap."""
    lost = relations.lost_rights(live, copied) if live else relations.unreadable(copied)
    report.require(
        f"rights of {env.postgres.user} in the copy",
        not lost,
        RIGHTS if not into else f"GRANT them before {env.postgres.user} uses it, or take the dump without -O and -x",
        value=f"missing: {first_of(lost, 5)}" if lost else f"{len(copied)} objects",
        expected="as in the live database" if live else "may read every table",
        worst=_severity(into),
    )
    if lost:
        rows = [(one,) for one in lost]
        report.table(f"Rights that {env.postgres.user} lacks in the copy", ("right",), rows, most=MOST_SHOWN)
    if others := relations.other_owners(live, copied):
        report.warn(
            "owners in the copy",
            "ALTER … OWNER TO, unless the new owners are intended",
            value=first_of(others, 5),
            expected="as in the live database",
        )


def _judge_expectations(report: Report, found: Expectations, into: str, *, stops: bool) -> None:
    """Expectations of tables that the copy lacks do not apply."""
    expectations.show_not_applicable(report, found, "on the copy")
    report.table("Expectations on the copy", ("table", "expectation", "holds", "observed"), found.rows)
    if found.rows:
        hint = "check the table of expectations and choose another dump: the data breaks the application's rules"
        if not stops:
            hint = "correct the rows, or restore another dump: this one breaks the rule, and no database is live"
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
            "check the rows by hand: the dump has no table that the expectations apply to",
            value="not measured",
            expected="all hold",
        )
