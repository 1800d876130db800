"""Backups of the application's database: taken, verified by restoring, pruned (§1.2)."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment, Stores
from blocks.postgres.server import Postgres
from flows.application.files import verify_files
from flows.database import expectations, wal_pruning
from flows.database.base_backup import verify_cluster
from flows.database.verification import restored_privately, show_trend, verify_database
from flows.pinned import pin_deleted
from flows.pruning import deletion_of, find_prunable
from flows.recovery.objectives import board
from flows.redis.verification import verify_redis
from flows.store import judge_key, judge_shrunk, measured, note, show_backups, store_for, tidy
from runbook import clock, metrics
from runbook.change import carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, duration, size
from tasks.backups import publishing
from tasks.backups.catalogue import Backup, kind_of
from tasks.backups.manifest import Kind, Manifest, sums_of
from tasks.backups.retention import AS_TOML, rule_of
from tasks.host.disk import read_disk
from tasks.postgres.dump.dump import FULL, Dumped, Form, What, dump_database, dump_globals
from tasks.postgres.dump.snapshot import read_lock_limit
from tasks.postgres.restore.staged_copy import check_jobs
from tasks.postgres.server.server import Server, judge_programs, read_database_bytes, read_server
from tasks.postgres.tables.chosen import choose_tables
from tasks.recovery_points.estimate import ON_PRIVATE_SERVER
from tasks.stores.store import RESOURCE, Store
from tasks.wal.archive.prune import OldWal


@flow(name="backup-database", flow_run_name=RunName("backup-database {environment} {kind}"))
def backup_database(
    environment: str,
    kind: Form = "full",
    tables: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
) -> Report:
    """データベースのバックアップ手順 (§1.2)

    Backs up the application's database in one snapshot. The backup contains the roles, a checksum of every file, and a
    manifest of the content, read in the same snapshot. Run `full` daily and before every change. It warns with the
    tables that lost most of their rows since the newest verified backup.

    It changes nothing in the database. An interrupted backup is never offered to a restore; the next run removes it.
    Evidence: the manifest in the backup, the table of its content.

    Departs from the manual: `full` is parallel, in directory format, with roles and a manifest that makes a restore
    provable. `tables` contains the definitions of all tables.

    Args:
        environment: Environment (lab, staging, production …)
        kind: full; schema: schema only; tables: chosen tables; sql: as SQL; sql.gz: as SQL, compressed
        tables: Required for kind=tables: names of tables. Empty for other kinds
        jobs: Parallel jobs (full and tables). 0: number of CPUs
    """
    env = Environment.find(environment)
    with runbook("Backup database", env, changes=True) as report:
        store = store_for(env, KIND_OF.get(kind, "postgres"))
        workers = check_jobs(jobs)
        server = read_server(env.postgres)
        what = judge_wanted(env, kind, tables)
        judge_source(report, env, server)
        report.fail_if_critical()
        tidy(report, env, store)  # before the space is judged: leftovers of a killed run use it
        judge_room(report, env, store)
        report.fail_if_critical()
        backup = take(report, env, server, store, workers, what)
        report.outcome = f"{backup.name} is in the store"
        report.fact("backup", backup.name)
        judge_shrunk(report, backup)
        note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
        show_backups(report, env)
    return report


@flow(name="verify-backup", flow_run_name=RunName("verify-backup {environment} {kind} {backup}"))
def verify_backup(
    environment: str,
    kind: Kind = "postgres",
    backup: str = "latest",
    source: Stores = "backups",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
) -> Report:
    """バックアップのリストアテスト (§1.2, §7.3)

    Restores a backup, the newest by default, compares it with its manifest, and marks it as verified. Run it weekly for
    each kind: prune-backups deletes no backup of a kind before one is verified.

    - database: on a private server of this host, compared row by row; then the expectations run on it. The live server
      is only read. Without the server's programs here, or if the backup does not restore there, it is restored into a
      scratch database of the live server; the report says which
    - Redis: on a scratch server, compared key by key
    - files: into a scratch directory, compared entry by entry
    - cluster: on a private instance; every row is read, then the archived WAL up to its end

    It changes nothing live and removes the scratch copy at the end, also after a failure. It needs as much free space
    as a restore. Evidence: the table of the comparison, the duration, the durations of earlier runs.

    Departs from the manual: `pg_restore --list` reads only the table of contents and misses damaged data.

    Args:
        environment: Environment (lab, staging, production …)
        kind: Kind of backup (postgres: full). With a backup's name, the name decides
        backup: latest, a date (YYYYMMDD) or a backup's name (backup_, schema_, tables_, sql_, dump_, app_, prefect_ …)
        source: Store. copies: the replica store
        jobs: Parallel jobs (database only). 0: number of CPUs
        accept: (database only) Objects to leave unrestored (a refused restore's report names them). Empty: restore
            everything
    """
    env = Environment.find(environment)
    wanted = kind_of(backup, kind)
    if RESOURCE[wanted] == "postgres":
        expectations.prepare(env, routine=True)
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
        what, size_bytes = measured(chosen)
        report.measure(f"{what}{ON_PRIVATE_SERVER}" if restored_privately(report) else what, size_bytes)
        show_trend(report, env, wanted)
        show_backups(report, env)
        report.outcome = f"{chosen.name} restores, proven by content"
    return report


@flow(name="prune-backups", flow_run_name=RunName("prune-backups {environment} {kind} {source}"))
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

    Deletes backups of one kind by the tiers of `keep` in the environment's TOML. It keeps every backup of the last
    `hours`, then the newest of each day, ISO week and month in the environment's time zone, verified ones first. Run it
    daily for each kind, in both sets of stores.

    - It keeps every backup newer than the newest verified one, and the `keep_verified` newest verified ones. It deletes
      nothing while fewer are verified.
    - It keeps the last backup before tables lost most of their rows, as long as the longest tier keeps any.
    - It keeps a base backup while an incremental one needs it, and the WAL that a recovery to any moment of the daily
      tier needs. Older base backups keep the WAL that they need themselves.
    - It deletes live data that a restore kept (kind=redis) after the daily tier.
    - An unattended run deletes at most half of a store's backups; the next run continues.

    It cannot be undone: the plan lists every name first. Evidence: that list, the kept backups with the reason.

    Departs from the manual: deletion by age alone removes the last good copy when the newer ones are bad.

    Args:
        environment: Environment (lab, staging, production …)
        kind: Kind of backup (postgres: full)
        source: Store. copies: the replica store
        hours: Keep everything newer than this many hours. -1: keep in the TOML
        daily: Days that keep one backup each. -1: keep in the TOML
        weekly: Weeks that keep one backup each. -1: keep in the TOML
        monthly: Months that keep one backup each. -1: keep in the TOML
        keep_verified: Verified backups to keep whatever their age. -1: keep in the TOML
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the list
    """
    env = Environment.find(environment)
    with runbook("Prune backups", env, confirm, plan, changes=True, without_confirm="stages") as report:
        if hours == 0 or keep_verified == 0:
            raise OpsError(f"hours is {hours}, keep_verified is {keep_verified}", "choose 1 or more for both")
        tidy(report, env, store_for(env, kind, source))
        rule = rule_of(env, source, hours=hours, daily=daily, weekly=weekly, monthly=monthly, verified=keep_verified)
        doomed = find_prunable(report, env, kind, rule, source)
        wal = wal_pruning.find_prunable_wal(report, env, doomed, rule, source) if kind == "cluster" else []
        if not doomed and not wal:
            show_backups(report, env)
            report.outcome = "nothing to delete"
            return report
        deletions, of_wal = [deletion_of(report, env, doomed)] if doomed else [], wal_pruning.deletions_of(wal)
        pins = [partial(_pin_deleted, doomed, wal)]
        with carrying_out(report, *deletions, *of_wal, effect=_effect(doomed, wal), pins=pins) as carry:
            for deletion in deletions:
                carry(deletion)
            wal_pruning.prune_wal(report, carry, wal, of_wal)
        show_backups(report, env)
    return report


# pg_dump's directory format and its text are smaller than the database, unless it has no indexes and compresses badly.
# Rows that are compressed behind pg_dump leave the disk at once. Encryption writes each file once more, two at a time.
SPACE_RATIO = 0.8
KIND_OF: dict[Form, Kind] = {"full": "postgres", "schema": "schema", "tables": "tables", "sql": "sql", "sql.gz": "sql"}


def judge_wanted(env: Environment, form: Form, tables: Sequence[str]) -> What:
    """The parts of the database to dump.

    Raises:
        OpsError: the kind does not exist, a table does not exist, or tables are named for another kind than `tables`.
    """
    if form not in KIND_OF:
        raise OpsError(f"kind is “{form}”", f"choose one of {', '.join(KIND_OF)}")
    if form != "tables" and tables:
        raise OpsError(f"tables are named for a backup of the kind {form}", "choose kind=tables, or name no tables")
    if form != "tables":
        return What(form)
    chosen = choose_tables(env.postgres, tables)
    return What(form, chosen.names, chosen.others)


def judge_source(report: Report, env: Environment, server: Server) -> None:
    """Whether the server can be dumped completely, and its data trusted."""
    judge_programs(env.postgres, server)
    locks = read_lock_limit(env.postgres, env.postgres.database)
    report.judge(
        metrics.DUMP_LOCKS,
        locks.tables / locks.locks,
        locks.remedy,
        of=f"a dump locks {locks.tables:,} tables; {locks.text}",
        worst=Status.WARN,  # the dump itself refuses where the locks are too few
    )
    report.require(
        "rights of the login",
        server.superuser,
        f"ALTER ROLE {env.postgres.admin_user} BYPASSRLS: row security silently hides rows from a dump",
        value=env.postgres.admin_user,
        expected="superuser or BYPASSRLS",
    )
    if not server.checksums:
        hint = "switch them on (pg_checksums): without them a backup silently contains corrupt pages"
        report.warn("data checksums", hint, value="off", expected="on")
    if not server.fsync:
        report.warn("fsync", "switch it on: a power cut loses committed data", value="off", expected="on")


def judge_room(report: Report, env: Environment, store: Store) -> None:
    """Free disk space where the backup is written."""
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
    """Dump, read the manifest in the same snapshot, seal, and put the backup into the store.

    `kind` and `tool`: of a database that is not the application's, its own kind and the program that owns it.
    """
    dumped, backup = dump_into(store, env, env.postgres, server, jobs, what, kind=kind, tool=tool)
    _report_results(report, dumped, backup)
    return backup


def dump_into(
    store: Store,
    env: Environment,
    postgres: Postgres,
    server: Server,
    jobs: int,
    what: What = FULL,
    *,
    kind: Kind | None = None,
    tool: str = "",
) -> tuple[Dumped, Backup]:
    """The backup of a database of `env` into a store, from the server `postgres`. The rest is as in `take`."""
    started = time.monotonic()
    kind = kind or KIND_OF[what.form]
    name, directory = publishing.begin(store, kind, env.name, env.zone)
    dump_globals(postgres, directory)
    dumped = dump_database(postgres, directory, jobs, what)
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
    return dumped, backup


def _report_results(report: Report, dumped: Dumped, backup: Backup) -> None:
    content, manifest = dumped.content, backup.manifest
    report.fact("store", backup.store.where)
    report.fact("snapshot", f"{clock.text(manifest.taken)} (LSN {content.lsn})")
    report.fact("size", f"{size(manifest.bytes)} of a database of {size(content.bytes)}, {dumped.compression}")
    report.fact("encrypted", f"to {len(manifest.recipients)} keys" if manifest.recipients else "no")
    report.fact("rows", f"{content.rows:,} in {len(content.tables)} tables")
    report.fact("Alembic revision", content.revision or "none")
    report.fact("dump", f"{duration(dumped.dump_seconds)} with {dumped.jobs} jobs")
    if dumped.peak_bytes:
        report.fact("uncompressed rows in the store", f"at most {size(dumped.peak_bytes)} at any moment, none now")
    report.fact("manifest", f"{duration(dumped.manifest_seconds)}, in parallel with the dump")
    judge_key(report, backup)
    report.prefer(
        "sequences",
        not dumped.behind,
        "advance them with setval, or the next insert fails with a duplicate key",
        value="; ".join(dumped.behind[:3]) or f"{len(content.sequences)} at or past the maximum of their columns",
        expected="not behind their columns",
    )
    if content.uncomputable:
        means = "restore-database restores their stored values; pg_restore alone fails"
        if content.part != "full" or manifest.kind == "sql":
            means = "a restore of this backup fails; kind=full contains their stored values"
        hint = f"{means}. To fix it, schema-qualify the tables in the function, or SET search_path in it"
        named = "; ".join(f"{one.name}: {one.why}" for one in content.uncomputable)
        report.warn("generated columns that pg_dump cannot restore", hint, value=named)
    if content.volatile_checks:
        named = ", ".join(f"{schema}.{table}: {name}" for schema, table, name in content.volatile_checks)
        report.fact("CHECK constraints that a restore does not check (they use the time or functions)", named)
    report.table(
        "Content",
        ("table", "rows", "size"),
        [(table, f"{found.rows:,}", size(found.bytes)) for table, found in content.tables.items()],
    )
    if content.not_compared:
        report.table("Not compared by a restore", ("object",), [(what,) for what in content.not_compared])


def _pin_deleted(doomed: Sequence[Backup], wal: Sequence[OldWal], report: Report) -> None:
    pin_deleted(report, "backups", ((backup.where, backup.manifest.bytes) for backup in doomed))
    if wal:
        pin_deleted(report, "WAL", wal_pruning.files(wal))


def _effect(doomed: Sequence[Backup], wal: Sequence[OldWal]) -> Effect:
    freed = size(sum(backup.manifest.bytes for backup in doomed))
    also = ", and WAL that none of the kept ones needs" if wal else ""
    return Effect(f"deletes {counted(len(doomed), 'backup')} ({freed}){also}", "", "what only they hold is lost")
