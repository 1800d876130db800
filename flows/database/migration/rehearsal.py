"""Migrations rehearsed on a scratch copy, up, down, up: their locks, their data loss, the schema after each step.

Called with the open report. The live database is only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psycopg

from blocks.environment import Environment
from flows.database.expectations import FACT, NONE, show_not_applicable
from flows.database.free_space import WAL_RATIO, judge_room
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.units import duration, first_of, size
from tasks import integrity
from tasks.migrations.columns import Columns, count_filled
from tasks.migrations.locks import HeldTableLock, Watched
from tasks.migrations.program import require_reached
from tasks.migrations.rehearsal import (
    Direction,
    MigrationLoss,
    Passed,
    RehearsedState,
    compare_schemas,
    differences,
    losses,
    migrate_rehearsal,
    read_live_schema,
    read_schema,
    read_state,
)
from tasks.migrations.scratch import create_rehearsal, drop_rehearsal, fill_rehearsal, fill_schema, scratch_name
from tasks.migrations.scripts import BASE
from tasks.postgres.restore.staged_copy import try_login

# The copy, and as much again for tables that the migrations rewrite.
SPACE_RATIO = 2.0
# Measured through one pipe; the plan's estimate uses it.
COPY_BYTES_PER_SECOND = 40e6
CHECK_SERVER = "check the server's log, then run this again"


@dataclass(frozen=True)
class Rehearsed:
    """The copy before and after the migrations that the live database will run, and the data that they lose."""

    before: RehearsedState
    after: RehearsedState
    lost: tuple[MigrationLoss, ...]


def judge_space(report: Report, env: Environment, needed_bytes: int) -> None:
    """Free disk space for the copy and its WAL."""
    needed = int(needed_bytes * SPACE_RATIO)
    judge_room(report, env, needed, int(needed * WAL_RATIO), "the rehearsal's copy next to the database")


def rehearse(
    report: Report, env: Environment, before: str, target: str, *, first: Direction, longest: float, stops: bool = True
) -> Rehearsed:
    """Up, down, up (or down, up, down) on a copy of the live database, each as Alembic will run it there.

    `longest`: seconds that a lock can be held; `stops`: a longer one ends the run.

    Raises:
        RunbookFailed: the first step fails. The live database is unchanged.
    """
    back: Direction = "down" if first == "up" else "up"
    with _copy(report, env) as scratch:
        start = read_state(env.postgres, scratch)
        done = migrate_rehearsal.after(start)(env.postgres, env.application, scratch, first, target, watch=True)
        passes = [done]
        after = read_state.after(done)(env.postgres, scratch)
        if not done.error:
            judge_locks(report, done.watched, longest, stops=stops)
            if first == "up":
                judge_expectations(report, env, scratch, "on the copy")
            passes += _revert_and_repeat(report, env, scratch, (start, after), (back, before), (first, target))
        _judge_passes(report, passes)
    report.fail_if_critical()
    return Rehearsed(start, after, losses(start, after))


@contextmanager
def _copy(report: Report, env: Environment) -> Iterator[str]:
    """A filled copy, dropped at the end of the block in any case."""
    try:
        name = create_rehearsal(env.postgres)
        _try_login(env, name)
        require_reached(env.postgres, env.application, name)
        seconds = fill_rehearsal(env.postgres, name)
        report.fact("rehearsed on", f"{name}, a copy made in {duration(seconds)}")
        yield name
    except psycopg.Error as error:
        what = str(error).splitlines()[0]
        raise OpsError(f"connection to the rehearsal's copy lost: {what}", CHECK_SERVER) from None
    finally:
        drop_scratch(report, env)


def _try_login(env: Environment, name: str) -> None:
    try:
        try_login(env.postgres, name)
    except OpsError as error:
        hint = f"allow {env.postgres.user} to connect to {name} in pg_hba.conf: migrations are rehearsed there"
        raise OpsError(error.message, hint) from None


def drop_scratch(report: Report, env: Environment) -> None:
    """Drop the scratch database. An error is a WARN: it must not hide the run's own error."""
    try:
        drop_rehearsal(env.postgres)
    except (OpsError, psycopg.Error):
        name = scratch_name(env.postgres.database)
        report.warn("scratch database", "nothing to do: the next rehearsal drops it", value=f"{name} may still exist")


