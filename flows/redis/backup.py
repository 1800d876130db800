"""Taking backups of Redis (§2.3): by files, over the network, of its AOF; and of live data that a restore changes."""

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
from runbook.errors import Unreachable
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups import publishing
from tasks.backups.catalogue import KEPT, Backup
from tasks.backups.manifest import Manifest, sums_of
from tasks.host.disk import read_disk
from tasks.redis.backup.live_aof import AofCopy, put_rewrites_back, read_aof_bytes, snapshot_aof
from tasks.redis.backup.network import NetworkSnapshot, find_remembering, read_remote_source, snapshot_over_network
from tasks.redis.backup.snapshot import Snapshot, Source, read_manifest, read_source, snapshot
from tasks.redis.content.manifest import RedisContent
from tasks.redis.restore.network import find_leftover, still_follows
from tasks.redis.sentinels import read_sentinels, require_master
from tasks.redis.topology.topology import is_own
from tasks.stores.store import Store

Form = Literal["rdb", "aof"]


def take(report: Report, env: Environment, store: Store, form: Form) -> Backup:
    """Judge the server and the disks, tidy the store, take a backup and publish it.

    Raises:
        RunbookFailed: what must hold does not; nothing was taken.
        Unreachable, OpsError: it cannot be taken.
    """
    _put_rewrites_back(report, env, form)
    _judge_leftover(report, env)
    stores.tidy(report, env, store)
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=False)
    report.fact("server", block.address)
    source = _source(env, block, store)
    judge_source(report, source, store.spool)
    if form == "aof":
        _judge_aof(report, env, block, source, store)
    report.fail_if_critical()
    backup = _taken(report, env, store, form, block, source)
    stores.judge_key(report, backup)
    return backup


def _taken(report: Report, env: Environment, store: Store, form: Form, block: Redis, source: Source) -> Backup:
    if form == "aof":
        return _take_aof(report, env, block, source, store)
    if _is_here(env, block):
        return take_snapshot(env, block.address, source, store)
    more: dict[str, object] = {}

    def work(directory: Path) -> tuple[Snapshot, RedisContent]:
        return _over_network(report, env, block, directory, more)

    return seal(env, store, block.address, work, more)


def _put_rewrites_back(report: Report, env: Environment, form: Form) -> None:
    """A server that died is no reason to take no backup of the one that took its place; but its record stays, and
    another backup of an AOF would need it."""
    try:
        if done := put_rewrites_back(env.redis, env.reports_directory):
            report.fact("put back", done)
    except Unreachable as error:
        report.fail(
            "the AOF's rewrites, which a killed backup left off",
            "nothing, if it is gone for good (then remove redis-aof-rewrites.json from the reports); else it is put "
            "right by the next backup that reaches it" + (": take this one with kind=rdb" if form == "aof" else ""),
            value=error.message,
            expected="put back",
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
            "launch restore-redis again when that server is back: it puts that right",
            value=error.message,
            expected="nothing left",
        )
        return
    if left and follows:
        report.fail(
            "an earlier restore was killed",
            "launch restore-redis again: it puts that right",
            value=f"{left.server} is a replica of a temporary server that is gone",
            expected="a master",
        )
        report.fail_if_critical()


def judge_kept(report: Report, env: Environment, block: Redis) -> None:
    """Whether there is room to keep what is live."""
    store = stores.store_for(env, "redis")
    judge_source(report, _source(env, block, store), store.spool)


def keep_live(report: Report, env: Environment, block: Redis) -> Backup:
    """A whole backup of the live server, proven like every other, and not one that `latest` means: it is of data that
    somebody found wrong.

    Raises:
        Unreachable, OpsError: it cannot be taken; nothing live was changed.
    """
    store = stores.store_for(env, "redis")
    more: dict[str, object] = {"kept_by": report.runbook}

    def work(directory: Path) -> tuple[Snapshot, RedisContent]:
        if _is_here(env, block):
            return snapshot(block, read_source(block), directory), read_manifest(env.redis, directory)
        return _over_network(report, env, block, directory, more)

    kept = seal(env, store, block.address, work, more, of=KEPT.format(env.name))
    report.fact("live data kept as", kept.name)
    return kept


def _is_here(env: Environment, block: Redis) -> bool:
    """Whether the server's files are on this host: a master that Sentinels name may be another than the configured."""
    return not env.redis.remote and is_own(env.redis, block.address)


def _source(env: Environment, block: Redis, store: Store) -> Source:
    return read_source(block) if _is_here(env, block) else read_remote_source(block, store.spool)


