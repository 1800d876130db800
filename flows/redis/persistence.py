"""Backup and restore of Redis (§2.3): a proven snapshot, and its way back beside the live data."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from prefect import flow

from blocks.environment import Environment, Stores
from flows import store as stores
from flows.redis.steps import build_redis, judge_redis, plan_redis, replace_redis, undo
from runbook.permit import Act
from runbook.render import duration, size
from runbook.report import Report, Status
from runbook.run import runbook
from tasks import catalogue, publishing
from tasks.catalogue import Backup
from tasks.host import read_disk
from tasks.manifest import Manifest, sums_of
from tasks.redis.content import RedisContent
from tasks.redis.copy import ACT
from tasks.redis.snapshot import Snapshot, Source, read_manifest, read_source, snapshot
from tasks.stores.store import Store

# A line of the sidecar of expiring keys, compressed, is half of this.
BYTES_PER_KEY = 64


@flow(name="backup-redis")
def backup_redis(environment: str) -> Report:
    """Redisのバックアップ (§2.3)

    Takes a snapshot of every database (BGSAVE, proven to be done), loads it into a scratch server and reads its content
    there into a manifest, so that a restore can be proven equal. Run it daily, and before every change.

    It changes nothing in Redis; there is nothing to undo. A backup that was killed is never offered for a restore, and
    the next run removes what it left. Evidence: the manifest beside the RDB, and the table of what each database holds.

    Departs from the manual: no copy of the AOF (it is in parts since Redis 7, and the RDB is seeded as its base at a
    restore); the copy begins only when the save is proven to have ended; configuration and ACL files come along,
    without their secrets.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Backup Redis", env, changes=True) as report:
        store = stores.store_for(env, "redis")
        source = read_source(env.redis)
        judge_source(report, source, store.spool)
        report.fail_if_critical()
        stores.tidy(report, env, store)
        backup = _take(env, source, store)
        _tell(report, backup)
        stores.note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
    return report


def judge_source(report: Report, source: Source, store: Path) -> None:
    """What must hold of a server, and of the disks, before a snapshot is taken."""
    report.expect(
        "role",
        source.role == "master",
        "back up the master: a replica may lag behind it",
        value=source.role,
        expected="master",
        otherwise=Status.WARN,
    )
    if source.save_status != "ok":
        report.warn("the save before this one", "look at the server's log", value=source.save_status, expected="ok")
    needed = source.dataset_bytes + source.keys * BYTES_PER_KEY
    disks = {"the store": (read_disk(store), needed), "the server's directory": (read_disk(source.directory), needed)}
    if len({disk.device for disk, _ in disks.values()}) == 1:
        disks = {"the store": (read_disk(store), 2 * needed)}
    for where, (disk, wanted) in disks.items():
        report.expect(
            f"free space in {where}",
            disk.free_bytes > wanted,
            f"free {size(wanted - disk.free_bytes)} at {disk.path}",
            value=size(disk.free_bytes),
            expected=f"more than {size(wanted)}",
        )


def _take(env: Environment, source: Source, store: Store) -> Backup:
    started = time.monotonic()
    name, directory = publishing.begin(store, "redis", env.name, env.zone)
    taken = snapshot(env.redis, source, directory)
    content = read_manifest(env.redis, directory)
    sealed = _manifest(env, name, directory, taken, content, time.monotonic() - started)
    return publishing.publish(store, directory, sealed)


def _manifest(
    env: Environment, name: str, directory: Path, taken: Snapshot, content: RedisContent, seconds: float
) -> Manifest:
    return Manifest(
        kind="redis",
        name=name,
        environment=env.name,
        taken=taken.taken,
        seconds=seconds,
        host=socket.gethostname(),
        tool=content.server_version,
        files=sums_of(directory),
        content=content.model_dump(mode="json") | {"not_copied": list(taken.not_copied)},
    )


def _tell(report: Report, backup: Backup) -> None:
    manifest = backup.manifest
    content = RedisContent.model_validate(manifest.content)
    report.fact("backup", backup.name)
    report.fact("snapshot", f"{manifest.taken:%Y-%m-%d %H:%M:%S UTC} of {manifest.tool}")
    report.fact("size", size(manifest.bytes))
    report.fact("keys", f"{content.all_keys:,} in {len(content.databases)} databases")
    report.fact("snapshot and manifest", duration(manifest.seconds))
    report.table(
        "Content",
        ("database", "keys", "without TTL", "with TTL", "biggest prefixes"),
        [
            (
                f"db {number}",
                f"{found.all_keys:,}",
                f"{found.persistent_keys:,}",
                f"{found.expiring_keys:,}",
                ", ".join(f"{prefix or '(none)'} {count:,}" for prefix, count in list(found.prefixes.items())[:5]),
            )
            for number, found in content.databases.items()
        ],
    )
    for sentence in manifest.content["not_copied"]:
        report.warn("a configuration file is not in the backup", sentence)


@flow(name="restore-redis")
def restore_redis(environment: str, backup: str = "latest", source: Stores = "backups", confirm: str = "") -> Report:
    """Redisのリストア (§2.3)

    Puts a backup's data in the place of the live data. Run it when Redis has lost or spoilt its data; the server may be
    down, and its data directory may be gone.

    What it changes: a copy is built beside the data directory and proven on a scratch server against the backup's
    manifest; only then the service is stopped, the two directories are swapped by rename, and the service is started
    and verified. With an empty confirm it shows the plan and changes nothing. What was written after the backup's
    snapshot is lost; keys of drop_prefixes (cache:) are left out, as they are made anew.

    Undo: the old data is kept as <data directory>.superseded_<time>; the report says the commands. Evidence: the table
    of keys expected and found in each database, and how many keys the live server loaded.

    Departs from the manual: nothing is copied over the live files (an old AOF would win over the RDB, and without one
    the server would start with 0 keys): the RDB becomes the AOF's base, whether the AOF is on or off.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        backup: latest、日付 YYYYMMDD、またはバックアップ名 (dump_YYYYMMDD_HHMMSS)
        source: 保管先。copies は複製先
        confirm: 実行するには環境名を入力。空なら計画のみ表示
    """
    env = Environment.find(environment)
    with runbook("Restore Redis", env, confirm, changes=True, rank="recovery") as report:
        found = catalogue.find_backup(stores.store_for(env, "redis", source), "redis", backup, env.name)
        report.fact("backup", found.name)
        stores.judge_origin(report, env, found, backup)
        report.fact("lost", f"every write after {found.manifest.taken:%Y-%m-%d %H:%M:%S UTC}")
        fitness = judge_redis(report, env, found, stores.read_files(report, found))
        report.fail_if_critical()
        if fitness:
            plan_redis(report, env, found, fitness)
        permit = report.permit(Act(ACT, env.redis.data_directory))
        report.state_is("the live data was not touched", "launch it again when what is said above is put right")
        copy = build_redis(report, env, permit, found)
        swapped = replace_redis(report, env, permit, copy)
        report.fact("undo", undo(env, swapped))
        report.fail_if_critical()
        stores.mark_verified(report, found)
    return report
