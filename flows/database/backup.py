"""Backups of the application's database: taken, verified by restoring, pruned (§1.2)."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from itertools import islice
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.application.files import verify_files
from flows.database import expectations, restore_steps, wal_pruning
from flows.database.base_backup import verify_cluster
from flows.pinned import pin_deleted
from flows.pruning import find_prunable, prune
from flows.recovery.objectives import board
from flows.redis.verification import verify_redis
from flows.store import judge_key, mark_failed, mark_verified, measured, note, store_for, tell_backups, tidy
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from runbook.guard.permit import Act
from runbook.page import render
from runbook.report import Report
from runbook.run import runbook
from runbook.units import duration, size
from tasks.backups import publishing
from tasks.backups.catalogue import PREFIX, Backup, kind_of
from tasks.backups.manifest import Kind, Manifest, sums_of
from tasks.backups.retention import AS_TOML, DELETE, rule_of
from tasks.host.disk import read_disk
from tasks.postgres.dump.dump import FULL, Dumped, Form, What, dump_database, dump_globals
from tasks.postgres.dump.fill import Source
from tasks.postgres.dump.snapshot import read_lock_room
from tasks.postgres.restore.planner_statistics import analyze
from tasks.postgres.restore.staged_copy import (
    check_jobs,
    content_in,
    create_scratch,
    drop_scratch,
    dump_in,
    fill_scratch,
)
from tasks.postgres.server.server import Server, judge_programs, read_database_bytes, read_server
from tasks.postgres.tables.chosen import choose_tables
from tasks.reports.past import filed
from tasks.stores.store import RESOURCE, Store


@flow(name="backup-database", flow_run_name="backup-database {environment} {kind}")
def backup_database(
    environment: str,
    kind: Form = "full",
    tables: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
) -> Report:
    """データベースのバックアップ手順 (§1.2)

    Takes a backup of the application's database in one snapshot, with a manifest of its content read in that same
    snapshot, the roles, and a checksum of every file. Run the full kind daily, and before every change.

    It changes nothing in the database. A backup that was killed is never offered for a restore, and the next run
    removes what it left. Evidence: the manifest in the backup, the table of what is in it.

    Departs from the manual: the full kind is in directory format and parallel instead of one custom-format file; roles
    are added; the manifest makes a restore provable. A backup of chosen tables has the definitions of all.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        kind: full 完全、schema スキーマのみ、tables 特定のテーブル、sql SQL形式、sql.gz SQL形式 (圧縮)
        tables: kind が tables のときは必須。テーブル名。ほかの kind では空
        jobs: 並列数 (full と tables)。0 は CPU の数
    """
    env = Environment.find(environment)
    with runbook("Backup database", env, changes=True) as report:
        store = store_for(env, KIND_OF.get(kind, "postgres"))
        workers = check_jobs(jobs)
        server = read_server(env.postgres)
        what = judge_wanted(env, kind, tables)
        judge_source(report, env, server)
        report.fail_if_critical()
        tidy(report, env, store)  # before the room is judged: what a killed run left takes it
        judge_room(report, env, store)
        report.fail_if_critical()
        backup = take(report, env, server, store, workers, what)
        report.outcome = f"{backup.name} is in the store"
        report.fact("backup", backup.name)
        note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
        tell_backups(report, env)
    return report


@flow(name="verify-backup", flow_run_name="verify-backup {environment} {kind} {backup}")
def verify_backup(
    environment: str,
    kind: Kind = "postgres",
    backup: str = "latest",
    source: Stores = "backups",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
) -> Report:
    """バックアップのリストアテスト (§1.2, §7.3)

    Really restores a backup, the newest by default, and notes that it is verified: of the database into a scratch
    database, compared row by row, with the expectations run on it; of Redis on a scratch server, key by key; of the
    files into a scratch directory, entry by entry; of the whole cluster on a private instance, every row read, and the
    archived WAL after it, up to its end.
    Run it weekly for each kind: only this makes a backup one to rely on, and prune-backups
    deletes none of a kind before.

    Nothing live is touched; what was built is removed at the end, also when the run fails. It needs as much free space
    as a restore. Evidence: the table of what was proven, the seconds, those of the runs before.

    Departs from the manual: `pg_restore --list` reads the table of contents only, a flipped byte in the data passes.

    Args:
        environment: 対象の環境
        kind: バックアップの種類 (postgres は完全バックアップ)。名前を指定したときは名前で決まる
        backup: latest、日付 (YYYYMMDD)、またはバックアップ名 (backup_、schema_、tables_、sql_、dump_、app_、prefect_ …)
        source: 保管先。copies は複製先
        jobs: 並列数 (データベースのみ)。0 は CPU の数
        accept: (データベースのみ) 復元しないまま進めるオブジェクトの名前 (中止されたリストアのレポートが示すもの)。
            空なら、すべて復元する
    """
    env = Environment.find(environment)
    wanted = kind_of(backup, kind)
    if RESOURCE[wanted] == "postgres":
        expectations.prepare(env)
    with board.rebuilt(env), runbook("Verify backup", env, changes=True) as report:
        report.fact("kind", wanted)
        workers = check_jobs(jobs)
        if wanted == "redis":
            chosen = verify_redis(report, env, backup, source)
        elif wanted == "files":
            chosen = verify_files(report, env, backup, source)
        elif wanted == "cluster":
            chosen = verify_cluster(report, env, backup, source)
        elif wanted == "prefect":
            chosen = verify_database(report, env.of_prefect(), wanted, backup, source, workers, accept)
        else:
            chosen = verify_database(report, env, wanted, backup, source, workers, accept)
        report.measure(*measured(chosen))
        tell_trend(report, env, wanted)
        tell_backups(report, env)
        report.outcome = f"{chosen.name} restores, proven by content"
    return report


@flow(name="prune-backups", flow_run_name="prune-backups {environment} {kind} {source}")
def prune_backups(
    environment: str,
    kind: Kind = "postgres",
    source: Stores = "backups",
    hours: Annotated[int, Field(ge=AS_TOML, le=87600)] = AS_TOML,
    daily: Annotated[int, Field(ge=AS_TOML, le=3650)] = AS_TOML,
    weekly: Annotated[int, Field(ge=AS_TOML, le=520)] = AS_TOML,
    monthly: Annotated[int, Field(ge=AS_TOML, le=240)] = AS_TOML,
    keep_verified: Annotated[int, Field(ge=AS_TOML, le=1000)] = AS_TOML,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """古いバックアップの削除 (§1.2)

    Deletes backups of one kind by the tiers of `keep` in the environment's TOML: every backup of the last `hours`
    stays, then the newest of each day, ISO week and month of the environment's time zone (a verified one before
    others). Run it daily for each kind, in both sets of stores.

    No backup is deleted that is newer than the newest verified one, nor while fewer than `keep_verified` are verified;
    those stay whatever their age. A base backup stays while an incremental one needs it. Archived WAL stays as far as a
    recovery to any moment of the daily tier needs it; older base backups keep the WAL of their own time. Live data that
    a restore kept (kind=redis) is deleted when it is older than the daily tier. A run without a person deletes at most
    half of a store's backups, and the next one continues. It cannot be undone: the plan lists every name first.
    Evidence: that list, and what remains with the reason.

    Departs from the manual: deleting by age alone removes the last good copy when the newer ones are bad.

    Args:
        environment: 対象の環境
        kind: バックアップの種類 (postgres は完全バックアップ)
        source: 保管先。copies は複製先
        hours: この時間内のものはすべて残す。-1 は TOML の keep
        daily: 1日1つを残す日数。-1 は TOML の keep
        weekly: 1週1つを残す週数。-1 は TOML の keep
        monthly: 1月1つを残す月数。-1 は TOML の keep
        keep_verified: 古さにかかわらず残す検証済みバックアップの数。-1 は TOML の keep
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら一覧だけを表示
    """
    env = Environment.find(environment)
    with runbook("Prune backups", env, confirm, plan, changes=True) as report:
        if hours == 0 or keep_verified == 0:
            raise OpsError(f"hours is {hours}, keep_verified is {keep_verified}", "choose 1 or more for both")
        tidy(report, env, store_for(env, kind, source))
        rule = rule_of(env, source, hours=hours, daily=daily, weekly=weekly, monthly=monthly, verified=keep_verified)
        doomed = find_prunable(report, env, kind, rule, source)
        wal = wal_pruning.find_prunable_wal(report, env, doomed, rule, source) if kind == "cluster" else []
        if not doomed and not wal:
            tell_backups(report, env)
            report.outcome = "there is nothing to delete"
            return report
        pin_deleted(report, "backups", ((backup.where, backup.manifest.bytes) for backup in doomed))
        if wal:
            pin_deleted(report, "WAL", wal_pruning.files(wal))
        permit = report.permit(*(Act(DELETE, backup.where) for backup in doomed), *wal_pruning.acts(wal))
        if doomed:
            prune(report, permit, env, doomed)
        wal_pruning.prune_wal(report, permit, wal)
        tell_backups(report, env)
    return report


# pg_dump's directory format is smaller than the database in all but strange cases (no indexes, compressed); so is its
# text, without the indexes. Encrypting writes each file once more, two at a time.
SPACE_RATIO = 0.8
# Beyond it other sessions leave too little; the dump itself refuses where there is too little.
LOCK_RATIO = 0.8
KIND_OF: dict[Form, Kind] = {"full": "postgres", "schema": "schema", "tables": "tables", "sql": "sql", "sql.gz": "sql"}


def judge_wanted(env: Environment, form: Form, tables: Sequence[str]) -> What:
    """What a form asks for.

    Raises:
        OpsError: it is no such kind, or tables are named for another kind than `tables`; a table is not there.
    """
    if form not in KIND_OF:
        raise OpsError(f"kind is “{form}”", f"choose one of {', '.join(KIND_OF)}")
    if form != "tables" and tables:
        raise OpsError(f"tables are named for a backup of the kind {form}", "choose the kind tables, or name none")
    if form != "tables":
        return What(form)
    chosen = choose_tables(env.postgres, tables)
    return What(form, chosen.names, chosen.others)


def judge_source(report: Report, env: Environment, server: Server) -> None:
    """What must hold of a server whose content is to be trusted."""
    judge_programs(env.postgres, server)
    locks = read_lock_room(env.postgres, env.postgres.database)
    report.prefer(
        "locks for a dump",
        locks.tables <= LOCK_RATIO * locks.locks,
        locks.remedy,
        value=f"{locks.tables:,} tables, each of which a dump locks",
        expected=f"at most {LOCK_RATIO:.0%} of the server's table of locks: {locks.text}",
    )
    report.require(
        "rights of the login",
        server.superuser,
        f"give {env.postgres.admin_user} BYPASSRLS: row security hides rows from a dump without an error",
        value=env.postgres.admin_user,
        expected="superuser or BYPASSRLS",
    )
    if not server.checksums:
        report.warn("data checksums", "switch them on (pg_checksums): a manifest certifies corruption too", value="off")
    if not server.fsync:
        report.warn("fsync", "switch it on: a power cut loses data that was acknowledged", value="off", expected="on")


def judge_room(report: Report, env: Environment, store: Store) -> None:
    """Free space where the backup is made."""
    needed = int(read_database_bytes(env.postgres, env.postgres.database) * SPACE_RATIO)
    disk = read_disk(store.spool)
    report.require(
        "free space in the store",
        disk.free_bytes > needed,
        f"free {size(needed - disk.free_bytes)} at {store.spool}, or give the store more space",
        value=size(disk.free_bytes),
        expected=f"more than {size(needed)}",
    )


def take(
    report: Report,
    env: Environment,
    server: Server,
    store: Store,
    jobs: int,
    what: What = FULL,
    *,
    kind: Kind | None = None,
    tool: str = "",
) -> Backup:
    """Dump, read the manifest in the same snapshot, seal, put into the store. Of another database than the
    application's: its own `kind`, and the `tool` that wrote that."""
    started = time.monotonic()
    kind = kind or KIND_OF[what.form]
    name, directory = publishing.begin(store, kind, env.name, env.zone)
    dump_globals(env.postgres, directory)
    dumped = dump_database(env.postgres, directory, jobs, what)
    manifest = Manifest(
        kind=kind,
        name=name,
        environment=env.name,
        taken=dumped.taken,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool=", ".join(filter(None, [f"pg_dump {server.text}", tool])),
        files=sums_of(directory),
        content=dumped.content.model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, manifest)
    _report_results(report, dumped, backup)
    return backup


