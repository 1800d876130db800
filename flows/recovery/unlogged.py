"""Unlogged tables in a recovery from WAL: the plan names them, and no empty copy replaces one."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg

from blocks.environment import Environment, Stores
from blocks.postgres.server import Postgres
from flows.recovery.destruction import newest_dump
from runbook.errors import OpsError
from runbook.report import Report
from runbook.units import first_of
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.tables.chosen import choose_tables
from tasks.postgres.tables.unlogged import find_filled_unlogged, find_unlogged, unlogged_in

NAME, LOGGED = "unlogged tables", "tables whose rows are in the WAL"
HINT = (
    "leave them out: the live rows stay. A dump has their rows (restore-tables). If a table was logged at the target, "
    "run ALTER TABLE … SET LOGGED first, then this again"
)


def warn_emptied(
    report: Report, env: Environment, source: str = "", stores: Stores = "backups", *, database: str = ""
) -> None:
    """Name the unlogged tables that are empty once a recovered cluster is live: those of the live server, or, if it
    does not answer or `source` is another environment, those of the newest dump. `database`: only this one is taken
    out of the cluster."""
    dump, live = newest_dump(env, source or env.name, stores), not source or source == env.name
    found: Sequence[str] = ()
    try:
        found = find_filled_unlogged(env.postgres) if live else unlogged_in(content_in(dump)) if dump else ()
    except (OpsError, psycopg.Error):
        found = unlogged_in(content_in(dump)) if dump else ()
    if found := [name for name in found if name.startswith(f"{database}: " if database else "")]:
        hint = "fill them again, or restore their rows with restore-tables"
        if dump:
            hint += f" from {dump.name}, if it has them"
        report.warn(NAME, hint, value=f"empty afterwards, because the WAL has none of their rows: {first_of(found)}")


def judge_named(report: Report, env: Environment, tables: Sequence[str]) -> None:
    """Whether a recovered copy can have rows of these tables, by what they are in the live database.

    Raises:
        OpsError: it lacks one, or cannot be reached.
    """
    found = _find(env.postgres, tables)
    report.require(NAME, not found, HINT, value=_value(found), expected=LOGGED)


def require_logged(report: Report, copy: Postgres, tables: Sequence[str]) -> None:
    """The same in the recovered copy, before its rows replace any.

    Raises:
        RunbookFailed: one of them was unlogged at the target. The live tables are unchanged.
    """
    if found := _find(copy, tables):
        report.fail(NAME, HINT, value=_value(found), expected=LOGGED)
        report.fail_if_critical()


def _find(postgres: Postgres, tables: Sequence[str]) -> tuple[str, ...]:
    return find_unlogged(postgres, postgres.database, choose_tables(postgres, tables).names)


def _value(found: Sequence[str]) -> str:
    return f"{', '.join(found)}: the WAL has none of their rows, so the copy is empty" if found else "none is named"
