"""Writes that a recovery left behind, brought into the live database row by row (§8.2)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from blocks.postgres import Postgres
from flows.database.table_steps import judge_ties
from flows.pinned import pin_database
from flows.recovery import salvage_account as account
from flows.recovery.salvage_account import Salvage
from flows.recovery.salvage_source import NEWEST, Source, opened
from runbook.errors import OpsError, VerificationFailed
from runbook.kinds import action, probe
from runbook.report import Report
from runbook.run import runbook
from tasks.postgres.filenodes import read_database_oid
from tasks.postgres.keyed import match_keyed
from tasks.postgres.salvage import Differing, Writer
from tasks.postgres.salvage_apply import apply_salvage
from tasks.postgres.session import pinned
from tasks.postgres.table_ties import read_ties
from tasks.postgres.tables import Table, known_in, resolve, table_of


@flow(name="salvage-writes", flow_run_name="salvage-writes {environment} {source}")
def salvage_writes(
    environment: str,
    source: str = NEWEST,
    tables: tuple[str, ...] = (),
    differing: Differing = "unchanged",
    since_transaction: Annotated[int, Field(ge=0, le=4_294_967_295)] = 0,
    reviewed: str = "",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """復旧で失われた書き込みの救出 (§8.2)

    Compares what a recovery replaced with the live database, by primary key: rows that are only there, only here, or
    differ. What is missing becomes SQL and CSV for a person to read, and is then written into the live database in one
    transaction. Run it after restore-database, restore-to-point or undo-restore, to bring back what was written between
    the backup (or the target) and the recovery.

    Both sides are read in the order of their keys, so memory does not grow with the tables. A row that differs is
    updated only if the live one was not written since the recovery; else it is a conflict, and stays as it is unless
    differing=overwrite. Rows that are only in the live database stay. The statements guard themselves: an INSERT passes
    over a key that is there by then, an UPDATE over a row that was written since it was compared. Triggers do not fire;
    foreign keys are asked before the commit, sequences are advanced. Tables without a primary key cannot be compared,
    and are named.

    Undo: none by itself; the files tell every row. Take a backup first where that matters. Evidence: counts for each
    table, the files, readable by this user only.

    Departs from the manual: it knows no way to get back what a restore leaves behind.

    Args:
        environment: 対象の環境
        source: newest、保存された旧データベース名、旧データディレクトリ、または host:port/データベース
        tables: 対象のテーブル (スキーマ.テーブル)。空なら全テーブル
        differing: 値が異なる行。unchanged 復旧後に更新されていない行だけ更新、overwrite すべて更新、none 更新しない
        since_transaction: 復旧後の最初のトランザクション番号。0 は自動 (旧データベースのみ)
        reviewed: 計画が書き出した差分の名前 (計画のフォームが入力する)。空なら改めて比較する
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら比較して SQL と CSV を書き出すだけ
    """
    env = Environment.find(environment)
    with runbook("Salvage writes", env, confirm, plan, changes=True, rank="recovery") as report:
        if reviewed.strip():
            salvage = account.find(env, reviewed)
        else:
            with opened(report, env, source) as found:
                salvage = compare(env, found, tables, differing, since_transaction)
        account.tell(report, env, salvage)
        report.pin("reviewed", salvage.name)
        if salvage.applied:
            report.outcome = f"it was applied already, at {salvage.applied}"
            return report
        if not salvage.written:
            report.outcome = "nothing is to be written"
            return report
        _require_same_database(env, salvage)
        live = find_live(env.postgres, [one.table for one in salvage.written])
        ties = read_ties.after(live)(env.postgres, live)
        judge_ties(report, ties)
        account.plan(report, salvage)
        pin_database(report, env.postgres)
        report.pin_state("reviewed", salvage.digest)
        permit = report.permit(*account.acts(salvage))
        report.state_is("it may have been committed", "launch it again: what is written already is passed over")
        place = account.folder(env, salvage.stamp)
        done = apply_salvage.after(ties)(permit, env.postgres, place, salvage.digest, live, ties)
        account.mark_applied(env, salvage)
        account.tell_done(report, salvage, done)
    return report


_ANEW = "compare anew: launch it again with reviewed left empty"


@action(idempotent=True)
def compare(
    env: Environment, source: Source, tables: tuple[str, ...], differing: Differing, since_transaction: int
) -> Salvage:
    """Compare, and write what is found into files; they are there when this returns.

    Raises:
        OpsError: a table of that name is not in the source, or a database does not answer.
    """
    stamp = f"{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
    since = str(since_transaction - 1) if since_transaction else source.since
    live = env.postgres
    writer = Writer(account.folder(env, stamp), f"{source.told} against {live.database}, {stamp} UTC")
    with pinned(source.postgres, source.database) as ours, pinned(live, live.database) as theirs:
        chosen = [one.name for one in resolve(tables, known_in(ours))] if tables else []
        matched = match_keyed(live, ours, theirs, chosen)
        counted = tuple(writer.compare(ours, theirs, one, since, differing) for one in matched.tables)
    salvage = Salvage(stamp, source.told, read_database_oid.work(live, live.database), writer.close(), counted,
                      matched.others)  # fmt: skip
    account.keep(env, salvage)
    return salvage


@probe
def find_live(postgres: Postgres, names: list[str]) -> list[Table]:
    """The live tables of these quoted names.

    Raises:
        VerificationFailed: one is gone since it was compared.
    """
    with pinned(postgres, postgres.database) as connection:
        known = {one.name: one for one in known_in(connection)}
        if gone := [name for name in names if name not in known]:
            raise VerificationFailed(f"{', '.join(gone)} is gone since it was compared", _ANEW)
        return [table_of(connection, known[name]) for name in names]


def _require_same_database(env: Environment, salvage: Salvage) -> None:
    if read_database_oid(env.postgres, env.postgres.database) != salvage.database:
        raise OpsError("the live database is another one than was compared", _ANEW)
