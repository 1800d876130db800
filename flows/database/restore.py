"""Restores of the application's database (§1.2): beside, proven, swapped; undone; the old ones discarded."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database import choosing, expectations, steps
from flows.database.choosing import NEWEST, Restorable
from flows.database.commits import alone_act, free_commits, judge_commits
from flows.database.superseded import discard_surplus
from flows.pinned import pin_database
from flows.store import mark_verified, measured
from runbook.permit import Act, Permit
from runbook.report import Report
from runbook.run import runbook
from tasks.postgres.copy import check_jobs, rename_copy
from tasks.postgres.foreign import is_foreign
from tasks.postgres.server import find_obstacles, has_own_types, read_identity, read_server
from tasks.postgres.superseded import find_superseded, read_writes
from tasks.postgres.swap import UNDO, Swapped, advisory_lock, swap_back, swap_databases


@flow(name="restore-database", flow_run_name="restore-database {environment} {backup}")
def restore_database(
    environment: str,
    backup: str = "latest",
    source: Stores = "backups",
    into: str = "",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    advance: bool = False,
    strict: bool = False,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    plan: str = "",
    confirm: str = "",
) -> Report:
    """データベースのリストア手順 (§1.2)

    Brings the database back to a backup: restores it beside the live one, proves the copy equal to the backup's
    snapshot, then swaps both names in one transaction. Run it when data was destroyed or corrupted and the rest of the
    system is well; when more is lost, run full-restore. With `into` it makes another database and touches nothing live.

    The services go on; their sessions end at the swap (a fraction of a second) and must reconnect. The old database is
    kept: undo-restore swaps back, discard-superseded removes it. Evidence: the table of what was proven.

    A .dump, .sql or .sql.gz (or a directory) that pg_dump left without a manifest restores too, as unproven: judged by
    the expectations and by what the live database has (nothing of it may be missing, its role may do the same). Its SQL
    runs as administrator: name only a dump that you trust. Departs from the manual: nothing takes the live name before
    it is judged, nothing is dropped, and a text that was cut off, has an error or a command to psql restores nothing.

    Args:
        environment: 対象の環境
        backup: latest、日付 (YYYYMMDD)、バックアップ名、またはファイル (.dump、.sql、.sql.gz)・ディレクトリのパス
        source: 保管先。copies は複製先
        into: 別名のデータベースとして作成 (例 app_db_new)。空なら本番のデータベースと入れ替え
        jobs: 並列数。0 は CPU の数
        advance: 旧データベースで既に使われた番号まで連番を進める
        strict: マニフェストのないファイルが期待値 (expectations) を破っていれば、本番データベースがなくても中止する
        accept: 復元しないまま進めるオブジェクトの名前 (中止されたリストアのレポートが示すもの)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    if is_foreign(backup):
        expectations.prepare(env)
    with runbook("Restore database", env, confirm, plan, changes=True, rank="recovery") as report:
        workers = check_jobs(jobs)
        if into:
            choosing.judge_name(report, env, into)
        server = read_server(env.postgres)
        chosen = choosing.choose(report, env, backup, source, into, server, accept)
        live = read_identity(env.postgres, env.postgres.database)
        if not into:
            steps.judge_obstacles(report, find_obstacles(env.postgres, env.postgres.database))
        steps.judge_space(report, env, chosen.bytes)
        judge_commits(report, env)
        choosing.plan(report, env, chosen, into)
        pin_database(report, env.postgres, replaced=not into)
        permit = report.permit(choosing.act(env, into), alone_act(env))
        untouched = (
            f"{env.postgres.database} was not touched" if live.oid else f"there is no {env.postgres.database} yet"
        )
        report.state_is(untouched, "fix the findings above, then launch it again")
        free_commits(report, permit, env, after=live)
        with advisory_lock(env.postgres) as guard:
            copy = steps.build_database(permit, env, chosen.source, chosen.properties, workers, into)
            proven = choosing.prove(report, env, chosen, copy, into, strict=strict)
            ready = steps.ready_database(report, env, copy, workers, after=proven)
            if into:
                rename_copy.after(ready)(permit, env.postgres, copy, into)
            else:
                with steps.swapping(report):
                    swapped = swap_databases.after(ready)(permit, env.postgres, guard, copy, live.oid, chosen.name)
        how = "proven by content" if chosen.backup else "not proven: there is no manifest"
        if into:
            report.outcome = f"{into} is what was in {chosen.name}, {how}; nothing else was changed"
        else:
            _tell_swapped(report, permit, env, chosen, swapped, advance=advance)
            report.outcome = f"{env.postgres.database} is what it was in {chosen.name}, {how}"
            discard_surplus(report, env)
        if chosen.backup:
            mark_verified(report, chosen.backup)
            report.measure(*measured(chosen.backup))
    return report