def _report_results(report: Report, dumped: Dumped, backup: Backup) -> None:
    content, manifest = dumped.content, backup.manifest
    report.fact("store", backup.store.where)
    report.fact("snapshot", f"{manifest.taken:%Y-%m-%d %H:%M:%S UTC} (LSN {content.lsn})")
    report.fact("size", f"{size(manifest.bytes)} of a database of {size(content.bytes)}, {dumped.compression}")
    report.fact("encrypted", f"to {len(manifest.recipients)} keys" if manifest.recipients else "no")
    report.fact("rows", f"{content.rows:,} in {len(content.tables)} tables")
    report.fact("Alembic revision", content.revision or "none")
    report.fact("dump", f"{duration(dumped.dump_seconds)} with {dumped.jobs} jobs")
    report.fact("manifest", f"{duration(dumped.manifest_seconds)}, beside the dump")
    judge_key(report, backup)
    report.prefer(
        "sequences",
        not dumped.behind,
        "advance them with setval: the next insert would collide",
        value="; ".join(dumped.behind[:3]) or f"{len(content.sequences)} at or past their columns",
        expected="not behind their columns",
    )
    if content.uncomputable:
        ours = "the backup has their stored values, and our restores load them; pg_restore alone fails"
        if content.part != "full" or manifest.kind == "sql":
            ours = "a restore of this backup fails; one of the kind full has their stored values"
        hint = f"{ours}. To fix it, have the function name its tables with their schema, or SET search_path"
        named = "; ".join(f"{one.name}: {one.why}" for one in content.uncomputable)
        report.warn("generated columns that pg_dump cannot restore", hint, value=named)
    if content.volatile_checks:
        named = ", ".join(f"{schema}.{table}: {name}" for schema, table, name in content.volatile_checks)
        report.fact("CHECK constraints that a restore does not check (time, functions)", named)
    report.table(
        "Content",
        ("table", "rows", "size"),
        [(table, f"{found.rows:,}", size(found.bytes)) for table, found in content.tables.items()],
    )
    if content.not_compared:
        report.table("Not compared by a restore", ("what",), [(what,) for what in content.not_compared])


