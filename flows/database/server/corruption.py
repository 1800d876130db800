"""Whether the database's files are sound: checksums, collation versions, every page by amcheck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.pinned import pin_database
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from runbook.units import duration, size
from tasks.postgres.upkeep.amcheck import (
    EXTENSION,
    INSTALL,
    Checked,
    Extension,
    check_relations,
    find_amcheck,
    find_relations,
    install_amcheck,
    wait_for_amcheck,
)
from tasks.postgres.upkeep.corruption import Checksums, Collations, read_checksums, read_collations

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
            report_results(report, checked, heapallindexed)
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


MOST_ROWS = 50
MOST_FINDINGS = 10
# Nothing is repaired on a standby, and physical damage does not travel: each server has its own.
ON_STANDBY = (
    "a standby cannot be repaired: launch this with where=primary, and if that is sound keep a copy of this host's "
    "files, check its disk and memory, and build the standby anew (pg_basebackup -R)"
)


def judge_checksums(report: Report, found: Checksums, *, standby: bool) -> None:
    """Whether damage can be noticed at all, and what has been."""
    also = ", on the primary and every standby while all are stopped" if standby else ""
    report.prefer(
        "data checksums",
        found.on,
        f"stop the server and switch them on: pg_checksums --enable{also}",
        value="on" if found.on else "off: failures are not measured",
    )
    report.require(
        "settings that hide damage",
        not found.hiding,
        "switch them off: damaged pages are read as if sound",
        value=", ".join(found.hiding) or "none",
        expected="none",
    )
    for failed in found.failures[:MOST_FINDINGS]:
        report.fail(
            f"failed checksums in {failed.database or 'what all databases share'}",
            (
                ON_STANDBY
                if standby
                else "find the page in the server's log, check disk and memory of the host, restore "
                "(restore-database) or REINDEX where only an index is hit"
            )
            + "; pg_stat_reset() in that database starts the count anew",
            value=f"{failed.count}, the last at {failed.last}",
            expected="0",
        )
    if found.on and not found.failures:
        report.passed("failed checksums", value=0, expected=0)


def judge_collations(report: Report, found: Collations, database: str, *, standby: bool) -> None:
    """Whether text is sorted as it was when the indexes were built."""
    for changed in found.changed[:MOST_FINDINGS]:
        kind = changed.name.split(" ", 1)[0]
        target = changed.name.split(" ", 1)[1] if kind == "collation" else f'"{database}"'
        indexes = f"REINDEX {', '.join(changed.indexes[:5])}" if changed.indexes else "no index depends on it"
        if len(changed.indexes) > 5:
            indexes = f"REINDEX the {len(changed.indexes)} indexes in the table below"
        refresh = f"ALTER {kind.upper()} {target} REFRESH {'COLLATION ' * (kind == 'database')}VERSION"
        elsewhere = (
            "launch this with where=primary; where only the standby differs, give its host the primary's "
            "operating system; where both do, on the primary: "
        )
        report.warn(
            f"version of {changed.name}",
            f"{elsewhere * standby}{indexes}; then {refresh}",
            value=f"recorded {changed.recorded}, the provider has {changed.actual}",
            expected="the same: text may sort differently, indexes miss rows",
        )
    if found.changed:
        rows = [(changed.name, index) for changed in found.changed for index in changed.indexes]
        _table(report, "Indexes that depend on a changed collation", ("collation", "index"), rows)
    if found.unrecorded:
        report.warn(
            "collations without a recorded version",
            "REINDEX what sorts by them, unless the host's libraries are those it was built with; a version is "
            "recorded only when the database (restore-database) or the collation is made anew",
            value=f"not measured: {', '.join(found.unrecorded[:5])}"
            + f" and {len(found.unrecorded) - 5} more" * (len(found.unrecorded) > 5),
        )
    if not found.changed:
        value = f"{found.compared} the same, {found.unversioned} without a version (C sorts by bytes and needs none)"
        report.passed("collation versions", value=value)


def judge_checked(report: Report, checked: tuple[Checked, ...], *, live: bool, standby: bool) -> None:
    """One finding for each damaged relation; what was not checked is said. `live`: it is the application's database."""
    damaged = [one for one in checked if one.outcome == "damaged"]
    for one in damaged[:MOST_FINDINGS]:
        remedy = ON_STANDBY if standby else _remedy(one, damaged, live)
        report.fail(f"{_kind(one)} {one.relation.name}", remedy, value=one.message, expected="sound")
    if len(damaged) > MOST_FINDINGS:
        report.warn("more damaged relations", "they are in the table", value=len(damaged) - MOST_FINDINGS)
    reached = [one for one in checked if one.outcome == "sound"]
    if not damaged and reached:
        report.passed("heap and indexes", value=f"{len(reached)} sound, {size(_bytes(reached))}")
    missed = [one for one in checked if one.outcome == "not reached"]
    names = list(dict.fromkeys(one.relation.table for one in missed))
    report.prefer(
        "time budget",
        not missed,
        f"launch it with a larger budget_seconds, or with tables={names[:5]}",
        value=f"{len(missed)} of {len(checked)} relations not reached ({size(_bytes(missed))})",
        expected="all reached",
    )
    # Indexes of other kinds are a lasting gap and in the table; what should have been checked and was not is a finding.
    failed = [one for one in checked if one.outcome == "not checked" and not one.relation.why_not]
    if failed:
        report.warn(
            "relations that could not be checked",
            "see why, then launch it with their tables",
            value="; ".join(f"{one.relation.name}: {one.message}" for one in failed[:3]),
        )
    if not damaged and not reached:
        report.warn("heap and indexes", "see the table for the reasons", value="not measured: nothing was checked")