def _over_network(
    report: Report, env: Environment, block: Redis, directory: Path, more: dict[str, object]
) -> tuple[NetworkSnapshot, RedisContent]:
    taken = snapshot_over_network(block, directory)
    more |= {"way": taken.way, "moment": taken.moment}
    report.fact("taken", taken.way)
    if env.redis.sentinels and (remembering := find_remembering(env.redis)):
        report.warn(
            "Sentinels that took the copy for a replica",
            f"SENTINEL RESET {env.redis.sentinel_master} on each of them, half a minute apart: no replica was fit to "
            "be followed instead of the master",
            value=", ".join(remembering),
            expected="none",
        )
    if not taken.moment:
        report.warn(
            "one moment",
            "let this user replicate: ACL SETUSER … +psync +replconf; where nobody may, pause the clients meanwhile",
            value="its keys were read one by one: what clients wrote meanwhile is in it or not, key by key",
            expected="of one moment",
        )
    return taken, read_manifest(env.redis, directory)


def _judge_aof(report: Report, env: Environment, block: Redis, source: Source, store: Store) -> None:
    here = _is_here(env, block)
    report.require(
        "the AOF's files",
        here,
        "take it with kind=rdb: that goes over the network",
        value=str(source.directory) if here else f"those of {block.address} cannot be reached from here",
        expected="on this host",
    )
    if not here:
        return
    needed, free = read_aof_bytes(block) + 2 * source.dataset_bytes, read_disk(store.spool).free_bytes
    report.require(
        "free space for the AOF",
        free > needed,
        f"free {size(needed - free)} at {store.spool}",
        value=size(free),
        expected=f"more than {size(needed)}",
    )


def _take_aof(report: Report, env: Environment, block: Redis, source: Source, store: Store) -> Backup:
    more: dict[str, object] = {}

    def work(directory: Path) -> tuple[AofCopy, RedisContent]:
        copy = snapshot_aof(env.redis, source, directory, env.reports_directory)
        more.update(form="aof", aof_parts=copy.parts, aof_bytes=copy.aof_bytes)
        report.fact("AOF", f"{copy.parts} files, {size(copy.aof_bytes)}, and the RDB of what they hold")
        return copy, copy.content

    return seal(env, store, block.address, work, more)


# A line of the sidecar of expiring keys, compressed, is half of this.
BYTES_PER_KEY = 64


def judge_source(report: Report, source: Source, store: Path) -> None:
    """What must hold of a server, and of the disks, before a snapshot is taken."""
    report.prefer(
        "role",
        source.role == "master",
        "back up the master: a replica may lag behind it",
        value=source.role,
        expected="master",
    )
    if source.save_status != "ok":
        report.warn("the save before this one", "look at the server's log", value=source.save_status, expected="ok")
    needed = source.dataset_bytes + source.keys * BYTES_PER_KEY
    disks = {"the store": (read_disk(store), needed), "the server's directory": (read_disk(source.directory), needed)}
    if len({disk.device for disk, _ in disks.values()}) == 1:
        disks = {"the store": (read_disk(store), 2 * needed)}
    for where, (disk, wanted) in disks.items():
        report.require(
            f"free space in {where}",
            disk.free_bytes > wanted,
            f"free {size(wanted - disk.free_bytes)} at {disk.path}",
            value=size(disk.free_bytes),
            expected=f"more than {size(wanted)}",
        )


def take_snapshot(env: Environment, address: str, source: Source, store: Store) -> Backup:
    """Snapshot, proof on a scratch server, manifest, and the backup in its store."""

    def work(directory: Path) -> tuple[Snapshot, RedisContent]:
        return snapshot(env.redis, source, directory), read_manifest(env.redis, directory)

    return seal(env, store, address, work)


def seal(
    env: Environment,
    store: Store,
    address: str,
    work: Callable[[Path], tuple[Snapshot, RedisContent]],
    more: Mapping[str, object] | None = None,
    *,
    of: str = "",
) -> Backup:
    """What `work` puts into a directory, with its manifest, as a backup in the store: of the server at `address`, if
    that is still the master then. `more` goes into the manifest's content. `of` is whose backup it is called, where
    that is not the environment's own: `latest` never means it.

    Raises:
        OpsError: the Sentinels name another master by now: what was written there meanwhile is not in it.
    """
    started = time.monotonic()
    name, directory = publishing.begin(store, "redis", env.name, env.zone)
    taken, content = work(directory)
    require_master(env.redis, address, waived=True)
    sealed = Manifest(
        kind="redis",
        name=name,
        environment=of or env.name,
        taken=taken.taken,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool=content.server_version,
        files=sums_of(directory),
        content=content.model_dump(mode="json") | {"not_copied": list(taken.not_copied), **(more or {})},
    )
    return publishing.publish(store, directory, sealed)


def report_results(report: Report, backup: Backup) -> None:
    """What the backup holds, as facts and a table of its databases."""
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