def _tell_swapped(
    report: Report, permit: Permit, env: Environment, chosen: Restorable, swapped: Swapped, *, advance: bool
) -> None:
    proven = "proven" if chosen.backup else "not proven"
    report.state_is(
        f"{chosen.name} is live, {proven}; "
        + (f"the replaced database is kept as {swapped.kept}" if swapped.kept else "there was no database to keep"),
        "do not restore again: that would lose what was written since"
        + (f". undo-restore with kept={swapped.kept} goes back" if swapped.kept else ""),
    )
    steps.advance(report, permit, env, swapped.kept, wanted=advance)
    choosing.tell_lost(report, env, chosen)
    report.fact("outage for clients", f"{swapped.outage_seconds:.2f} s")
    report.fact("old database", f"kept as {swapped.kept}" if swapped.kept else "there was none")
    if swapped.kept and "backend" in env.services.names and has_own_types(env.postgres, env.postgres.database):
        name = env.services.names["backend"]
        report.fact("restart", f"{name}: drivers cache the OIDs of the database's own types (psycopg, asyncpg)")


@flow(name="undo-restore", flow_run_name="undo-restore {environment}")
def undo_restore(environment: str, kept: str = NEWEST, plan: str = "", confirm: str = "") -> Report:
    """リストアの取り消し (§1.2)

    Swaps back: the database that the last restore replaced becomes live again, and the restored one is kept under
    another name. Run it when a restore turned out to be a mistake; run it again to swap once more.

    What was written since the swap is not in the database that comes back: the plan says how much. The plan's form
    names the database, so that what it confirms is never swapped twice. Evidence: both names, the counts.

    Args:
        environment: 対象の環境
        kept: newest、または保存されたデータベース名 (…__old_YYYYMMDD_HHMMSS)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Undo restore", env, confirm, plan, changes=True, rank="recovery") as report:
        name = env.postgres.database
        old = choosing.choose_superseded(report, find_superseded(env.postgres), kept)
        live = read_identity(env.postgres, name)
        steps.judge_obstacles(report, find_obstacles(env.postgres, name))
        since = read_writes(env.postgres, name) - old.writes
        lost = f"about {since:,} rows" if old.writes >= 0 and since >= 0 else "an unknown number of rows"
        report.fact("written since the swap, and not in the old database", lost)
        report.plan("swap back", f"{old.name} (replaced {old.since} by {old.backup}) becomes {name}; "
                    f"the present {name} is kept", size=old.bytes, seconds=0.2)  # fmt: skip
        pin_database(report, env.postgres, replaced=True)
        permit = report.permit(Act(UNDO, old.name))
        report.state_is("the live database was not touched", "launch it again when what is said above is put right")
        with advisory_lock(env.postgres) as guard, steps.swapping(report):
            swapped = swap_back(permit, env.postgres, guard, old, live.oid)
        report.state_is(f"{old.name} is {name} again, and the one before it is kept as {swapped.kept}",
                        "do not launch this again: it would swap once more")  # fmt: skip
        report.fact("outage for clients", f"{swapped.outage_seconds:.2f} s")
        report.outcome = f"{old.name} is {name} again"
        report.fact("replaced database", f"kept as {swapped.kept}")
    return report
