"""Backups of the application's database (§1.2)."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from runbook.render import duration, size
from runbook.report import Report, Status
from runbook.run import runbook
from tasks import catalogue
from tasks.host import read_disk
from tasks.manifest import Manifest, sums_of
from tasks.postgres.copy import check_jobs
from tasks.postgres.dump import Dumped, dump_database, dump_globals
from tasks.postgres.server import Server, judge_programs, read_database_bytes, read_server

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
