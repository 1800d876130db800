"""Single tables of the application's database brought back (§1.2): beside, proven, their rows replaced at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database import restore_steps
from flows.database.free_space import WAL_RATIO, judge_room
from flows.database.restore import NEWEST
from flows.pinned import pin_database
from flows.store import judge_files
from runbook.errors import OTHER_BACKUPS, OpsError
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from tasks.backups.catalogue import Backup
from tasks.postgres.content.content import TableSum
from tasks.postgres.dump.accepted import restore_without
from tasks.postgres.dump.generated import COLUMN
from tasks.postgres.restore.staged_copy import check_jobs, content_in, dump_in
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import read_server
from tasks.postgres.tables.find import Table, expected_of, read_sums
from tasks.postgres.tables.kept import SupersededTable, find_superseded_tables, free_stamp, kept_name
from tasks.postgres.tables.pairs import Pair, match_tables, pair_kept, unequal_columns, with_accepted
from tasks.postgres.tables.scratch import (
    REPLACE_ROWS,
    drop_tables_scratch,
    fill_tables,
    open_schema,
    row_files,
    without_rows,
)
from tasks.postgres.tables.swap import Exchange, Order, swap_kept_rows, swap_rows, tidy_tables
from tasks.postgres.tables.ties import Ties, read_ties


@flow(name="restore-tables", flow_run_name="restore-tables {environment} {tables} {backup}")
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

    Brings the rows of chosen tables back to a backup, in the live database: restores them into a scratch database,
    proves them equal to the backup's snapshot, then replaces the live rows in one transaction, proven again before its
    commit. Run it when the rows of some tables were destroyed and the rest must stay as it is.

    Readers go on with the old rows until the commit, writers to these tables wait. The tables stay themselves: views,
    indexes, keys and privileges are as they were; materialised views are named, triggers do not fire. Foreign keys in
    both directions are asked before the commit: one that would break refuses the whole run and names the table to
    restore with it. Sequences are advanced, never set back. The old rows are kept in tables named `…__old_…`:
    undo-restore-tables puts them back, discard-superseded removes them. Evidence: rows and hashes, before and after.

    Departs from the manual: `pg_restore -t` adds rows to what is there, stops half-way at the first duplicate, and
    checks nothing. A table whose columns were changed since is refused, and so is one that is not there any more.

    Args:
        environment: 対象の環境
        tables: 戻すテーブル (必須。スキーマ.テーブル)。パーティションは親テーブルを指定
        backup: latest、日付 (YYYYMMDD)、またはバックアップ名
        source: 保管先。copies は複製先
        jobs: 並列数。0 は CPU の数
        accept: 復元しないまま進めるオブジェクトの名前 (中止されたリストアのレポートが示すもの)。空なら、すべて復元する
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Restore tables", env, confirm, plan, changes=True, rank="recovery") as report:
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
            judge_space(report, env, wanted)
            plan_tables(report, wanted, chosen.name)
            pin_database(report, env.postgres, replaced=True)
            permit = report.permit(*acts(pairs))
            report.state_is("the live tables were not touched", "launch it again when what is said above is put right")
            with advisory_lock(env.postgres) as guard:
                copies = [pair.wanted for pair in pairs]
                filled = fill_tables(permit, env.postgres, chosen, scratch, copies, workers, accepted)
                whole = read_sums.after(filled)(env.postgres, scratch.database, list(map(compared_whole, copies)))
                prove(report, wanted, whole)
                found = read_sums.after(whole)(env.postgres, scratch.database, copies)
                wanted = list(zip(pairs, found, strict=True))
                order = Order(ties, free_stamp(env.postgres), chosen.name)
                tell_state(report, pairs, order.stamp)
                done = swap_rows.after(found)(permit, env.postgres, guard, scratch, wanted, order)
            tell_done(report, env, pairs, ties, done)
        finally:
            with contextlib.suppress(OpsError):  # a server that died: the next run drops it
                drop_tables_scratch(env.postgres)
        restore_steps.tell_window(report, env, chosen)
        report.outcome = f"{len(pairs)} tables hold what they held in {chosen.name}, proven by content"
    return report


@flow(name="undo-restore-tables", flow_run_name="undo-restore-tables {environment} {kept}")
def undo_restore_tables(
    environment: str,
    kept: str = NEWEST,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    plan: str = "",
    confirm: str = "",
) -> Report:
    """テーブル単位のリストアの取り消し (§1.2)

    Puts back the rows that the last restore-tables replaced, by the same way: in one transaction, foreign keys asked,
    proven by content; the present rows are kept likewise, so that running it again goes forward. Run it when the
    restore of the tables was a mistake.

    What was written to these tables since is in the tables that it keeps, and no longer in the live ones. Evidence:
    rows and hashes, before and after.

    Departs from the manual: it knows no way back.

    Args:
        environment: 対象の環境
        kept: newest、または保存テーブル名の末尾の時刻 (YYYYMMDD_HHMMSS)
        accept: 値を比較しない生成列の名前 (GENERATED COLUMN スキーマ.テーブル.列)。restore-tables で指定したものと同じ
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
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
        plan_tables(report, wanted, old[0].stamp)
        pin_database(report, env.postgres, replaced=True)
        permit = report.permit(*acts(pairs))
        report.state_is("the live tables were not touched", "launch it again when what is said above is put right")
        with advisory_lock(env.postgres) as guard:
            order = Order(ties, free_stamp(env.postgres), "undo-restore-tables")
            tell_state(report, pairs, order.stamp)
            done = swap_kept_rows.after(found)(permit, env.postgres, guard, wanted, order)
        tell_done(report, env, pairs, ties, done)
        report.outcome = f"{len(pairs)} tables hold again what was replaced {old[0].since}"
    return report


