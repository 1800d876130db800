"""Backups of the application's database (§1.2)."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.database import steps
from flows.database.verification import tell_trend, verify
from flows.store import find_prunable, note, prune, tell_backups
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import duration, size
from runbook.report import Report, Status
from runbook.run import runbook
from tasks import catalogue
from tasks.gx import process
from tasks.host import read_disk
from tasks.manifest import Kind, Manifest, sums_of
from tasks.postgres.copy import check_jobs
from tasks.postgres.dump import Dumped, dump_database, dump_globals
from tasks.postgres.server import Server, judge_programs, read_database_bytes, read_server
from tasks.retention import DELETE, read_store

# pg_dump's directory format is smaller than the database in all but strange cases (no indexes, compressed).
SPACE_RATIO = 0.8


@flow(name="backup-database", flow_run_name="backup-database {environment}")
def backup_database(environment: str, jobs: Annotated[int, Field(ge=0, le=32)] = 0) -> Report:
    """データベースバックアップ・完全 (§1.2)

    Takes a full backup of the application's database: a parallel dump in one snapshot, with a manifest of its content
    read in that same snapshot, the roles, and a checksum of every file. Run it daily, and before every change.

    It changes nothing in the database. A backup that was killed is never offered for a restore, and the next run
    removes what it left. Evidence: the manifest in the backup, the table of what is in it.

    Departs from the manual: directory format in parallel instead of one custom-format file; roles are added; the
    manifest makes a restore provable.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        jobs: 並列数。0 は CPU の数
    """
    env = Environment.find(environment)
    with runbook("Backup database", env, changes=True) as report:
        store = Path(env.backups.postgres)
        workers = check_jobs(jobs)
        server = read_server(env.postgres)
        needed = int(read_database_bytes(env.postgres, env.postgres.database) * SPACE_RATIO)
        judge_source(report, env, server)
        disk = read_disk(store)
        report.expect(
            "free space in the store",
            disk.free_bytes > needed,
            f"free {size(needed - disk.free_bytes)} at {store}, or give the store more space",
            value=size(disk.free_bytes),
            expected=f"more than {size(needed)}",
        )
        report.fail_if_critical()
        if left := catalogue.clean_unfinished(store, env.name):
            report.fact("removed unfinished backups", ", ".join(left))
        name = _take(report, env, server, store, workers)
        report.outcome = f"{name} is in the store"
        report.fact("backup", name)
        stored = read_store(store, "postgres", env.name)
        tell_backups(report, stored.backups)
        note(report, env, f"Backup completed - {name}, {size(stored.backups[-1].manifest.bytes)}")
    return report


@flow(name="verify-backup", flow_run_name="verify-backup {environment} {backup}")
def verify_backup(environment: str, backup: str = "latest", jobs: Annotated[int, Field(ge=0, le=32)] = 0) -> Report:
    """バックアップリストアテスト (§1.2, §7.3)

    Really restores a backup, the newest by default, into a scratch database, compares it with the manifest row by row,
    runs the expectations, and notes that it is verified. Run it weekly: only this makes a backup one to rely on.

    Nothing live is touched; the scratch database is dropped at the end, also when the run fails. It needs as much free
    space as a restore. Evidence: the table of what was proven, the seconds, those of the runs before.

    Departs from the manual: `pg_restore --list` reads the table of contents only, a flipped byte in the data passes.

    Args:
        environment: 対象の環境
        backup: latest、日付 (YYYYMMDD)、またはバックアップ名
        jobs: 並列数。0 は CPU の数
    """
    env = Environment.find(environment)
    process.start()
    with runbook("Verify backup", env, changes=True) as report:
        workers = check_jobs(jobs)
        chosen = steps.choose_backup(report, env, backup)
        steps.judge_server(report, env, chosen, read_server(env.postgres))
        steps.judge_space(report, env, chosen)
        report.fail_if_critical()
        verify(report, env, chosen, workers)
        tell_trend(report, env)
        report.outcome = f"{chosen.name} restores, proven by content"
    return report


@flow(name="prune-backups", flow_run_name="prune-backups {environment}")
def prune_backups(
    environment: str,
    kind: Kind = "postgres",
    days: Annotated[int, Field(ge=1, le=3650)] = 30,
    keep_verified: Annotated[int, Field(ge=1, le=1000)] = 3,
    confirm: str = "",
) -> Report:
    """古いバックアップの削除 (§1.2)

    Removes backups that are older than `days`. Run it daily, after the backup.

    The newest verified backups stay whatever their age, and nothing newer than them goes: while no backup is verified,
    none is deleted. It cannot be undone: the plan lists every name first. Evidence: that list, and what remains.

    Departs from the manual: deleting by age alone removes the last good copy when the newer ones are bad.

    Args:
        environment: 対象の環境
        kind: バックアップの種類
        days: これより古いものを削除
        keep_verified: 残す検証済みバックアップの数
        confirm: 環境名を入力すると実行。空なら一覧だけを表示
    """
    env = Environment.find(environment)
    with runbook("Prune backups", env, confirm, changes=True) as report:
        if days < 1 or keep_verified < 1:
            raise OpsError(f"days is {days}, keep_verified is {keep_verified}", "choose 1 or more for both")
        stored, doomed = find_prunable(report, env, kind, timedelta(days=days), keep_verified)
        tell_backups(report, [backup for backup in stored.backups if backup not in doomed])
        if not doomed:
            report.outcome = "there is nothing to delete"
            return report
        permit = report.permit(*(Act(DELETE, str(backup.path)) for backup in doomed))
        prune(report, permit, env, doomed)
    return report


def judge_source(report: Report, env: Environment, server: Server) -> None:
    """What must hold of a server whose content is to be trusted."""
    judge_programs(env.postgres, server)
    report.expect(
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


def _take(report: Report, env: Environment, server: Server, store: Path, jobs: int) -> str:
    started = time.monotonic()
    name, directory = catalogue.begin(store, "postgres", env.name, env.zone)
    dump_globals(env.postgres, directory)
    dumped = dump_database(env.postgres, directory, jobs)
    path = seal(env, name, directory, dumped, server, time.monotonic() - started)
    _tell(report, dumped, catalogue.open_backup(store, path.name).manifest)
    return name


def seal(env: Environment, name: str, directory: Path, dumped: Dumped, server: Server, seconds: float) -> Path:
    """Sum every file, write the manifest, publish."""
    manifest = Manifest(
        kind="postgres",
        name=name,
        environment=env.name,
        taken=dumped.taken,
        seconds=seconds,
        host=socket.gethostname(),
        tool=f"pg_dump {server.text}",
        files=sums_of(directory),
        content=dumped.content.model_dump(mode="json"),
    )
    return catalogue.publish(directory, manifest)


def _tell(report: Report, dumped: Dumped, manifest: Manifest) -> None:
    content = dumped.content
    report.fact("snapshot", f"{manifest.taken:%Y-%m-%d %H:%M:%S UTC} (LSN {content.lsn})")
    report.fact("size", f"{size(manifest.bytes)} of a database of {size(content.bytes)}, {dumped.compression}")
    report.fact("rows", f"{content.rows:,} in {len(content.tables)} tables")
    report.fact("Alembic revision", content.revision or "none")
    report.fact("dump", f"{duration(dumped.dump_seconds)} with {dumped.jobs} jobs")
    report.fact("manifest", f"{duration(dumped.manifest_seconds)}, beside the dump")
    report.expect(
        "sequences",
        not dumped.behind,
        "advance them with setval: the next insert would collide",
        value="; ".join(dumped.behind[:3]) or f"{len(content.sequences)} at or past their columns",
        expected="not behind their columns",
        otherwise=Status.WARN,
    )
    report.table(
        "Content",
        ("table", "rows", "size"),
        [(table, f"{found.rows:,}", size(found.bytes)) for table, found in content.tables.items()],
    )
    if content.not_compared:
        report.table("Not compared by a restore", ("what",), [(what,) for what in content.not_compared])
