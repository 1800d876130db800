"""Which transaction did it (§8.4): the one that deleted, rewrote, truncated or dropped, looked for in WAL itself."""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.recovery.forensics import transaction_report, transaction_window
from flows.recovery.forensics.transaction_report import Account, report_results
from runbook.errors import OpsError
from runbook.report import Report
from runbook.run import runbook
from tasks.wal.reading.supply import read_supply
from tasks.wal.reading.touches import TOUCHING, Touches
from tasks.wal.reading.transactions import DEFINING, Definitions, Kind

EVERY: list[Kind] = ["DELETE", "UPDATE", "TRUNCATE", "DROP"]


@flow(name="find-transaction", flow_run_name="find-transaction {environment} {table}")
def find_transaction(
    environment: str,
    table: str = "",
    since: str = "",
    until: str = "",
    kinds: list[Literal["DELETE", "UPDATE", "TRUNCATE", "DROP"]] = EVERY,
    at_least: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1,
    oid: Annotated[int, Field(ge=0, le=4_294_967_295)] = 0,
    timeline: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
    most_segments: Annotated[int, Field(ge=1, le=100_000)] = 1024,
    source: Stores = "backups",
) -> Report:
    """破壊トランザクションの特定 (§8.4)

    Finds the transactions that deleted, updated, truncated or dropped a table, in a window of WAL: number, LSN and time
    of the commit, rows of each kind, sorted by time, each with restore-to-point's form filled in with "just before this
    transaction". Run it when rows are gone or wrong, and nobody knows since when.

    It reads only: WAL of the archive, of the receiver's directory (what is not a whole segment too) and of pg_wal. A
    table that was truncated, rewritten (VACUUM FULL) or dropped since is found by what WAL says of its files; one that
    the live database does not have any more by its name in databases that restores kept, on the standby, or in the
    newest base backup. What was done in a database that a restore has replaced is told apart. Where none of them knows
    the table, the dropped relations are listed with their OIDs.

    Evidence: the transactions; which WAL was read, and which was not there.

    Departs from the manual: it names a point in time as the aim, and no way to find it.

    Args:
        environment: 対象の環境
        table: テーブル名 (oid がなければ必須。スキーマ.テーブル)。パーティションは親テーブルを指定
        since: 検索の開始。日時 (タイムゾーンなしは環境の時刻) または LSN。空なら終了の 24 時間前
        until: 検索の終了。日時または LSN。空なら現在まで
        kinds: 探す操作の種類
        at_least: この行数以上を変更したトランザクションだけを表示 (TRUNCATE と DROP は常に表示)
        oid: 削除済みテーブルの OID (名前から分からないとき)。0 は名前から調べる
        timeline: たどるタイムライン。0 は最新
        most_segments: 読むセグメント数 (各 16 MB) の上限
        source: WAL アーカイブの保管先。copies は複製先
    """
    env = Environment.find(environment)
    with runbook("Find transaction", env) as report, transaction_window.room(env) as directory:
        if not table.strip() and not oid:
            raise OpsError("no table was named", "fill in table, e.g. public.orders")
        if not kinds:
            raise OpsError("no kind was chosen", f"choose some of {', '.join(EVERY)}")
        edges = transaction_window.parse_edges(since, until, env)
        supply = read_supply(env, source, transaction_window.find_system(env, source), timeline)
        window = transaction_window.choose_window(env, supply, edges, most_segments, directory)
        transaction_window.tell_window(report, window)
        tables = transaction_report.find_tables(report, env, table, oid, source)
        definitions = Definitions(tables.databases, tables.swap)
        transaction_window.read_window(env, window, DEFINING, definitions.read, "what was dropped")
        transaction_window.judge_begin(report, window, definitions.first, asked=bool(since.strip()))
        transaction_report.find_older(report, env, tables, definitions, source)
        if tables.databases - definitions.databases:  # that of before a restore: what was done to it is read too
            definitions = Definitions(tables.databases, tables.swap)
            transaction_window.read_window(env, window, DEFINING, definitions.read, "what was dropped before")
        files = transaction_report.trace_files(tables, definitions)
        touches = Touches(frozenset(files.names), at_least)
        rows = [kind for kind in kinds if kind in ("DELETE", "UPDATE")]
        if rows and files.names:
            transaction_window.read_window(
                env, window, TOUCHING, lambda lines: touches.read(lines, rows), "rows of the table"
            )
        report_results(report, env, Account(table, kinds, window, tables, definitions, files, touches))
    return report
