"""Restores of single tables (§1.2): to a scratch database, proven, then the live rows replaced in one transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, ParamSpec

from pydantic import Field

from blocks.environment import Environment, Stores
from blocks.postgres.server import Connection
from flows.database import restore_steps
from flows.database.free_space import WAL_RATIO, judge_room
from flows.database.gate import DatabaseCopy, DatabaseGate, gate_of_backup
from flows.database.live_tables import judge_columns, judge_definitions, judge_generated, judge_ties
from flows.database.undo_restore import NEWEST
from flows.pinned import pin_database
from flows.store import judge_files
from runbook.change import Change, Check, State, carrying_out
from runbook.errors import OTHER_BACKUPS, OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect, back_to
from runbook.guard.permit import PlannedStep
from runbook.kinds import Bound
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import first_of
from tasks.backups.catalogue import Backup
from tasks.postgres.content.sums import TableSum
from tasks.postgres.restore.staged_copy import Copy, check_jobs, content_in, dump_in, unpacking_of
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import read_identity, read_position, read_server
from tasks.postgres.tables.find import expected_of, files_of, read_sums
from tasks.postgres.tables.kept import SupersededTable, find_superseded_tables, free_stamp, kept_name
from tasks.postgres.tables.pairs import TablePair, match_tables, pair_kept, with_accepted
from tasks.postgres.tables.scratch import (
    drop_tables_scratch,
    fill_tables,
    open_schema,
    row_files,
    without_rows,
)
from tasks.postgres.tables.swap import Exchange, TableOrder, swap_kept_rows, swap_rows, tidy_tables
from tasks.postgres.tables.ties import Ties, read_ties

P = ParamSpec("P")


@flow(name="restore-tables", flow_run_name=RunName("restore-tables {environment} {tables} {backup}"))
def restore_tables(
    environment: str,
    tables: list[str] = [],  # noqa: B006 (Prefect copies it; the form shows a list)
    backup: str = "latest",
    source: Stores = "backups",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    plan: str = "",
    confirm: str = "",
) -> Report:
    """テーブル単位のリストア (§1.2)

    Restores the rows of chosen tables from a backup: restores them to a scratch database, proves them equal to the
    backup's snapshot, replaces the live rows in one transaction, and proves them again before the commit. Run it when
    rows of some tables were lost and the other tables must not change.

    - Readers see the old rows until the commit; writers to these tables wait. Triggers do not fire.
    - Only rows change: views, indexes, keys and privileges stay. Dependent materialised views are listed.
    - Foreign keys in both directions are checked before the commit. A violation stops the run and names the table to
      restore with it.
    - Sequences are advanced, never set back.

    The old rows are kept in tables named `…__old_…`: undo-restore-tables restores them, discard-superseded deletes
    them. Evidence: rows and hashes, before and after.

    Departs from the manual: `pg_restore -t` adds to the existing rows, stops at the first duplicate, and checks
    nothing. A table that was dropped, or whose columns changed since, is refused.

    Args:
        environment: Environment (lab, staging, production …)
        tables: Tables to restore (required; schema.table). Of a partition give the parent
        backup: latest, a date (YYYYMMDD) or a backup's name
        source: Store. copies: the replica store
        jobs: Parallel jobs. 0: number of CPUs
        accept: Objects to leave unrestored (a refused restore's report names them). Empty: restore everything
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook(
        "Restore tables", env, confirm, plan, changes=True, without_confirm="stages", rank="recovery"
    ) as report:
        workers = check_jobs(jobs)
        require_names(tables)
        chosen = restore_steps.choose_backup(report, env, backup, source, needed=without_rows)
        restore_steps.judge_server(report, env, chosen, read_server(env.postgres))
        report.fail_if_critical()
        try:
            scratch = open_schema(env.postgres, chosen, tables)
            accepted = restore_steps.without_accepted(report, env, dump_in(chosen), accept).accepted
            pairs = with_accepted(match_tables.after(scratch)(env.postgres, scratch.database, tables), accepted)
            rows = row_files.after(pairs)(env.postgres, chosen, scratch, [pair.wanted for pair in pairs])
            judge_files(report, chosen, rows, "rows in the files")
            report.fail_if_critical()
            sums = content_in(chosen).tables
            wanted = [(pair, expected_of(pair.wanted, sums)) for pair in pairs]
            ties = read_ties.after(pairs)(env.postgres, [pair.live for pair in pairs])
            judge_definitions(report, pairs, ties, chosen)
            judge_generated(report, pairs, chosen, accepted)
            judge_space(report, env, wanted, unpacking_of(env.postgres, chosen, rows))
            gate = _gate(report, env, pairs, chosen)
            fill, proof = _filling(env, chosen, scratch, wanted), _proving(report, env, chosen, scratch, wanted)
            action = swap_rows.bind(env.postgres, scratch, pairs)

            def replaced(guard: Connection, found: Sequence[TableSum]) -> Exchange:
                return action(guard, found, table_order(report, env, pairs, ties, chosen.name, gate))

            swap, tidy = _replacing(env, wanted, chosen.name, replaced, action), _tidying(env, pairs)
            with carrying_out(report, fill, proof, swap, tidy, effect=_effect(pairs, chosen, gate)) as carry:
                with advisory_lock(env.postgres) as guard:
                    done = carry(swap, guard, carry(proof, carry(fill, workers, accepted)))
                report_results(report, ties, done, carry(tidy, done))
        finally:
            with contextlib.suppress(OpsError):  # after a crash of the server the next run drops it
                drop_tables_scratch(env.postgres)
        restore_steps.judge_data_loss(report, env, chosen, gate)
        report.outcome = f"{len(pairs)} tables are restored from {chosen.name}, proven by content"
    return report


@flow(name="undo-restore-tables", flow_run_name=RunName("undo-restore-tables {environment} {kept}"))
def undo_restore_tables(
    environment: str,
    kept: str = NEWEST,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    plan: str = "",
    confirm: str = "",
) -> Report:
    """テーブル単位のリストアの取り消し (§1.2)

    Restores the rows that the last restore-tables replaced: in one transaction, foreign keys checked, proven by
    content. Run it when the restore of the tables was a mistake. It keeps the current rows too: run it again to redo.

    Writes to these tables since the restore are only in the kept tables afterwards. Evidence: rows and hashes, before
    and after.

    Departs from the manual, which has no undo.

    Args:
        environment: Environment (lab, staging, production …)
        kept: newest, or the time at the end of a kept table's name (YYYYMMDD_HHMMSS)
        accept: Generated columns whose values are not compared (GENERATED COLUMN schema.table.column). Empty: compare
            all
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Undo restore tables", env, confirm, plan, changes=True, rank="recovery") as report:
        old = choose_kept(find_superseded_tables(env.postgres), kept)
        report.pin("kept", old[0].stamp)
        pairs = with_accepted(pair_kept(env.postgres, [(table.oid, table.table) for table in old]), accept)
        found = read_sums.after(pairs)(env.postgres, env.postgres.database, [pair.wanted for pair in pairs])
        wanted = list(zip(pairs, found, strict=True))
        ties = read_ties.after(pairs)(env.postgres, [pair.live for pair in pairs])
        judge_ties(report, ties)
        judge_columns(report, pairs, kept=True)
        judge_space(report, env, wanted)
        report.fact("old rows", f"replaced {old[0].since} by {old[0].backup}")
        gate = _gate_of_undo(report, env, pairs, old[0])
        action = swap_kept_rows.bind(env.postgres, pairs, found)

        def replaced() -> Exchange:
            with advisory_lock(env.postgres) as guard:
                return action(guard, table_order(report, env, pairs, ties, "undo-restore-tables", gate))

        swap, tidy = _replacing(env, wanted, old[0].stamp, replaced, action), _tidying(env, pairs)
        effect = Effect(f"the old rows of {_names(pairs)} are live again", "run it again", (gate.plan(),), LOCKED)
        with carrying_out(report, swap, tidy, effect=effect) as carry:
            done = carry(swap)
            report.loses(gate.measured)
            report_results(report, ties, done, carry(tidy, done))
        report.outcome = f"{len(pairs)} tables have the rows again that were replaced {old[0].since}"
    return report


MOST_TABLES = 50
UNCHANGED = State("the live tables are unchanged", "fix the findings above, then run this again")
# Measured for restore, transfer and replacement together; the plan's estimate uses it.
ROWS_BYTES_PER_SECOND = 40e6
Wanted = Sequence[tuple[TablePair, TableSum]]


def require_names(tables: Sequence[str]) -> None:
    """Check the tables' number before the backup is read.

    Raises:
        OpsError: there are none, or too many.
    """
    if not any(name.strip() for name in tables):
        raise OpsError("no table was named", "name the tables to restore, as schema.table")
    if len(tables) > MOST_TABLES:
        raise OpsError(f"{len(tables)} tables were named", f"name at most {MOST_TABLES}, or run restore-database")


def choose_kept(found: Sequence[SupersededTable], kept: str) -> list[SupersededTable]:
    """The tables that were replaced together.

    Raises:
        OpsError: there are none of that time, or some of them are missing.
    """
    stamps = list(dict.fromkeys(table.stamp for table in found))
    stamp = stamps[0] if stamps and kept == NEWEST else kept
    if stamp not in stamps:
        hint = f"choose one of these, newest first: {', '.join(stamps[:5])}" if stamps else "no rows are kept here"
        raise OpsError(f"there are no kept rows of “{kept[:40]}”", hint)
    chosen = [table for table in found if table.stamp == stamp]
    missing = sorted({name for table in chosen for name in table.together} - {table.table for table in chosen})
    if missing:
        raise OpsError(
            f"the tables replaced together at {stamp} are incomplete: the rows of {', '.join(missing[:5])} are missing",
            f"copy the rows that you need by hand from {chosen[0].name} …: a partial undo would mix two points in time",
        )
    return chosen


def judge_space(report: Report, env: Environment, wanted: Wanted, unpacking: Mapping[Path, int] = {}) -> None:
    """Free disk space for the scratch copy, the transferred rows, the kept rows, and the new rows next to dead ones;
    `unpacking`: for the dump's unpacked files on this host."""
    new, old = sum(one.bytes for _, one in wanted), sum(pair.live.bytes for pair, _ in wanted)
    data, wal = 2 * new + 2 * max(new, old), int(WAL_RATIO * (new + 2 * max(new, old)))
    judge_room(report, env, data, wal, "the old rows are kept next to the new ones", here=unpacking)


LOCKED = "the tables are locked for the swap"


def _names(pairs: Sequence[TablePair]) -> str:
    return first_of([pair.live.name for pair in pairs])


def _gate(report: Report, env: Environment, pairs: Sequence[TablePair], chosen: Backup) -> DatabaseGate:
    live = read_identity(env.postgres, env.postgres.database)
    files = partial(files_of, env.postgres, [pair.live for pair in pairs])
    return gate_of_backup(report, env, chosen, live.oid, _names(pairs), files)


def _gate_of_undo(report: Report, env: Environment, pairs: Sequence[TablePair], old: SupersededTable) -> DatabaseGate:
    """The gate of tables whose writes since `old` was replaced the kept rows lack."""
    at = read_position(env.postgres, env.postgres.database)
    since = datetime.fromisoformat(old.since)
    copy = DatabaseCopy(_names(pairs), old.lsn, int(at.system), (at.oid,), without=(old.xid,), since=since)
    return DatabaseGate(report, env, copy, partial(files_of, env.postgres, [pair.live for pair in pairs]))


def _effect(pairs: Sequence[TablePair], chosen: Backup, gate: DatabaseGate) -> Effect:
    return Effect(back_to(_names(pairs), chosen.manifest.taken), "undo-restore-tables", (gate.plan(),), LOCKED)


def _filling(env: Environment, chosen: Backup, scratch: Copy, wanted: Wanted) -> Change[[int, Sequence[str]], Copy]:
    return Change(
        fill_tables.bind(env.postgres, chosen, scratch, [pair.wanted for pair, _ in wanted]),
        "restore rows",
        f"{_names([pair for pair, _ in wanted])} from {chosen.name}, into the scratch database {scratch.database}",
        size=sum(expected.bytes for _, expected in wanted),
        begun=UNCHANGED,
    )


def _proving(
    report: Report, env: Environment, chosen: Backup, scratch: Copy, wanted: Wanted
) -> Check[[Copy], Sequence[TableSum]]:
    """Compare every column as the backup has it; returns the sums of those that are compared after the swap."""
    copies = [pair.wanted for pair, _ in wanted]

    def proven(filled: Copy) -> Sequence[TableSum]:
        every_column = [replace(one, uncompared=frozenset()) for one in copies]
        whole = read_sums.after(filled)(env.postgres, scratch.database, every_column)
        with restore_steps.noting_failure(report, chosen):
            prove(report, wanted, whole)
        return read_sums.after(whole)(env.postgres, scratch.database, copies)

    return Check(proven, "prove the rows", f"against the manifest of {chosen.name}")


def _replacing(
    env: Environment, wanted: Wanted, source: str, work: Callable[P, Exchange], action: Bound[..., Exchange]
) -> Change[P, Exchange]:
    """One line for each table."""
    first, *others = [_planned(pair, expected, source) for pair, expected in wanted]
    return Change(
        work,
        first.step,
        first.detail,
        size=first.bytes,
        seconds=first.seconds,
        more=others,
        by=[action],
        pins=[lambda report: pin_database(report, env.postgres, replaced=True)],
        begun=UNCHANGED,
        done=lambda done: State(
            f"the rows of {', '.join(one.table for one in done.tables)} were replaced, proven; the old ones are kept",
            "do not restore again: that would lose the writes since. undo-restore-tables goes back",
        ),
    )


def _planned(pair: TablePair, expected: TableSum, source: str) -> PlannedStep:
    now = max(expected.bytes, pair.live.bytes)
    return PlannedStep(
        "replace rows",
        f"{pair.live.name}: {pair.live_rows:,} live rows → {expected.rows:,} rows of {source}; old rows are kept",
        now,
        max(0.1, now / ROWS_BYTES_PER_SECOND),
    )


def _tidying(env: Environment, pairs: Sequence[TablePair]) -> Change[[Exchange], tuple[str, ...]]:
    live = [pair.live for pair in pairs]
    return Change(lambda done: tidy_tables.after(done)(env.postgres, live), "VACUUM (ANALYZE)", _names(pairs))


def prove(report: Report, wanted: Wanted, found: Sequence[TableSum]) -> None:
    """Compare the restored rows with the manifest; of a table with an accepted column only their number.

    Raises:
        RunbookFailed: they differ. The live tables are unchanged.
    """
    rows = [(pair.live.name, one, two) for (pair, one), two in zip(wanted, found, strict=True)]
    counted = {pair.live.name for pair, _ in wanted if pair.live.uncompared}
    unequal = [
        name for name, one, two in rows if one.rows != two.rows or (one.hash != two.hash and name not in counted)
    ]
    report.table(
        "Proven equal to the backup",
        ("table", "expected", "found", "equal"),
        [(n, f"{a.rows:,} rows", f"{b.rows:,} rows", "🛑" if n in unequal else "✅") for n, a, b in rows],
    )
    report.require(
        "rows equal to the backup",
        not unequal,
        f"{OTHER_BACKUPS}. The live tables are unchanged",
        value=f"not equal: {', '.join(unequal)}" if unequal else f"{sum(one.rows for one in found):,} rows",
        expected="every row",
    )
    report.fail_if_critical()


def table_order(
    report: Report, env: Environment, pairs: Sequence[TablePair], ties: Ties, by: str, gate: DatabaseGate
) -> TableOrder:
    """The state from here to the commit: all tables are old, or all are new."""
    order = TableOrder(ties, free_stamp(env.postgres), by, gate.judge)
    gate.look_ahead()
    mark = kept_name(pairs[0].live.relation, pairs[0].live.oid, order.stamp)
    report.state_is(
        f"the live tables are unchanged, unless a table {mark} exists: then all were replaced, proven",
        "check whether that table exists. If it does, do not restore again, which would lose the writes since: "
        "undo-restore-tables goes back. If it does not, run this again",
    )
    return order


def report_results(report: Report, ties: Ties, done: Exchange, failed: tuple[str, ...]) -> None:
    """The replaced rows, the waiting times, and the work left to do. `failed`: of the vacuum."""
    report.table(
        "Rows replaced",
        ("table", "rows before", "rows now", "old rows kept in"),
        [(one.table, f"{one.before:,}", f"{one.after:,}", one.kept) for one in done.tables],
    )
    report.fact("waiting", f"writers at most {done.writers_seconds:.2f} s; readers did not wait")
    if done.sequences:
        report.fact("sequences advanced", ", ".join(done.sequences))
    for one in done.dangling:
        report.warn(
            f"{one.key.name}, which is not validated",
            "correct those rows, then VALIDATE CONSTRAINT",
            value=f"{one.rows:,} rows reference missing rows",
        )
    if ties.materialised:
        report.warn(
            "materialised views over these tables",
            "; ".join(f"REFRESH MATERIALIZED VIEW {name}" for name in ties.materialised),
            value="they still show the old rows",
        )
    report.prefer(
        "vacuum and statistics of these tables",
        not failed,
        "vacuum-database with mode=plain_analyze and these tables",
        value="; ".join(failed) or "done",
    )
