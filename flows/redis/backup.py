"""Backups of Redis: from its files, over the network, of its AOF, and of live data before a restore (§2.3)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows import store as stores
from flows.redis.master import judge_master
from runbook import clock
from runbook.errors import Unreachable
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups import publishing
from tasks.backups.catalogue import KEPT, Backup
from tasks.backups.manifest import Manifest, sums_of
from tasks.host.disk import read_disk
from tasks.redis.backup.live_aof import AofCopy, put_rewrites_back, read_aof_bytes, snapshot_aof
from tasks.redis.backup.network import NetworkSnapshot, find_remembering, read_remote_source, snapshot_over_network
from tasks.redis.backup.snapshot import Snapshot, SnapshotSource, read_manifest, read_source, snapshot
from tasks.redis.content.manifest import RedisContent
from tasks.redis.position import POSITION, read_position
from tasks.redis.restore.final_save import has_lost_directory
from tasks.redis.restore.network import find_leftover, still_follows
from tasks.redis.sentinels import read_sentinels, require_master
from tasks.redis.topology.topology import is_own
from tasks.stores.store import Store

Form = Literal["rdb", "aof"]
RESTORE = Next("restore-redis", "complete the restore")


def take(report: Report, env: Environment, store: Store, form: Form) -> Backup:
    """Check the server and the disks, tidy the store, take a backup and publish it.

    Raises:
        RunbookFailed: a check failed; no backup was taken.
        Unreachable, OpsError: the backup failed.
    """
    _restore_rewrites(report, env, form)
    _judge_leftover(report, env)
    stores.tidy(report, env, store)
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=False)
    report.fact("server", block.address)
    source = _source(env, block, store)
    judge_source(report, source, store.spool)
    if form == "aof":
        _judge_aof(report, env, block, source, store)
    report.fail_if_critical()
    backup = _take(report, env, store, form, block, source)
    stores.judge_key(report, backup)
    return backup


def _take(report: Report, env: Environment, store: Store, form: Form, block: Redis, source: SnapshotSource) -> Backup:
    if form == "aof":
        return _take_aof(report, env, block, source, store)
    if _is_here(env, block):
        return take_snapshot(env, block.address, source, store)
    notes: dict[str, object] = {}

    def work(directory: Path) -> tuple[Snapshot, RedisContent]:
        return _over_network(report, env, block, directory, notes)

    return seal(env, store, block.address, work, notes)


def _restore_rewrites(report: Report, env: Environment, form: Form) -> None:
    """Switch on the AOF rewrites that a killed backup left off. If that server is dead, its record stays, and only
    another backup of an AOF is refused."""
    try:
        if done := put_rewrites_back(env.redis, env.reports_directory):
            report.fact("AOF rewrites", done)
    except Unreachable as error:
        report.fail(
            "AOF rewrites left off by a killed backup",
            "start that server; the next backup that reaches it switches them on. If it is lost for good, delete "
            "redis-aof-rewrites.json from the reports" + (". Until then use kind=rdb" if form == "aof" else ""),
            value=error.message,
            expected="on",
            worst=Status.CRITICAL if form == "aof" else Status.WARN,
        )
        report.fail_if_critical()


def _judge_leftover(report: Report, env: Environment) -> None:
    left = find_leftover(env.reports_directory)
    try:
        follows = bool(left and still_follows(env.redis.at(left.server), left))
    except Unreachable as error:
        report.warn(
            "an earlier restore was killed",
            "run restore-redis again when that server answers: it completes the restore",
            value=error.message,
            expected="no incomplete restore",
            follow=[RESTORE],
        )
        return
    if left and follows:
        report.fail(
            "an earlier restore was killed",
            "run restore-redis again: it completes the restore",
            value=f"{left.server} is a replica of a temporary server that no longer exists",
            expected="a master",
            follow=[RESTORE],
        )
        report.fail_if_critical()


def judge_kept(report: Report, env: Environment, block: Redis) -> None:
    """The live data can be kept: checks of the server and free disk space."""
    store = stores.store_for(env, "redis")
    judge_source(report, _source(env, block, store), store.spool)


def keep_live(report: Report, env: Environment, block: Redis) -> Backup:
    """A full, proven backup of the live server before a restore. `latest` never means it, because its data may be
    corrupt.

    Raises:
        Unreachable, OpsError: the backup failed; the live server was not changed.
    """
    store = stores.store_for(env, "redis")
    notes: dict[str, object] = {"kept_by": report.runbook}

    def work(directory: Path) -> tuple[Snapshot, RedisContent]:
        if _is_here(env, block):
            return snapshot(block, read_source(block), directory), read_manifest(env.redis, directory)
        return _over_network(report, env, block, directory, notes)

    kept = seal(env, store, block.address, work, notes, of=KEPT.format(env.name))
    report.fact("live data kept as", kept.name)
    return kept


def _is_here(env: Environment, block: Redis) -> bool:
    """Whether the server can save to files on this host. The Sentinels can name another master than the configured
    one."""
    return not env.redis.remote and is_own(env.redis, block.address) and not has_lost_directory(block)


def _source(env: Environment, block: Redis, store: Store) -> SnapshotSource:
    return read_source(block) if _is_here(env, block) else read_remote_source(block, store.spool)


def _over_network(
    report: Report, env: Environment, block: Redis, directory: Path, notes: dict[str, object]
) -> tuple[NetworkSnapshot, RedisContent]:
    taken = snapshot_over_network(block, directory)
    notes |= {"way": taken.way, "moment": taken.moment}
    report.fact("taken", taken.way)
    if env.redis.sentinels and (remembering := find_remembering(env.redis)):
        report.warn(
            "Sentinels that list the scratch server as a replica",
            f"SENTINEL RESET {env.redis.sentinel_master} on each of them, half a minute apart. The scratch server had "
            "to follow the master, because no replica was healthy",
            value=", ".join(remembering),
            expected="none",
        )
    if not taken.moment:
        report.warn(
            "one moment",
            "permit this user to replicate: ACL SETUSER … +psync +replconf; or pause the clients during a backup",
            value="keys were read one by one: of the writes meanwhile, only some are in the backup",
            expected="all keys from one moment",
        )
    return taken, read_manifest(env.redis, directory)


def _judge_aof(report: Report, env: Environment, block: Redis, source: SnapshotSource, store: Store) -> None:
    here = _is_here(env, block)
    report.require(
        "the AOF's files",
        here,
        "use kind=rdb, which works over the network",
        value=str(source.directory) if here else f"the files of {block.address} are on another host",
        expected="on this host",
    )
    if not here:
        return
    needed, free = read_aof_bytes(block) + 2 * source.dataset_bytes, read_disk(store.spool).free_bytes
    report.require(
        "free space for the AOF",
        free > needed,
        f"free {size(needed - free)} in {store.spool}",
        value=size(free),
        expected=f"more than {size(needed)}",
    )


def _take_aof(report: Report, env: Environment, block: Redis, source: SnapshotSource, store: Store) -> Backup:
    notes: dict[str, object] = {}

    def work(directory: Path) -> tuple[AofCopy, RedisContent]:
        copy = snapshot_aof(env.redis, source, directory, env.reports_directory)
        notes.update(form="aof", aof_parts=copy.parts, aof_bytes=copy.aof_bytes)
        report.fact("AOF", f"{copy.parts} files, {size(copy.aof_bytes)}, and an RDB of their content")
        return copy, copy.content

    return seal(env, store, block.address, work, notes)


# Twice a compressed line in the list of expiring keys.
BYTES_PER_KEY = 64


def judge_source(report: Report, source: SnapshotSource, store: Path) -> None:
    """The server's role and the free disk space before a snapshot."""
    report.prefer(
        "role",
        source.role == "master",
        "back up the master: a replica can lag behind it",
        value=source.role,
        expected="master",
    )
    if source.save_status != "ok":
        report.warn("the previous save", "check the server's log", value=source.save_status, expected="ok")
    needed = source.dataset_bytes + source.keys * BYTES_PER_KEY
    disks = {"the store": (read_disk(store), needed), "the server's directory": (read_disk(source.directory), needed)}
    if len({disk.device for disk, _ in disks.values()}) == 1:
        disks = {"the store": (read_disk(store), 2 * needed)}
    for where, (disk, wanted) in disks.items():
        report.require(
            f"free space in {where}",
            disk.free_bytes > wanted,
            f"free {size(wanted - disk.free_bytes)} in {disk.path}",
            value=size(disk.free_bytes),
            expected=f"more than {size(wanted)}",
        )


