"""Migrations rehearsed on a scratch copy: there, back and there again; the locks they take; what differs, what is lost.

Called with the open report. The live database is only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psycopg

from blocks.environment import Environment
from flows.database.expectations import FACT, NONE, tell_not_applicable
from flows.database.free_space import WAL_RATIO, judge_room
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks import integrity
from tasks.migrations.columns import Columns, count_filled
from tasks.migrations.locks import Lock, Watched
from tasks.migrations.program import require_reached
from tasks.migrations.rehearsal import (
    Direction,
    Loss,
    Passed,
    State,
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

# The copy, and once more for tables that are rewritten on it.
SPACE_RATIO = 2.0
# Measured for an estimate in the plan: bytes of a database copied per second through one pipe.
COPY_BYTES_PER_SECOND = 40e6


@dataclass(frozen=True)
class Rehearsed:
    """The copy before and after the way that the live database will go, and what it loses on it."""

    before: State
    after: State
    lost: tuple[Loss, ...]


def judge_space(report: Report, env: Environment, needed_bytes: int) -> None:
    """Whether the copy and its WAL fit beside the live database."""
    needed = int(needed_bytes * SPACE_RATIO)
    judge_room(report, env, needed, int(needed * WAL_RATIO), "the rehearsal's copy stands beside the database")


def rehearse(
    report: Report, env: Environment, before: str, target: str, *, first: Direction, longest: float, stops: bool = True
) -> Rehearsed:
    """Up, down, up (or down, up, down) on a copy of the live database, each as Alembic will run it there.

    `longest` is how many seconds a lock may be held; `stops`: a longer one ends the run.

    Raises:
        RunbookFailed: the way that is asked for does not work. The live database was not touched.
    """
    back: Direction = "down" if first == "up" else "up"
    with _copy(report, env) as scratch:
        start = read_state(env.postgres, scratch)
        went = migrate_rehearsal.after(start)(env.postgres, env.application, scratch, first, target, watch=True)
        passes = [went]
        there = read_state.after(went)(env.postgres, scratch)
        if not went.error:
            tell_locks(report, went.watched, longest, stops=stops)
            if first == "up":
                expect_sound(report, env, scratch, "on the copy")
            passes += _there_and_back(report, env, scratch, (start, there), (back, before), (first, target))
        _tell_passes(report, passes)
    report.fail_if_critical()
    return Rehearsed(start, there, losses(start, there))


@contextmanager
def _copy(report: Report, env: Environment) -> Iterator[str]:
    """A filled copy, dropped when the block is left, however it is left."""
    try:
        name = create_rehearsal(env.postgres)
        _try_login(env, name)
        require_reached(env.postgres, env.application, name)
        seconds = fill_rehearsal(env.postgres, name)
        report.fact("rehearsed on", f"{name}, a copy made in {duration(seconds)}")
        yield name
    except psycopg.Error as error:
        what = str(error).splitlines()[0]
        raise OpsError(f"the rehearsal was cut off: {what}", "look at the server, then launch this again") from None
    finally:
        put_away(report, env)


def _try_login(env: Environment, name: str) -> None:
    try:
        try_login(env.postgres, name)
    except OpsError as error:
        hint = f"pg_hba.conf must let {env.postgres.user} into {name}: migrations are rehearsed there"
        raise OpsError(error.message, hint) from None


def put_away(report: Report, env: Environment) -> None:
    """Drop the scratch database. That it cannot be dropped must not hide what happened."""
    try:
        drop_rehearsal(env.postgres)
    except (OpsError, psycopg.Error):
        name = scratch_name(env.postgres.database)
        report.warn("scratch database", "nothing to do: the next rehearsal removes it", value=f"{name} may be left")


def _there_and_back(
    report: Report,
    env: Environment,
    scratch: str,
    states: tuple[State, State],
    back: tuple[Direction, str],
    again: tuple[Direction, str],
) -> list[Passed]:
    """The way back, and there again: what does not work here stops nothing, yet somebody will need it one day."""
    returned = migrate_rehearsal(env.postgres, env.application, scratch, *back)
    if returned.error:
        return [returned]
    home = read_state.after(returned)(env.postgres, scratch)
    hint = f"complete the {back[0]}grade: what it leaves behind is in the way of the next {again[0]}grade"
    _expect_equal(report, env, f"schema after {again[0]} and {back[0]}", (scratch, states[0], home), hint)
    if back[0] == "down":
        lost = counted(env, losses(states[0], home))
        report.prefer(
            "rows after up and down",
            not lost,
            "a rollback would lose them: have the migration keep them aside",
            value="; ".join(f"{loss.table}: {loss.rows:,} rows, {loss.what}" for loss in lost[:3]) or "all there",
            expected="those of before",
        )
    repeated = migrate_rehearsal.after(home)(env.postgres, env.application, scratch, *again)
    if not repeated.error:
        state = read_state.after(repeated)(env.postgres, scratch)
        hint = "the second time it does something else: look at what it depends on"
        _expect_equal(report, env, f"schema after {again[0]} for the second time", (scratch, states[1], state), hint)
    return [returned, repeated]


def counted(env: Environment, lost: Sequence[Loss]) -> list[Loss]:
    """Losses with the rows that lose data, the most first: of a column those in which there is something in it, counted
    in the live database, since the copy has it no longer. A column that is empty loses nothing."""
    columns = dropped_columns(lost)
    filled = count_filled(env.postgres, env.postgres.database, columns) if columns else {}
    found = [replace(loss, rows=filled[loss.table]) if loss.columns else loss for loss in lost]
    return sorted((loss for loss in found if loss.rows or not loss.columns), key=lambda loss: -loss.rows)


def dropped_columns(lost: Sequence[Loss]) -> Columns:
    """Every column that goes, filled or not."""
    return tuple((loss.table, loss.columns) for loss in lost if loss.columns)


def compare_live(report: Report, env: Environment, rehearsed: Rehearsed) -> tuple[str, ...]:
    """How the migrated live schema differs from the rehearsed one, as sentences.

    Where texts differ, PostgreSQL judges them on a scratch copy of the live schema: it would lock live tables.
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
        put_away(report, env)