def _remedy(one: Checked, damaged: list[Checked], live: bool) -> str:
    if one.relation.is_index:
        heap_is_sound = not any(
            other.relation.table == one.relation.table and not other.relation.is_index for other in damaged
        )
        rebuild = f"REINDEX INDEX CONCURRENTLY {one.relation.name}"
        return f"its table is sound: {rebuild}" if heap_is_sound else f"the table's damage first, then {rebuild}"
    first = "keep a copy of the files, check disk and memory of the host, then restore: restore-database, "
    copy = "this copy's backup is not to be trusted: check the live database, then verify-backup the one before"
    return first + "or single tables of it; do not VACUUM or rewrite the table before" if live else copy


def report_results(report: Report, checked: tuple[Checked, ...], heapallindexed: bool) -> None:
    """The outcome and the tables."""
    count = Counter(one.outcome for one in checked)
    report.outcome = (
        ", ".join(
            f"{count[outcome]} {outcome}"
            for outcome in ("sound", "damaged", "not reached", "not checked")
            if count[outcome]
        )
        or "there was nothing to check"
    )
    report.fact(
        "checked",
        f"{size(_bytes(one for one in checked if one.outcome in ('sound', 'damaged')))} in "
        f"{duration(sum(one.seconds for one in checked))}; rows missing from indexes: "
        f"{'looked for' if heapallindexed else 'not looked for (heapallindexed)'}",
    )
    if ends := [one.relation.name for one in checked if one.relation.is_unindexed and one.outcome == "sound"]:
        names = ", ".join(ends[:MOST_FINDINGS]) + " …" * (len(ends) > MOST_FINDINGS)
        report.fact(
            "ends of files",
            f"{len(ends)} tables without a B-tree index: a cut-off end is noticed only as far "
            f"as VACUUM had marked pages in the visibility map; rows behind that were not checked: {names}",
        )
    bad = [one for one in checked if one.outcome != "sound"]
    rows = [(one.relation.name, _kind(one), one.outcome, one.message) for one in bad]
    _table(report, "Damaged, or not checked", ("relation", "kind", "outcome", "why"), rows)
    longest = sorted((one for one in checked if one.outcome == "sound"), key=lambda one: -one.seconds)[:20]
    columns = ("relation", "kind", "size", "seconds")
    report.table(
        "Sound: what took longest",
        columns,
        [(one.relation.name, _kind(one), size(one.relation.bytes), f"{one.seconds:.2f}") for one in longest],
    )


def _table(report: Report, name: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    more = f" (the first {MOST_ROWS} of {len(rows)})" if len(rows) > MOST_ROWS else ""
    report.table(name + more, columns, rows[:MOST_ROWS])


def _kind(one: Checked) -> str:
    return "index" if one.relation.is_index else "table"


def _bytes(checked: Iterable[Checked]) -> int:
    return sum(one.relation.bytes for one in checked)
