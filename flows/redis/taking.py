"""What backup-redis does below its flow: judge the server and the disks, take, seal, tell (§2.3)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from blocks.environment import Environment
from runbook.render import duration, size
from runbook.report import Report, Status
from tasks import publishing
from tasks.catalogue import Backup
from tasks.host import read_disk
from tasks.manifest import Manifest, sums_of
from tasks.redis.backup.snapshot import Snapshot, Source, read_manifest, snapshot
from tasks.redis.content.manifest import RedisContent
from tasks.redis.sentinels import require_master
from tasks.stores.store import Store

# A line of the sidecar of expiring keys, compressed, is half of this.
BYTES_PER_KEY = 64


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


def take(env: Environment, address: str, source: Source, store: Store) -> Backup:
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


def tell(report: Report, backup: Backup) -> None:
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
