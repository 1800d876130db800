"""Base backups of the whole PostgreSQL cluster: the start of every point-in-time recovery (§8.2)."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Literal

from blocks.environment import Environment, Stores
from blocks.postgres.wal import Wal
from flows import store
from flows.branch import record_branch
from flows.database.free_space import judge_room
from flows.database.wal_reading import judge_wal
from flows.store import judge_key, mark_failed, mark_verified, note, show_backups, store_for, tidy
from runbook.errors import OTHER_BACKUPS, OpsError, RunbookFailed, VerificationFailed
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.backups import publishing
from tasks.backups.catalogue import Backup, open_all
from tasks.backups.manifest import Manifest, sums_of
from tasks.cluster.base_backup import (
    INCREMENTAL_VERSION,
    BaseBackupSource,
    NoSummaries,
    read_source,
    take_base,
)
from tasks.cluster.content import Form, cluster_in, lineage
from tasks.cluster.copy import build_instance, read_whole
from tasks.cluster.instance import VERIFYING, prepare_instance, put_away, root_for, running, sweep_instance
from tasks.cluster.recovery import wait_recovered
from tasks.cluster.target import Stop
from tasks.host.disk import read_disk
from tasks.pgbackrest.backup import take_label
from tasks.postgres.server.server import program_version
from tasks.stores.store import Store
from tasks.wal.archive.continuity import read_chain
from tasks.wal.archive.destinations import archive_of, ship_now
from tasks.wal.format.names import lsn_text


@flow(name="backup-cluster", flow_run_name=RunName("backup-cluster {environment} {kind}"))
def backup_cluster(environment: str, kind: Literal[Form, "auto"] = "full") -> Report:
    """クラスタ全体のベースバックアップ (§8.2)

    Takes a physical copy of the whole PostgreSQL cluster (pg_basebackup) with the WAL that it needs. It reads the
    stored copy and compares every file with PostgreSQL's manifest, as pg_verifybackup does. With the archived WAL,
    restore-to-point recovers it to any later moment.

    Run kind=full weekly, and after every failover or swap of the cluster. Run kind=auto on the other days. It takes an
    incremental backup (PostgreSQL 17 or later with summarize_wal), a full one if there is no base for it, and nothing
    if the server supports no incremental backups.

    It changes nothing in the database. An incremental backup depends on the one before it, and prune-backups keeps
    that. Evidence: the backup's first and last WAL position, and whether the archive continues from there.

    Departs from the manual, which has dumps only: those lose everything since the last night.

    Args:
        environment: Environment (lab, staging, production …)
        kind: full; incremental: changes since the last one (PostgreSQL 17 and later); auto: for daily runs, incremental
            if possible
    """
    env = Environment.find(environment)
    with runbook("Backup cluster", env, changes=True) as report:
        store = store_for(env, "cluster")
        source = read_source(env.postgres)
        form = daily_form(report, env, store, source) if kind == "auto" else kind
        if form is None:
            report.outcome = f"no backup today: {report.facts[NO_INCREMENTAL]}; the weekly full backups continue"
            return report
        judge_source(report, env, source, form)
        report.fail_if_critical()
        tidy(report, env, store)
        try:
            backup = _take(report, env, store, source, form)
        except NoSummaries as error:
            if kind != "auto":
                raise
            report.warn("incremental base backup", "nothing to do: a full one was taken instead", value=error.message)
            tidy(report, env, store)
            backup = _take(report, env, store, source, "full")
        report.prefer(
            "database in the backup",
            cluster_in(backup).has_database,
            "restore the database, then take another base backup: this one cannot restore it",
            value=env.postgres.database + " does not exist" * (not cluster_in(backup).has_database),
        )
        judge_archive(report, env, backup)
        report.outcome = f"{backup.name} is in the store, every file verified"
        report.fact("backup", backup.name)
        note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
        show_backups(report, env)
    return report


def _take(report: Report, env: Environment, store: Store, source: BaseBackupSource, form: Form) -> Backup:
    own = not by_pgbackrest(env)
    base = choose_base(report, env, store, source) if form == "incremental" and own else None
    if own:
        judge_store_space(report, store, source, base)
    report.fail_if_critical()
    return take(report, env, store, source, base, form)


# With zstd's fastest level; a database of texts needs a third.
SPACE_RATIO = 0.8
FULL_EVERY_SECONDS = 8 * 86_400.0
"""A week and one day of grace."""
NO_INCREMENTAL = "no incremental base backups"


def judge_source(report: Report, env: Environment, source: BaseBackupSource, kind: Form) -> None:
    """Whether a base backup of this server can be taken and later restored."""
    found = program_version(env.postgres, "pg_basebackup")
    report.require(
        "programs",
        found == source.major,
        f"install PostgreSQL {source.major}'s programs, or correct [postgres] programs",
        value=found,
        expected=source.major,
    )
    report.require(
        "rights of the login",
        source.may_replicate,
        f"ALTER ROLE {env.postgres.admin_user} REPLICATION",
        value=env.postgres.admin_user,
        expected="superuser or REPLICATION",
    )
    report.require(
        "tablespaces",
        not source.tablespaces,
        "move their tables into pg_default (ALTER TABLE … SET TABLESPACE), or use pgBackRest by hand: a staged restore "
        "would write into the live tablespaces",
        value=", ".join(source.tablespaces) or "only PostgreSQL's own",
        expected="only PostgreSQL's own",
    )
    if kind == "incremental":
        report.require(
            "version for incremental backups",
            source.major >= INCREMENTAL_VERSION,
            "take a full one",
            value=source.major,
            expected=f"{INCREMENTAL_VERSION} or newer",
        )
        report.require(
            "summarize_wal",
            source.summarizes,
            "ALTER SYSTEM SET summarize_wal = on, then take a full one",
            value="on" if source.summarizes else "off",
            expected="on",
        )
    for name, on in (("data checksums", source.checksums), ("fsync", source.fsync)):
        if not on:
            hint = "switch it on: without it a copy silently contains corruption, or a power cut loses commits"
            report.warn(name, hint, value="off", expected="on")


def daily_form(report: Report, env: Environment, store: Store, source: BaseBackupSource) -> Form | None:
    """The form for a day between the weekly full backups: incremental, or full if none is younger than a week.

    None if the server supports no incremental backups; the reason is a fact.
    """
    if why := why_not_incremental(source):
        report.fact(NO_INCREMENTAL, why)
        return None
    if by_pgbackrest(env):
        return "incremental"
    own = _own_bases(env, open_all(store, "cluster")[0], source)
    fresh = [one for one in own if cluster_in(one).form == "full" and one.age_seconds < FULL_EVERY_SECONDS]
    return "incremental" if fresh else "full"


def why_not_incremental(source: BaseBackupSource) -> str:
    """The reason why the server supports no incremental base backups; empty if it does."""
    if source.major < INCREMENTAL_VERSION:
        return f"PostgreSQL {source.major} supports no incremental base backups ({INCREMENTAL_VERSION} and later do)"
    return "" if source.summarizes else "summarize_wal is off (ALTER SYSTEM SET summarize_wal = on)"


def _own_bases(env: Environment, backups: Sequence[Backup], source: BaseBackupSource) -> list[Backup]:
    return [
        backup
        for backup in backups
        if backup.manifest.environment == env.name and not backup.failed and cluster_in(backup).system == source.system
    ]


def choose_base(report: Report, env: Environment, store: Store, source: BaseBackupSource) -> Backup:
    """The newest base backup of this cluster, as the base of an incremental one.

    Raises:
        OpsError: there is none.
        VerificationFailed: a backup that it depends on is missing.
    """
    backups, _ = open_all(store, "cluster")
    own = _own_bases(env, backups, source)
    if not own:
        raise OpsError(f"{store.where} has no base backup of this cluster", "take a full one first (kind=full)")
    base = max(own, key=lambda backup: backup.manifest.taken)
    whole = lineage(base, backups)
    report.fact("depends on", " ← ".join(backup.name for backup in reversed(whole)))
    return base


def judge_store_space(report: Report, store: Store, source: BaseBackupSource, base: Backup | None) -> None:
    """Free disk space for the backup."""
    needed = int(source.bytes * SPACE_RATIO * (0.5 if base else 1.0))
    disk = read_disk(store.spool)
    report.require(
        "free space in the store",
        disk.free_bytes > needed,
        f"free {size(needed - disk.free_bytes)} at {store.spool}, or give the store more space",
        value=size(disk.free_bytes),
        expected=f"more than {size(needed)}",
    )


def by_pgbackrest(env: Environment) -> bool:
    """Whether pgBackRest takes the backups, into its own repository."""
    return env.has("wal") and env.wal.tool == "pgbackrest"


def take(
    report: Report, env: Environment, store: Store, source: BaseBackupSource, base: Backup | None, kind: Form
) -> Backup:
    """Copy, verify, seal, and put it into the store; for pgBackRest only a record of its backup."""
    name, directory = publishing.begin(store, "cluster", env.name, env.zone)
    if by_pgbackrest(env):
        taken = take_label(env.wal, env.postgres, source, kind, directory)
    else:
        taken = take_base(env.postgres, source, directory, base)
    content = taken.content
    manifest = Manifest(
        kind="cluster",
        name=name,
        environment=env.name,
        taken=content.stopped,
        seconds=taken.seconds,
        host=socket.gethostname(),
        tool=f"pgBackRest {content.label}" if content.label else f"pg_basebackup {source.major}",
        files=dict(taken.files) or sums_of(directory),
        content=content.model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, manifest)
    report.fact("store", backup.store.where)
    report.fact("kind", content.form + (f", on {content.base}" if content.base else ""))
    report.fact("cluster", f"system identifier {content.system}, timeline {content.timeline}")
    report.fact("WAL", f"starts at {content.start_lsn}; recovery can stop at {content.stop_lsn} or later")
    if content.label:
        report.fact("pgBackRest", f"{content.label}, in stanza {env.wal.stanza}")
    else:
        report.fact("size", f"{size(manifest.bytes)} of a cluster of {size(source.bytes)}")
    report.fact("copied in", duration(taken.seconds))
    by = "by pgbackrest verify" if content.label else "against PostgreSQL's manifest"
    report.fact(f"verified {by} in", duration(taken.verify_seconds))
    judge_key(report, backup)
    return backup


def judge_archive(report: Report, env: Environment, backup: Backup) -> None:
    """Whether the WAL archive continues after the backup; otherwise recovery reaches only the backup's own time."""
    content = cluster_in(backup)
    hint = "start the WAL receiver and the archiver (python -m tasks.wal.archiver), and check their logs"
    if not env.has("wal"):
        report.warn("archived WAL", "add [wal] to the environment's TOML", value="none: the environment has no [wal]")
        return
    try:
        shipped = ship_now(env)
        chain = read_chain(
            archive_of(env, "backups", content.system), content.stop, content.timeline, content.segment_bytes
        )
    except OpsError as error:
        report.warn("archived WAL", error.hint or hint, value=error.message)
        return
    record_branch(report, env, content.system, content.timeline)  # also after a promotion or a swap by hand
    reaches = bool(chain.links) and chain.end >= content.stop and not chain.trouble and not shipped.refused
    report.prefer(
        "archived WAL",
        reaches,
        hint,
        value="; ".join(shipped.refused) or chain.trouble or f"{chain.text}",
        expected=f"without a gap from {content.stop_lsn}",
    )
    if chain.links:
        report.fact("newest archived WAL", lsn_text(chain.end))


