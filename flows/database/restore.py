"""Restores of the application's database (§1.2): beside, proven, swapped; undone; the old ones discarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from blocks.postgres.server import execute
from flows.database import expectations, restore_steps
from flows.database import foreign_dumps as foreign
from flows.database.superseded import discard_surplus
from flows.database.waiting_commits import alone_act, free_commits, judge_commits
from flows.pinned import pin_database
from flows.store import mark_verified, measured, store_for
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.run import runbook
from runbook.units import duration
from tasks.backups.catalogue import Backup
from tasks.postgres.dump.fill import Source
from tasks.postgres.dump.foreign import ForeignDump, is_foreign, read_foreign
from tasks.postgres.restore.staged_copy import (
    MAKE,
    REPLACE,
    Copy,
    building_name,
    check_jobs,
    content_in,
    copy_name,
    dump_in,
    is_reserved,
    oid_of,
    rename_copy,
)
from tasks.postgres.restore.superseded import Superseded, find_superseded, read_writes
from tasks.postgres.restore.swap import UNDO, Swapped, advisory_lock, swap_back, swap_databases
from tasks.postgres.server.properties import Properties, read_properties
from tasks.postgres.server.server import Server, find_obstacles, has_own_types, read_identity, read_server

NEWEST = "newest"


@dataclass(frozen=True)
class Restorable:
    """A dump, the attributes that its database gets, and the backup that can prove it: None where nothing can."""

    name: str
    source: Source
    properties: Properties
    bytes: int
    backup: Backup | None
    foreign: ForeignDump | None = None


def choose(
    report: Report, env: Environment, wanted: str, which: Stores, into: str, server: Server, accept: Sequence[str] = ()
) -> Restorable:
    """Find what an operator means, and judge it. `accept`: what may be left out.

    Raises:
        OpsError: there is no such backup or file, or it is not one for this.
        RunbookFailed: it is damaged.
    """
    if is_foreign(wanted):
        found = read_foreign(env.postgres, store_for(env, "postgres", which).spool, wanted)
        foreign.judge(report, env, found, into, server)
        source = restore_steps.without_accepted(report, env, found.source, accept)
        report.fail_if_critical()
        return Restorable(found.name, source, _properties(env), found.estimate_bytes, None, found)
    backup = restore_steps.choose_backup(report, env, wanted, which)
    content = content_in(backup)
    report.require(
        "what is in the backup",
        content.part == "full" or bool(into),
        f"restore-tables puts chosen tables into the live database; into=… makes another database of {backup.name}",
        value={"full": "everything", "schema": "definitions without rows", "tables": "some tables"}[content.part],
        expected="everything, to take the live database's place",
    )
    if into and content.part == "tables":
        report.warn(
            "foreign keys",
            "they would need other tables' rows; take a full backup to have them",
            value="left out",
            expected="none is missing",
        )
    restore_steps.judge_server(report, env, backup, server)
    if not into:
        restore_steps.judge_login(report, env, server)
    source = restore_steps.without_accepted(report, env, dump_in(backup), accept)
    return Restorable(backup.name, source, content.properties, content.bytes, backup)


def _properties(env: Environment) -> Properties:
    """A dump without a manifest says nothing of the database's owner, locale and rights: the live one's are taken, a
    new one's where there is none."""
    with env.postgres.connect() as connection:
        there = execute(connection, "SELECT 1 FROM pg_database WHERE datname = %s", env.postgres.database)
        found = read_properties(connection, env.postgres.database if there else "template0")
    if there:
        return found
    user = env.postgres.user
    new = {"owner": user, "acl": _new_rights(user), "settings": (), "comment": "", "connection_limit": -1}
    return found.model_copy(update={**new, "template": False})  # template0 itself is one


def _new_rights(owner: str) -> tuple[str, ...]:
    """Those that CREATE DATABASE gives: https://www.postgresql.org/docs/current/ddl-priv.html"""
    return (
        *(f"{owner}: {right}" for right in ("CONNECT", "CREATE", "TEMPORARY")),
        "PUBLIC: CONNECT",
        "PUBLIC: TEMPORARY",
    )


def judge_name(report: Report, env: Environment, into: str) -> None:
    """Whether a database may be made under that name.

    Raises:
        OpsError: it is no name.
    """
    if not into.strip() or len(into.encode()) > 63 or "\0" in into:
        raise OpsError(f"“{into[:80]}” cannot name a database", "choose a name of at most 63 bytes")
    live = env.postgres.database
    with env.postgres.connect() as connection:
        taken = bool(oid_of(connection, into))
    reserved = (
        into.startswith(live + "__")
        or into == env.postgres.maintenance_database
        or is_reserved(into)
        or live in (copy_name(into), building_name(live, into))
    )
    why = "is the live database" if into == live else "is there already" if taken else "is reserved" if reserved else ""
    report.require(
        "name of the new database",
        not why,
        "leave into empty to restore the live database"
        if into == live
        else "choose a name that nobody has, without our endings; leave into empty to replace the live database",
        value=f"{into} {why}".strip(),
        expected="free",
    )


def choose_superseded(report: Report, found: Sequence[Superseded], kept: str) -> Superseded:
    """The database to go back to.

    Raises:
        OpsError: there is none of that name.
    """
    chosen = [old for old in found if kept in (NEWEST, old.name)]
    if not chosen:
        there = ", ".join(old.name for old in found[:5])
        hint = f"those that are there, newest first: {there}" if there else "no restore has replaced a database here"
        raise OpsError(f"there is no database “{kept[:80]}” to go back to", hint)
    report.fact("database to go back to", chosen[0].name)
    report.pin("kept", chosen[0].name)
    return chosen[0]