def _revert_and_repeat(
    report: Report,
    env: Environment,
    scratch: str,
    states: tuple[RehearsedState, RehearsedState],
    back: tuple[Direction, str],
    again: tuple[Direction, str],
) -> list[Passed]:
    """Run the reverse direction, then the first again. A failure here is a WARN: an operator may need it later."""
    reverted = migrate_rehearsal(env.postgres, env.application, scratch, *back)
    if reverted.error:
        return [reverted]
    old = read_state.after(reverted)(env.postgres, scratch)
    hint = f"complete the {back[0]}grade: its leftovers can break the next {again[0]}grade"
    _compare(report, env, f"schema after {again[0]} and {back[0]}", (scratch, states[0], old), hint)
    if back[0] == "down":
        lost = counted(env, losses(states[0], old))
        report.prefer(
            "rows after up and down",
            not lost,
            "have the migration copy them to another table: a rollback would lose them",
            value="; ".join(f"{loss.table}: {loss.rows:,} rows, {loss.what}" for loss in lost[:3]) or "as before",
            expected="as before",
        )
    repeated = migrate_rehearsal.after(old)(env.postgres, env.application, scratch, *again)
    if not repeated.error:
        state = read_state.after(repeated)(env.postgres, scratch)
        hint = "check what the migration depends on: its second run has another result"
        _compare(report, env, f"schema after {again[0]} for the second time", (scratch, states[1], state), hint)
    return [reverted, repeated]


def counted(env: Environment, lost: Sequence[MigrationLoss]) -> list[MigrationLoss]:
    """Losses with their number of rows, largest first.

    For a dropped column those with a value, counted in the live database: the copy has lost it. Empty columns lose
    nothing.
    """
    columns = dropped_columns(lost)
    filled = count_filled(env.postgres, env.postgres.database, columns) if columns else {}
    found = [replace(loss, rows=filled[loss.table]) if loss.columns else loss for loss in lost]
    return sorted((loss for loss in found if loss.rows or not loss.columns), key=lambda loss: -loss.rows)


def dropped_columns(lost: Sequence[MigrationLoss]) -> Columns:
    """Every dropped column, with or without values."""
    return tuple((loss.table, loss.columns) for loss in lost if loss.columns)


def compare_live(report: Report, env: Environment, rehearsed: Rehearsed) -> tuple[str, ...]:
    """The differences of the migrated live schema from the rehearsed one, as sentences.

    Where texts differ, PostgreSQL compares them on a scratch copy of the schema: on the live one it would lock tables.
    """
    expected = rehearsed.after.definitions
    now = {
        key: text
        for key, text in read_live_schema(env.postgres, env.postgres.database).items()
        if "(invalid)" not in key
    }
    other = differences(expected, now)
    if not other:
        return ()
    try:
        scratch = create_rehearsal(env.postgres)
        filled = fill_schema.after(scratch)(env.postgres, scratch)
        found = read_schema.after(filled)(env.postgres, scratch)
        return compare_schemas.after(found)(env.postgres, scratch, expected, found)
    except (OpsError, psycopg.Error):
        return other
    finally:
        drop_scratch(report, env)


def _compare(
    report: Report, env: Environment, name: str, states: tuple[str, RehearsedState, RehearsedState], hint: str
) -> None:
    scratch, expected, found = states
    other = compare_schemas.after(found)(env.postgres, scratch, expected.definitions, found.definitions)
    report.prefer(
        name,
        not other,
        hint,
        value=first_of(other, between="; ") or "as before",
        expected="every definition as before",
    )


def _judge_passes(report: Report, passes: list[Passed]) -> None:
    """The first step is the one that the live database will run: it must succeed."""
    names = [f"{number}. {step.direction}" for number, step in enumerate(passes, 1)]
    rows = [
        (name, step.target or BASE, duration(step.seconds), step.error or "done")
        for name, step in zip(names, passes, strict=True)
    ]
    report.fact("took on the copy", duration(passes[0].seconds))
    report.table("Rehearsal on the copy", ("step", "to", "took", "result"), rows)
    for name, step in zip(names, passes, strict=True):
        first = step is passes[0]
        report.require(
            f"rehearsal: {name}",
            not step.error,
            "correct the migration. The live database is unchanged"
            if first
            else "correct it before you need it: until then only a backup can undo the migration",
            value=step.error or duration(step.seconds),
            expected="succeeds on a copy of the database",
            worst=Status.CRITICAL if first else Status.WARN,
        )


