"""Whether the database's files are sound: checksums, collation versions, every page by amcheck."""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from blocks.postgres import Postgres
from flows.database.corruption_findings import judge_checked, judge_checksums, judge_collations, tell
from flows.pinned import pin_database
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.report import Report
from runbook.run import runbook
from tasks.postgres.amcheck import check_relations, find_relations
from tasks.postgres.amcheck_extension import (
    EXTENSION,
    INSTALL,
    Extension,
    find_amcheck,
    install_amcheck,
    wait_for_amcheck,
)
from tasks.postgres.corruption import read_checksums, read_collations

Where = Literal["auto", "primary", "standby"]


@flow(name="check-corruption", flow_run_name="check-corruption {environment} {where} {database}")
def check_corruption(
    environment: str,
    where: Where = "auto",
    database: str = "",
    tables: list[str] = [],  # noqa: B006 - Prefect's form needs the value; it is never changed
    heapallindexed: bool = False,
    budget_seconds: Annotated[int, Field(ge=1, le=86400)] = 600,
    install: bool = False,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """データ破損の検査 (§1)

    Reads every heap page, B-tree and GIN index of a database with amcheck, and reports failed checksums and collations
    whose provider has another version than they were recorded with. Run it weekly, and after a power cut, a disk fault
    or a move to another operating system.

    It reads the standby where the environment names one ([standby]), so that the primary has no load of it; or a
    restored copy (`database`). Neither says anything of the primary's own disk: its heap pages are read by each
    backup, its indexes only by where=primary.

    It only reads: locks like a SELECT, one relation at a time, its snapshot holds vacuum back meanwhile. Only with
    `install` it changes something: CREATE EXTENSION amcheck, on the primary, to be undone by DROP EXTENSION. A page in
    the server's cache is not read from the disk again. Evidence: the table of what was checked, what was not, and why.

    Not in the manual.

    Args:
        environment: 対象の環境
        where: 検査するサーバー。autoは、環境に[standby]があればスタンバイ、なければプライマリ
        database: 検査するデータベース。空ならアプリケーションのもの (復元したコピーの名前も可)
        tables: 検査するテーブル (table または schema.table)。空なら全て
        heapallindexed: 全ての行が索引にあることも確認 (時間とメモリがかかる)
        budget_seconds: amcheckに使う時間の上限 (秒)
        install: amcheckがなければCREATE EXTENSIONを実行 (プライマリで)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: installの場合だけ環境名を入力。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Check corruption", env, confirm, plan, changes=install) as report:
        server = _server(env, where)
        name = database or server.database
        report.fact("database", name)
        extension = find_amcheck(server, name)
        standby = _told_server(report, env, server, extension)
        if install and not extension.schema:
            if _needs_installing(report, env, name):
                pin_database(report, env.postgres)
                install_amcheck(report.permit(Act(INSTALL, f"{EXTENSION} in {name}")), env.postgres, name)
            extension = wait_for_amcheck(server, name)
            report.fact("installed", f"{EXTENSION} {extension.version} in {name}")
        judge_collations(report, read_collations(server, name), name, standby=standby)
        if _has_amcheck(report, extension, name):
            relations = find_relations(server, name, tables)
            checked = check_relations(server, name, extension.schema, relations, heapallindexed, float(budget_seconds))
            judge_checked(report, checked, live=name == server.database, standby=standby)
            tell(report, checked, heapallindexed)
        else:
            report.outcome = "heap and indexes were not checked: amcheck is missing"
        judge_checksums(report, read_checksums(server), standby=standby)  # last: what amcheck read has been counted
    return report


def _server(env: Environment, where: Where) -> Postgres:
    if where not in ("auto", "primary", "standby"):
        raise OpsError(f"where is “{str(where)[:40]}”", "choose auto, primary or standby")
    return env.standby if where == "standby" or (where == "auto" and env.has("standby")) else env.postgres


def _told_server(report: Report, env: Environment, server: Postgres, extension: Extension) -> bool:
    """Which server it is, in the report's head; whether it is a standby.

    Raises:
        OpsError: it should be one and is none.
    """
    address = f"{server.host}:{server.port}"
    if server is not env.postgres and not extension.in_recovery:
        raise OpsError(
            f"{address}, named by [standby], is no standby (any more)",
            "both servers take writes: stop the one that clients do not use and rejoin it (rejoin-standby), or choose "
            "where=primary",
        )
    if extension.in_recovery:
        replayed = f", replayed up to {extension.replayed}" if extension.replayed else ""
        report.fact("server", f"standby {address}{replayed}; the primary's own disk was not read (where=primary)")
    else:
        report.fact("server", f"primary {address}")
    return extension.in_recovery


def _needs_installing(report: Report, env: Environment, database: str) -> bool:
    """Planned for the primary, from where a standby gets it (and soon will, where the primary has it already).

    Raises:
        OpsError: it cannot be installed.
    """
    there = find_amcheck(env.postgres, database)
    if there.schema:
        return False
    if not there.available:
        raise OpsError("this server has no amcheck to install", "install the contrib package of its version")
    if there.in_recovery:
        raise OpsError("a standby cannot install an extension", "install it on the primary: it comes by replication")
    report.plan(INSTALL, f"{EXTENSION} {there.available} in {database}; undo: DROP EXTENSION {EXTENSION}")
    return True


def _has_amcheck(report: Report, extension: Extension, database: str) -> bool:
    if extension.schema:
        report.fact("amcheck", extension.version)
        return True
    create = f"run CREATE EXTENSION amcheck in {database} (on the primary), or launch this with install=true"
    hint = create if extension.available else "install the contrib package of the server's version, then " + create
    report.warn("heap and indexes", hint, value="not measured: amcheck is not installed", expected="checked")
    return False