def take_snapshot(env: Environment, address: str, source: SnapshotSource, store: Store) -> Backup:
    """Take a snapshot, prove it on a scratch server, and publish the backup with its manifest."""

    def work(directory: Path) -> tuple[Snapshot, RedisContent]:
        return snapshot(env.redis, source, directory), read_manifest(env.redis, directory)

    return seal(env, store, address, work)


def seal(
    env: Environment,
    store: Store,
    address: str,
    work: Callable[[Path], tuple[Snapshot, RedisContent]],
    notes: Mapping[str, object] | None = None,
    *,
    of: str = "",
) -> Backup:
    """Publish the files that `work` creates, with their manifest, as a backup in the store.

    `address`: the server, which must still be the master. `notes`: added to the manifest's content. `of`: another owner
    than the environment, so that `latest` never means this backup.

    Raises:
        OpsError: the Sentinels now name another master, whose writes are not in the backup.
    """
    started = time.monotonic()
    name, directory = publishing.begin(store, "redis", env.name, env.zone)
    taken, content = work(directory)
    require_master(env.redis, address, waived=True)
    position = read_position(env.redis.at(address), taken.taken)
    known = {POSITION: {"id": position.replid, "offset": position.offset}} if position else {}
    sealed = Manifest(
        kind="redis",
        name=name,
        environment=of or env.name,
        taken=taken.taken,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool=content.server_version,
        files=sums_of(directory),
        content=content.model_dump(mode="json") | {"not_copied": list(taken.not_copied), **known, **(notes or {})},
    )
    return publishing.publish(store, directory, sealed)


def report_results(report: Report, backup: Backup) -> None:
    """The backup's content: facts and a table of its databases."""
    manifest = backup.manifest
    content = RedisContent.model_validate(manifest.content)
    report.fact("backup", backup.name)
    report.fact("snapshot", f"{clock.text(manifest.taken)} of {manifest.tool}")
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