def _expect_equal(report: Report, env: Environment, name: str, states: tuple[str, State, State], hint: str) -> None:
    scratch, expected, found = states
    other = compare_schemas.after(found)(env.postgres, scratch, expected.definitions, found.definitions)
    report.prefer(
        name,
        not other,
        hint,
        value="; ".join(other[:3]) + (f" and {len(other) - 3} more" if other[3:] else "") or "as before",
        expected="every definition as before",
    )


def _tell_passes(report: Report, passes: list[Passed]) -> None:
    """The first way is the one that was asked for: it must work."""
    names = [f"{number}. {way.direction}" for number, way in enumerate(passes, 1)]
    rows = [
        (name, way.target or BASE, duration(way.seconds), way.error or "done")
        for name, way in zip(names, passes, strict=True)
    ]
    report.fact("took on the copy", duration(passes[0].seconds))
    report.table("Rehearsal on the copy", ("way", "to", "took", "result"), rows)
    for name, way in zip(names, passes, strict=True):
        asked = way is passes[0]
        report.require(
            f"rehearsal: {name}",
            not way.error,
            "correct the migration: the live database was not touched"
            if asked
            else "correct it before you need it: until then a backup is the only way back",
            value=way.error or duration(way.seconds),
            expected="it works on a copy of the database",
            worst=Status.CRITICAL if asked else Status.WARN,
        )


# A table is large where it has more than either: a scan or rewrite of it is seconds, and everybody waits that long.
LARGE_BYTES, LARGE_ROWS = 100_000_000, 100_000
MOST_SHOWN = 50
LARGE_HINT = (
    "index: CREATE INDEX CONCURRENTLY in `with op.get_context().autocommit_block()`; constraint: NOT VALID, then "
    "VALIDATE in the next migration; type: a new column, filled in batches; else in a window, with the backend stopped"
)


def tell_locks(report: Report, watched: Watched, longest: float, *, stops: bool) -> None:
    """The locks of one way on the copy; `longest` seconds, and `stops` where more ends the run."""
    if not watched.complete:
        report.warn(
            "locks",
            "let the administrator's login be a superuser: it must create event triggers in the copy",
            value="not measured",
        )
        return
    report.prefer(
        "giving up on a lock",
        not watched.unlimited,
        "set lock_timeout in alembic/env.py, whose driver ignores PGOPTIONS (asyncpg: connect_args={'server_settings': "
        "{'lock_timeout': '10s'}}), or in the migration that unset it; until then stop the backend before",
        value=f"never: {', '.join(watched.unlimited[:5])} waits, and everybody behind it" * bool(watched.unlimited)
        or "in time",
        expected="a lock_timeout in every migration's session",
    )
    report.table(
        "Migrations on the copy", ("revision", "took"), [(r, duration(s)) for r, s in watched.seconds[:MOST_SHOWN]]
    )
    found = sorted(watched.locks, key=lambda lock: (-lock.seconds, -lock.rows))
    more = f" ({len(found) - MOST_SHOWN} more)" if found[MOST_SHOWN:] else ""
    report.table(
        f"Locks on tables that were there before, held until the transaction ends{more}",
        ("migration", "table", "lock", "blocks others'", "rewritten", "held on the copy", "size", "rows"),
        [_row(lock) for lock in found[:MOST_SHOWN]],
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
        f"stop the backend and launch this again with longest_lock_seconds above {worst.seconds if worst else 0:.0f}; "
        f"or: {LARGE_HINT}",
        value=str(worst) if worst else "none that blocks writes",
        expected=f"at most {longest:g} s",
        worst=Status.CRITICAL if stops else Status.WARN,
    )


def _row(lock: Lock) -> tuple[str, ...]:
    rewritten = "yes" if lock.rewrites else ""
    held = duration(lock.seconds)
    return lock.revision, lock.table, lock.mode, lock.blocks, rewritten, held, size(lock.bytes), f"{lock.rows:,}"


def expect_sound(report: Report, env: Environment, database: str, where: str) -> None:
    """The expectations on migrated data, where the environment has any."""
    if not env.suites:
        report.fact(FACT, NONE)
        return
    evidence = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}"
    found = integrity.run_expectations(env.postgres, database, evidence, env.suites)
    report.table(f"Expectations {where}", ("table", "expectation", "holds", "observed"), found.rows)
    report.require(
        f"expectations {where}",
        found.ok,
        "look at the table of expectations: the migrated data breaks the application's rules",
        value="; ".join(found.failed[:3]) or f"{sum(row.ok for row in found.rows)} hold",
        expected="all hold",
    )
    tell_not_applicable(report, found, where)