def act(env: Environment, into: str) -> Act:
    """The deed that needs the permit."""
    return Act(MAKE, into) if into else Act(REPLACE, env.postgres.database)


def plan_restore(report: Report, env: Environment, chosen: Restorable, into: str) -> None:
    """The plan's lines."""
    if chosen.backup and not into:
        restore_steps.plan_database(report, env, chosen.backup)
        return
    seconds = chosen.bytes / restore_steps.RESTORE_BYTES_PER_SECOND
    target = into or env.postgres.database
    beside = building_name(env.postgres.database, into) if into else copy_name(target)
    with env.postgres.connect() as connection:
        if oid_of(connection, beside):
            report.plan("drop", f"{beside}: what a run that ended early left")
    report.plan(f"restore {chosen.name} beside", f"into {beside}", size=chosen.bytes, seconds=seconds)
    proof = "against the manifest" if chosen.backup else "by the expectations alone: nothing says what was in it"
    report.plan("judge the copy", proof, seconds=seconds / 5)
    end = f"{beside} becomes {target}"
    report.plan("name" if into else "swap", end if into else f"{end}; the old one is kept as {target}__old_…")


def prove(report: Report, env: Environment, chosen: Restorable, copy: Copy, into: str, *, strict: bool) -> object:
    """By content where there is a manifest; else what can be said without one.

    Raises:
        RunbookFailed: the copy is not what the manifest says, breaks the application's rules, or lacks what the live
            database has.
    """
    if chosen.backup:
        return restore_steps.prove_database(report, env, chosen.backup, copy)
    return foreign.prove(report, env, copy, into, strict=strict)


def tell_lost(report: Report, env: Environment, chosen: Restorable) -> None:
    """What is lost by going back to it."""
    if chosen.backup:
        restore_steps.tell_window(report, env, chosen.backup)
    elif chosen.foreign:
        age = (report.started - chosen.foreign.written).total_seconds()
        report.prefer(
            "data loss against the RPO",
            age <= env.rpo_seconds,
            "every write since pg_dump began is lost; the file's date says when it ended",
            value=f"more than {duration(age)}",
            expected=f"at most {duration(env.rpo_seconds)}",
        )


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
        accept: 復元しないまま進めるオブジェクトの名前 (中止されたリストアのレポートが示すもの)。空なら、すべて復元する
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    if is_foreign(backup):
        expectations.prepare(env)
    with runbook("Restore database", env, confirm, plan, changes=True, rank="recovery") as report:
        workers = check_jobs(jobs)
        if into:
            judge_name(report, env, into)
        server = read_server(env.postgres)
        chosen = choose(report, env, backup, source, into, server, accept)
        live = read_identity(env.postgres, env.postgres.database)
        if not into:
            restore_steps.judge_obstacles(report, find_obstacles(env.postgres, env.postgres.database))
        restore_steps.judge_space(report, env, chosen.bytes)
        judge_commits(report, env)
        plan_restore(report, env, chosen, into)
        pin_database(report, env.postgres, replaced=not into)
        permit = report.permit(act(env, into), alone_act(env))
        untouched = (
            f"{env.postgres.database} was not touched" if live.oid else f"there is no {env.postgres.database} yet"
        )
        report.state_is(untouched, "fix the findings above, then launch it again")
        free_commits(report, permit, env, after=live)
        with advisory_lock(env.postgres) as guard:
            copy = restore_steps.build_database(permit, env, chosen.source, chosen.properties, workers, into)
            proven = prove(report, env, chosen, copy, into, strict=strict)
            ready = restore_steps.ready_database(report, env, copy, workers, after=proven)
            if into:
                rename_copy.after(ready)(permit, env.postgres, copy, into)
            else:
                with restore_steps.swapping(report):
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
    restore_steps.advance(report, permit, env, swapped.kept, wanted=advance)
    tell_lost(report, env, chosen)
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
        old = choose_superseded(report, find_superseded(env.postgres), kept)
        live = read_identity(env.postgres, name)
        restore_steps.judge_obstacles(report, find_obstacles(env.postgres, name))
        since = read_writes(env.postgres, name) - old.writes
        lost = f"about {since:,} rows" if old.writes >= 0 and since >= 0 else "an unknown number of rows"
        report.fact("written since the swap, and not in the old database", lost)
        report.plan(
            "swap back",
            f"{old.name} (replaced {old.since} by {old.backup}) becomes {name}; the present {name} is kept",
            size=old.bytes,
            seconds=0.2,
        )
        pin_database(report, env.postgres, replaced=True)
        permit = report.permit(Act(UNDO, old.name))
        report.state_is("the live database was not touched", "launch it again when what is said above is put right")
        with advisory_lock(env.postgres) as guard, restore_steps.swapping(report):
            swapped = swap_back(permit, env.postgres, guard, old, live.oid)
        report.state_is(
            f"{old.name} is {name} again, and the one before it is kept as {swapped.kept}",
            "do not launch this again: it would swap once more",
        )
        report.fact("outage for clients", f"{swapped.outage_seconds:.2f} s")
        report.outcome = f"{old.name} is {name} again"
        report.fact("replaced database", f"kept as {swapped.kept}")
    return report