def wal_of(env: Environment) -> Wal | None:
    """The environment's WAL archive, if it has one."""
    return env.wal if env.has("wal") else None


AT_ONCE = Stop(0, inclusive=False, before=None, after=None)


def choose(report: Report, env: Environment, wanted: str, source: Stores) -> list[Backup]:
    """A base backup and the backups that it depends on, all fetched.

    Raises:
        OpsError: there is no such backup.
        RunbookFailed: one of them is damaged.
    """
    chosen = store.choose_backup(report, env, "cluster", wanted, source, failed_too=True)
    return fetch_lineage(report, env, chosen, source)


def fetch_lineage(report: Report, env: Environment, chosen: Backup, source: Stores) -> list[Backup]:
    """A fetched base backup with the fetched backups that it depends on, oldest first.

    Raises:
        RunbookFailed: one of them is damaged.
    """
    whole = lineage(chosen, open_all(store_for(env, "cluster", source), "cluster")[0])
    for backup in whole[:-1]:
        problems = store.read_files(report, backup)
        report.require(
            f"files of {backup.name}",
            not problems,
            f"{OTHER_BACKUPS}: {chosen.name} depends on this one",
            value="; ".join(problems[:3]) or "intact",
            expected="as in the manifest (SHA-256)",
        )
    report.fact("depends on", " ← ".join(backup.name for backup in reversed(whole)))
    report.fail_if_critical()
    return whole