MOST_SHOWN = 20


def verify_database(
    report: Report, env: Environment, kind: Kind, wanted: str, source: Stores, jobs: int, accept: Sequence[str] = ()
) -> Backup:
    """Choose a backup of the database, judge whether there is room and a server for it, and verify it.

    Raises:
        OpsError: there is none.
        RunbookFailed: it is damaged, or is not what the manifest says.
    """
    chosen = restore_steps.choose_backup(report, env, wanted, source, kind)
    restore_steps.judge_server(report, env, chosen, read_server(env.postgres))
    restore_steps.judge_space(report, env, content_in(chosen).bytes)
    dump = restore_steps.without_accepted(report, env, dump_in(chosen), accept)
    report.fail_if_critical()
    verify(report, env, chosen, dump, jobs)
    return chosen


def verify(report: Report, env: Environment, backup: Backup, dump: Source, jobs: int) -> None:
    """Restore it into a scratch database, compare, run the expectations, drop the scratch, note that it is verified.
    Data that breaks a rule is CRITICAL; the backup counts as neither verified nor failed: it has what the database had.

    Raises:
        VerificationFailed: it does not restore.
        RunbookFailed: what was restored is not what the manifest says.
    """
    try:
        content = content_in(backup)
        empty = create_scratch(env.postgres, content.properties)
        scratch = fill_scratch(env.postgres, dump, content.properties, empty, jobs)
        analyzing = analyze.after(scratch).submit(env.postgres, scratch.database, jobs)
        # The rules are about the application's rows: other backups, and Prefect's own database, do not have them.
        whole = content.part == "full" and backup.manifest.kind == "postgres"
        origin = expectations.origin_of(backup)
        checking = expectations.start(report, env, scratch.database, after=scratch, origin=origin) if whole else None
        proven = restore_steps.prove_database(report, env, backup, scratch)
        restore_steps.tell_statistics(report, analyzing.result())
        expectations.report_results(report, checking, "on the scratch database")
        restore_steps.try_application_login(report, env, scratch, after=proven)
        report.fail_if_critical()
    except (VerificationFailed, RunbookFailed) as error:  # another says nothing of the backup
        mark_failed(report, backup, str(error))
        raise
    finally:
        drop_scratch(env.postgres)
    report.fact("restored in", duration(scratch.seconds))
    mark_verified(report, backup)


def tell_trend(report: Report, env: Environment, kind: Kind) -> None:
    """The last verifications of one kind in this environment, newest first: a restore that takes longer each week
    misses the RTO one day."""
    rows = []
    for one in islice(filed(env.reports_directory, env.name, render.key(report)), MOST_SHOWN):
        backup, took = one.facts.get("backup", ""), one.facts.get("restored in")
        if backup.startswith(f"{PREFIX[kind]}_") and took:
            rows.append((str(one.content["started"])[:16], backup, took, one.status))
    report.table("Verifications before this one", ("when", "backup", "restored in", "status"), rows)