MOST_TABLES = 50
# Measured for an estimate in the plan: restored beside, brought over, put in place; bytes of the table per second.
ROWS_BYTES_PER_SECOND = 40e6
Wanted = Sequence[tuple[Pair, TableSum]]


def require_names(tables: Sequence[str]) -> None:
    """Before a backup is read for nothing.

    Raises:
        OpsError: there is none, or there are too many.
    """
    if not any(name.strip() for name in tables):
        raise OpsError("no table was named", "name the tables to restore, as schema.table")
    if len(tables) > MOST_TABLES:
        raise OpsError(f"{len(tables)} tables were named", f"at most {MOST_TABLES}; for more run restore-database")


def choose_kept(found: Sequence[SupersededTable], kept: str) -> list[SupersededTable]:
    """The tables that were replaced together.

    Raises:
        OpsError: there are none of that time, or some of them are gone.
    """
    stamps = list(dict.fromkeys(table.stamp for table in found))
    stamp = stamps[0] if stamps and kept == NEWEST else kept
    if stamp not in stamps:
        there = ", ".join(stamps[:5]) or "none at all"
        raise OpsError(f"there are no kept rows of “{kept[:40]}”", f"those that are there, newest first: {there}")
    chosen = [table for table in found if table.stamp == stamp]
    gone = sorted({name for table in chosen for name in table.together} - {table.table for table in chosen})
    if gone:
        raise OpsError(
            f"what was replaced together at {stamp} is not whole: the rows of {', '.join(gone[:5])} are gone",
            f"a part of it would leave tables of two times: copy by hand what is wanted from {chosen[0].name} …",
        )
    return chosen


def acts(pairs: Sequence[Pair]) -> list[Act]:
    """What a permit is needed for."""
    return [Act(REPLACE_ROWS, pair.live.name) for pair in pairs]


def judge_definitions(report: Report, pairs: Sequence[Pair], ties: Ties, backup: Backup) -> None:
    """Whether the backup's rows fit the live tables, and what would go wrong silently."""
    judge_columns(report, pairs)
    judge_ties(report, ties)
    texts = content_in(backup).definitions
    newer = [
        name
        for name, definition in ties.deferrable
        if not any(f" {name} (owner " in key.replace(".", " ") and definition in text for key, text in texts.items())
    ]
    report.require(
        "deferrable constraints",
        not newer,
        "they are not checked while rows are replaced: make them NOT DEFERRABLE meanwhile, or restore-database",
        value=f"newer than the backup: {', '.join(newer)}" if newer else f"{len(ties.deferrable)}, all in the backup",
    )


def judge_generated(report: Report, pairs: Sequence[Pair], backup: Backup, accepted: Sequence[str]) -> None:
    """The live table computes its generated columns: values that it would compute otherwise are accepted by name."""
    chosen = {(pair.live.schema, pair.live.relation) for pair in pairs}
    found = [one for one in content_in(backup).uncomputable if (one.schema_name, one.table) in chosen]
    refused = [one for one in found if f"{COLUMN} {one.name}" not in accepted]
    report.require(
        "generated columns",
        not refused,
        restore_without(accepted, [f"{COLUMN} {one.name}" for one in refused])
        + "the live table then computes them anew; restore-database into=… has the values of the backup",
        value="; ".join(f"{one.name}: {one.why}" for one in refused[:5]) or f"{len(found)} accepted as computed anew",
        expected="values that the live table computes again",
    )


def judge_columns(report: Report, pairs: Sequence[Pair], *, kept: bool = False) -> None:
    """Rows go back into the columns that they came from, or not at all."""
    for pair in pairs:
        unequal = unequal_columns(pair.wanted, pair.live, kept=kept)
        report.require(
            f"columns of {pair.live.name}",
            not unequal,
            "restore into another database (restore-database into=…) and copy by hand what is wanted",
            value="; ".join(unequal[:5]) or f"{len(pair.live.columns)} as in the backup",
            expected="names and types of the backup",
        )