def judge_version(report: Report, env: Environment, backup: Backup) -> None:
    """Whether the installed programs have the backup's major version: a physical copy runs with no other."""
    found, wanted = program_version(env.postgres, "postgres"), cluster_in(backup).major
    report.require(
        "version of PostgreSQL",
        found == wanted,
        f"install PostgreSQL {wanted}'s programs and set their path in [postgres] programs",
        value=found,
        expected=wanted,
    )


def judge_space(report: Report, env: Environment, whole: Sequence[Backup], wal_bytes: int = 0) -> None:
    """Free disk space for the copy next to the live data; several backups are first unpacked, then combined."""
    content = cluster_in(whole[-1])
    needed = content.bytes * (2 if len(whole) > 1 else 1) + wal_bytes
    judge_room(report, env, int(needed * 1.05), 0, "a staged copy next to the live data", absent=True)


def verify_cluster(report: Report, env: Environment, wanted: str, source: Stores) -> Backup:
    """Restore it to a private instance, verify its files as PostgreSQL does, recover it to its own time, and read every
    row and every index of every database.

    Raises:
        RunbookFailed, VerificationFailed: it does not restore.
    """
    whole = choose(report, env, wanted, source)
    chosen = whole[-1]
    judge_version(report, env, chosen)
    judge_space(report, env, whole)
    report.fail_if_critical()
    root = root_for(env.postgres, VERIFYING)
    sweep_instance(root)
    instance = prepare_instance(env.postgres, root)
    try:
        built = build_instance(instance, whole, verify=True, wal=wal_of(env))
        with running(instance, AT_ONCE, cluster_in(chosen).timeline, unsynced=True):
            wait_recovered(instance, cluster_in(chosen).system)
            read = read_whole(instance.postgres)
    except (VerificationFailed, RunbookFailed) as error:  # other errors do not prove that the backup is bad
        mark_failed(report, chosen, str(error))
        raise
    finally:
        put_away(instance)
    report.fact("restored in", duration(built.seconds))
    report.measure("cluster build", cluster_in(chosen).bytes, built.seconds)
    report.table("Read on the private instance", ("database", "tables", "rows"), read.rows)
    report.require(
        "every page could be read",
        not read.problems,
        "take another backup, and check the disk of the live cluster",
        value="; ".join(read.problems[:3]) or f"{len(read.rows)} databases",
    )
    report.fail_if_critical()
    mark_verified(report, chosen)
    judge_wal(report, env, chosen, source)
    return chosen