# A scan or rewrite of a table above either limit takes seconds, and its users wait that long.
LARGE_BYTES, LARGE_ROWS = 100_000_000, 100_000
MOST_SHOWN = 50
LARGE_HINT = (
    "rewrite the migration. Index: CREATE INDEX CONCURRENTLY in `with op.get_context().autocommit_block()`. "
    "Constraint: NOT VALID, then VALIDATE in the next migration. Type: a new column, filled in batches. Or run it in a "
    "maintenance window with the backend stopped"
)


def judge_locks(report: Report, watched: Watched, longest: float, *, stops: bool) -> None:
    """The locks of the first step on the copy. `longest`: seconds; `stops`: a longer lock ends the run."""
    if not watched.complete:
        report.warn(
            "locks",
            "make the administrator's login a superuser: it must create event triggers in the copy",
            value="not measured",
        )
        return
    report.prefer(
        "lock timeout",
        not watched.unlimited,
        "set lock_timeout in alembic/env.py, whose driver ignores PGOPTIONS (asyncpg: connect_args={'server_settings': "
        "{'lock_timeout': '10s'}}), or in the migration that unsets it. Until then stop the backend before a migration",
        value=f"none: {', '.join(watched.unlimited[:5])} would wait forever, and block all queries behind it"
        * bool(watched.unlimited)
        or "set",
        expected="a lock_timeout in every migration's session",
    )
    seconds = [(revision, duration(took)) for revision, took in watched.seconds]
    report.table("Migrations on the copy", ("revision", "took"), seconds, most=MOST_SHOWN)
    _judge_longest(report, watched.locks, longest, stops=stops)


def _judge_longest(report: Report, locks: Sequence[HeldTableLock], longest: float, *, stops: bool) -> None:
    found = sorted(locks, key=lambda lock: (-lock.seconds, -lock.rows))
    report.table(
        "Locks on existing tables, held until the transaction ends",
        ("migration", "table", "lock", "blocks", "rewritten", "held on the copy", "size", "rows"),
        [_row(lock) for lock in found],
        most=MOST_SHOWN,
    )
    large = [lock for lock in found if lock.bytes > LARGE_BYTES or lock.rows > LARGE_ROWS]
    report.prefer(
        "locks on large tables",
        not large,
        LARGE_HINT,
        value="; ".join(map(str, large[:3])) or "none that block writes",
        expected=f"none that block writes to more than {size(LARGE_BYTES)} or {LARGE_ROWS:,} rows",
    )
    worst = found[0] if found else None
    report.require(
        "longest lock",
        not worst or worst.seconds <= longest,
        f"stop the backend and run this again with longest_lock_seconds above {worst.seconds if worst else 0:.0f}. "
        f"Or {LARGE_HINT}",
        value=str(worst) if worst else "none that blocks writes",
        expected=f"at most {longest:g} s",
        worst=Status.CRITICAL if stops else Status.WARN,
    )


def _row(lock: HeldTableLock) -> tuple[str, ...]:
    rewritten = "yes" if lock.rewrites else ""
    held = duration(lock.seconds)
    return lock.revision, lock.table, lock.mode, lock.blocks, rewritten, held, size(lock.bytes), f"{lock.rows:,}"


def judge_expectations(report: Report, env: Environment, database: str, where: str) -> None:
    """The expectations on migrated data, if the environment has any."""
    if not env.suites:
        report.fact(FACT, NONE)
        return
    evidence = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}"
    found = integrity.run_expectations(env.postgres, database, evidence, env.suites)
    report.table(f"Expectations {where}", ("table", "expectation", "holds", "observed"), found.rows)
    report.require(
        f"expectations {where}",
        found.ok,
        "check the table of expectations and correct the migration: its data breaks the application's rules",
        value="; ".join(found.failed[:3]) or f"{sum(row.ok for row in found.rows)} hold",
        expected="all hold",
    )
    show_not_applicable(report, found, where)