def judge_ties(report: Report, ties: Ties) -> None:
    """Refusals, and what somebody should know."""
    report.require(
        "what acts on the rows by itself",
        not ties.refusals,
        "do what is said there, then launch this again",
        value="; ".join(ties.refusals[:5]) or "nothing that cannot be held still",
    )
    report.fact("foreign keys asked before the commit", ", ".join(key.name for key in ties.keys) or "none")
    if ties.triggers:
        report.fact("triggers that do not fire", ", ".join(ties.triggers))
    if ties.publications:
        report.warn(
            "publications",
            "nothing to do: subscribers get the deletions and the restored rows",
            value=f"{', '.join(ties.publications)} publish these tables",
        )
    if ties.subscriptions:
        report.warn(
            "subscriptions",
            "ALTER SUBSCRIPTION … REFRESH PUBLICATION does not send again what is undone here: copy it by hand",
            value=f"{', '.join(ties.subscriptions)} fill these tables",
        )


def judge_space(report: Report, env: Environment, wanted: Wanted) -> None:
    """Beside: the scratch copy and the brought rows. In place: the kept rows, and the new beside the dead ones."""
    new, old = sum(one.bytes for _, one in wanted), sum(pair.live.bytes for pair, _ in wanted)
    data, wal = 2 * new + 2 * max(new, old), int(WAL_RATIO * (new + 2 * max(new, old)))
    judge_room(report, env, data, wal, "the old rows are kept, and the new stand beside them")


def plan_tables(report: Report, wanted: Wanted, source: str) -> None:
    """One line for each table."""
    for pair, expected in wanted:
        bytes_now = max(expected.bytes, pair.live.bytes)
        report.plan(
            "replace rows",
            f"{pair.live.name}: {pair.live_rows:,} live rows → {expected.rows:,} rows of {source}; the old are kept",
            size=bytes_now,
            seconds=max(0.1, bytes_now / ROWS_BYTES_PER_SECOND),
        )


def compared_whole(table: Table) -> Table:
    """With every column: the scratch copy has the backup's values where the backup has them."""
    return replace(table, uncompared=frozenset())


def prove(report: Report, wanted: Wanted, found: Sequence[TableSum]) -> None:
    """The scratch copy's rows against the manifest; of a table with an accepted column only their number.

    Raises:
        RunbookFailed: they differ. The live tables were not touched.
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
        f"the live tables were not touched; {OTHER_BACKUPS}",
        value=f"not equal: {', '.join(unequal)}" if unequal else f"{sum(one.rows for one in found):,} rows",
        expected="every row",
    )
    report.fail_if_critical()


def tell_state(report: Report, pairs: Sequence[Pair], stamp: str) -> None:
    """From here to the commit: all or nothing."""
    mark = kept_name(pairs[0].live.relation, pairs[0].live.oid, stamp)
    report.state_is(
        f"the live tables were not touched, unless there is a table {mark}: then all were replaced, proven",
        "look for that table. If it is there do not restore again: what was written since would go, and "
        "undo-restore-tables goes back. If not, launch this again",
    )


def tell_done(report: Report, env: Environment, pairs: Sequence[Pair], ties: Ties, done: Exchange) -> None:
    """What was replaced, what it cost, and what is left to do."""
    report.state_is(
        f"the rows of {', '.join(one.table for one in done.tables)} were replaced, proven; the old ones are kept",
        "do not restore again: that would lose what was written since. undo-restore-tables goes back",
    )
    report.table(
        "Rows replaced",
        ("table", "rows before", "rows now", "the old rows are in"),
        [(one.table, f"{one.before:,}", f"{one.after:,}", one.kept) for one in done.tables],
    )
    report.fact("waiting", f"writers at most {done.writers_seconds:.2f} s; readers not at all")
    if done.sequences:
        report.fact("sequences advanced", ", ".join(done.sequences))
    for one in done.dangling:
        report.warn(
            f"{one.key.name}, which is not validated",
            "correct those rows, then VALIDATE CONSTRAINT",
            value=f"{one.rows:,} rows reference what is not there",
        )
    if ties.materialised:
        report.warn(
            "materialised views over these tables",
            "; ".join(f"REFRESH MATERIALIZED VIEW {name}" for name in ties.materialised),
            value="they show what they showed",
        )
    failed = tidy_tables.after(done)(env.postgres, [pair.live for pair in pairs])
    report.prefer(
        "vacuum and statistics of these tables",
        not failed,
        "vacuum-database with mode=plain_analyze and these tables",
        value="; ".join(failed) or "done",
    )
