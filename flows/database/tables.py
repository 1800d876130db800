"""Single tables of the application's database brought back (§1.2): beside, proven, their rows replaced at once."""

from __future__ import annotations

import contextlib
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database import steps, table_steps
from flows.database.choosing import NEWEST
from flows.pinned import pin_database
from runbook.errors import OpsError
from runbook.report import Report
from runbook.run import runbook
from tasks.postgres.copy import check_jobs, content_in
from tasks.postgres.server import read_server
from tasks.postgres.swap import advisory_lock
from tasks.postgres.table_kept import find_superseded_tables, free_stamp
from tasks.postgres.table_pairs import match_tables, pair_kept
from tasks.postgres.table_scratch import drop_tables_scratch, fill_tables, open_schema
from tasks.postgres.table_swap import Order, swap_kept_rows, swap_rows
from tasks.postgres.table_ties import read_ties
from tasks.postgres.tables import expected_of, read_sums


@flow(name="restore-tables", flow_run_name="restore-tables {environment} {tables} {backup}")
def restore_tables(
    environment: str,
    tables: list[str] = [],  # noqa: B006 (Prefect copies it; the form shows a list)
    backup: str = "latest",
    source: Stores = "backups",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
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
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Restore tables", env, confirm, plan, changes=True, rank="recovery") as report:
        workers = check_jobs(jobs)
        table_steps.require_names(tables)
        chosen = steps.choose_backup(report, env, backup, source)
        steps.judge_server(report, env, chosen, read_server(env.postgres))
        report.fail_if_critical()
        try:
            scratch = open_schema(env.postgres, chosen, tables)
            pairs = match_tables.after(scratch)(env.postgres, scratch.database, tables)
            sums = content_in(chosen).tables
            wanted = [(pair, expected_of(pair.wanted, sums)) for pair in pairs]
            ties = read_ties.after(pairs)(env.postgres, [pair.live for pair in pairs])
            table_steps.judge_definitions(report, pairs, ties, chosen)
            table_steps.judge_space(report, env, wanted)
            table_steps.plan(report, wanted, chosen.name)
            pin_database(report, env.postgres, replaced=True)
            permit = report.permit(*table_steps.acts(pairs))
            report.state_is("the live tables were not touched", "launch it again when what is said above is put right")
            with advisory_lock(env.postgres) as guard:
                filled = fill_tables(permit, env.postgres, chosen, scratch, [pair.wanted for pair in pairs], workers)
                found = read_sums.after(filled)(env.postgres, scratch.database, [pair.wanted for pair in pairs])
                table_steps.prove(report, wanted, found)
                order = Order(ties, free_stamp(env.postgres), chosen.name)
                table_steps.tell_state(report, pairs, order.stamp)
                done = swap_rows.after(found)(permit, env.postgres, guard, scratch, wanted, order)
            table_steps.tell_done(report, env, pairs, ties, done)
        finally:
            with contextlib.suppress(OpsError):  # a server that died: the next run drops it
                drop_tables_scratch(env.postgres)
        steps.tell_window(report, env, chosen)
        report.outcome = f"{len(pairs)} tables hold what they held in {chosen.name}, proven by content"
    return report


@flow(name="undo-restore-tables", flow_run_name="undo-restore-tables {environment} {kept}")
def undo_restore_tables(environment: str, kept: str = NEWEST, plan: str = "", confirm: str = "") -> Report:
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
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Undo restore tables", env, confirm, plan, changes=True, rank="recovery") as report:
        old = table_steps.choose_kept(find_superseded_tables(env.postgres), kept)
        report.pin("kept", old[0].stamp)
        pairs = pair_kept(env.postgres, [(table.oid, table.table) for table in old])
        found = read_sums.after(pairs)(env.postgres, env.postgres.database, [pair.wanted for pair in pairs])
        wanted = list(zip(pairs, found, strict=True))
        ties = read_ties.after(pairs)(env.postgres, [pair.live for pair in pairs])
        table_steps.judge_ties(report, ties)
        table_steps.judge_columns(report, pairs, kept=True)
        table_steps.judge_space(report, env, wanted)
        report.fact("old rows", f"replaced {old[0].since} by {old[0].backup}")
        table_steps.plan(report, wanted, old[0].stamp)
        pin_database(report, env.postgres, replaced=True)
        permit = report.permit(*table_steps.acts(pairs))
        report.state_is("the live tables were not touched", "launch it again when what is said above is put right")
        with advisory_lock(env.postgres) as guard:
            order = Order(ties, free_stamp(env.postgres), "undo-restore-tables")
            table_steps.tell_state(report, pairs, order.stamp)
            done = swap_kept_rows.after(found)(permit, env.postgres, guard, wanted, order)
        table_steps.tell_done(report, env, pairs, ties, done)
        report.outcome = f"{len(pairs)} tables hold again what was replaced {old[0].since}"
    return report
