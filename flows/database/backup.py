"""Backups of the application's database: taken, verified by restoring, pruned (§1.2)."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.application.verification import verify_files
from flows.database import expectations, taking, wal_pruning
from flows.database.cluster_verification import verify_cluster
from flows.database.verification import tell_trend, verify_database
from flows.pinned import pin_deleted
from flows.pruning import find_prunable, prune
from flows.recovery import board
from flows.redis.verification import verify_redis
from flows.store import measured, note, store_for, tell_backups, tidy
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import size
from runbook.report import Report
from runbook.run import runbook
from tasks.catalogue import kind_of
from tasks.manifest import Kind
from tasks.postgres.copy import check_jobs
from tasks.postgres.dump import Form
from tasks.postgres.server import read_server
from tasks.retention import AS_TOML, DELETE, rule_of
from tasks.stores.store import RESOURCE


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
        store = store_for(env, taking.KIND_OF.get(kind, "postgres"))
        workers = check_jobs(jobs)
        server = read_server(env.postgres)
        what = taking.judge_wanted(env, kind, tables)
        taking.judge_source(report, env, server)
        report.fail_if_critical()
        tidy(report, env, store)  # before the room is judged: what a killed run left takes it
        taking.judge_room(report, env, store)
        report.fail_if_critical()
        backup = taking.take(report, env, server, store, workers, what)
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
        accept: (データベースのみ) 復元しないまま進めるオブジェクトの名前 (中止されたリストアのレポートが示すもの)
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
