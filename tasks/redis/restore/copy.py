"""A staged copy of a backup next to the live data directory, proven by a scratch server that runs on it.

A server with an AOF reads nothing else at its start: with only an RDB it starts with 0 keys. So the RDB always becomes
the AOF's base, with its manifest, and is also saved under `dbfilename` for a server without AOF (recovery-rules,
Redis).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook import shell
from runbook.current import leaves, removed
from runbook.errors import OpsError, VerificationFailed
from runbook.files import durable, inside
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.log import logger
from runbook.units import size
from runbook.wait import until
from tasks.backups.catalogue import Backup
from tasks.redis.backup.snapshot import RDB
from tasks.redis.content.manifest import EXPIRING, RedisComparison, RedisContent, compare, expiring_in
from tasks.redis.content.reading import drop_prefixes, read_content
from tasks.redis.scratch import refuse_empty, scratch_server
from tasks.redis.scratch_place import scratch_place
from tasks.redis.server import call, holders, key_counts, live_directory, loaded_keys
from tasks.redis.settings.file import Configuration, read_configuration
from tasks.stores.directory import told

ACT = "replace Redis data"
BESIDE = ".restoring"
MODE = 0o750
LEFTOVER_SECONDS = 15.0


@dataclass(frozen=True)
class RedisCopy:
    """A staged copy. `keys` and `persistent` (without any TTL): per database, without the `dropped` ones (by prefix). A
    server that starts on it loads `base_keys` from the AOF's base or `rdb_keys` from the RDB, minus up to
    `may_vanish`."""

    directory: Path
    comparison: RedisComparison
    dropped: dict[str, int]
    keys: dict[int, int]
    persistent: dict[int, int]
    base_keys: int
    rdb_keys: int
    may_vanish: int
    appendonly: bool
    seconds: float


@action(of=lambda block: Act(ACT, block.data_directory), staged=True)
def build_redis_copy(block: Redis, backup: Backup) -> RedisCopy:
    """Build `<data directory>.restoring` from a backup, prove it, and leave out the keys of `drop_prefixes`.

    A copy that differs from the manifest is returned with its differences, and `swap_redis` refuses it.

    Raises:
        VerificationFailed: the server cannot load the backup, or it cannot be compared.
        OpsError: the disk is full, or a write failed. The copy is then deleted.
    """
    live = live_directory(block)
    directory = live.with_name(live.name + BESIDE)
    _remove_leftover(block, directory)
    leaves(f"directory {directory}", "the next restore of Redis deletes it")
    try:
        with told(directory):
            return _build(block, backup, live, directory)
    except OpsError:
        shutil.rmtree(directory, ignore_errors=True)
        removed(f"directory {directory}")
        raise


def _build(block: Redis, backup: Backup, live: Path, directory: Path) -> RedisCopy:
    started = time.monotonic()
    configuration = read_configuration(Path(block.config_file))
    _seed(block, configuration, backup, live, directory)
    expected = RedisContent.model_validate(backup.manifest.content)
    with (
        scratch_server(
            block, directory, appendonly=True, rdb=configuration.rdb, aof=configuration.aof, user=block.os_user
        ) as client,
        scratch_place() as place,
    ):
        base_keys = loaded_keys(client)
        sidecar = place / EXPIRING
        actual = read_content(client, sidecar)
        comparison = compare(expected, expiring_in(backup.path), actual, sidecar)
        fading = {n: keys - ttl - _persistent(actual, n) for n, (keys, ttl) in key_counts(client).items()}
        dropped, counts = _finish(client, block, configuration) if comparison.is_equal else ({}, {})
    _check_files(configuration, backup, directory)
    own(block, directory)
    durable.sync_tree(directory)
    return RedisCopy(
        directory,
        comparison,
        dropped,
        keys={number: keys for number, (keys, _) in counts.items()},
        persistent={number: keys - ttl - fading[number] for number, (keys, ttl) in counts.items()},
        base_keys=base_keys,
        rdb_keys=sum(keys for keys, _ in counts.values()),
        may_vanish=actual.may_vanish,
        appendonly=configuration.appendonly,
        seconds=time.monotonic() - started,
    )


def _persistent(content: RedisContent, number: int) -> int:
    """The keys without hashes whose every field has a TTL: they expire with their last field."""
    return content.databases[number].persistent_keys if number in content.databases else 0


def _remove_leftover(block: Redis, directory: Path) -> None:
    """Delete a killed run's copy, once its scratch server has stopped."""
    if directory.exists():
        until(
            lambda: not holders(block, directory),
            what=f"the end of the server on {directory}",
            seconds=LEFTOVER_SECONDS,
            hint="stop it by hand: it belongs to a killed restore",
        )
        logger().info("deleting %s of a killed restore", directory)
        shutil.rmtree(directory)


def _seed(block: Redis, configuration: Configuration, backup: Backup, live: Path, directory: Path) -> None:
    """Place the RDB as the AOF's base (https://valkey.io/topics/persistence/), and an ACL file of the data
    directory."""
    refuse_empty(backup.path / RDB)
    live.parent.mkdir(parents=True, exist_ok=True)
    inside.make_directory(directory, MODE)
    seed_aof(configuration, directory, backup.path / RDB, inside.copy)
    if acl := configuration.get("aclfile"):
        source = Path(os.path.normpath(live / acl))  # the account can write `..` into its configuration
        if source.is_relative_to(live) and source.is_file():
            target = directory / source.relative_to(live)
            inside.make_directories(target.parent)
            inside.copy(source, target)
    own(block, directory)


def seed_aof(configuration: Configuration, directory: Path, rdb: Path, bring: Callable[[Path, Path], object]) -> None:
    """Create an AOF whose base is that RDB; `bring` copies or links it.

    Raises:
        OSError: it cannot be written.
    """
    folder, stem = configuration.aof
    aof, base = directory / folder, f"{stem}.1.base.rdb"
    inside.make_directory(aof, MODE)
    bring(rdb, aof / base)
    named = f'"{base}"' if " " in base else base
    inside.write(aof / f"{stem}.manifest", f"file {named} seq 1 type b\n".encode(), 0o644)


def _finish(
    client: redis.Redis, block: Redis, configuration: Configuration
) -> tuple[dict[str, int], dict[int, tuple[int, int]]]:
    """Delete the keys of drop_prefixes, and save the RDB; the AOF logs the deletion. Nothing expires meanwhile, so the
    counts are those of the file."""
    dropped = drop_prefixes(client, block.drop_prefixes)
    _refuse_eviction(client, configuration)
    call(client, "DEBUG", "SET-ACTIVE-EXPIRE", "0")
    counts = key_counts(client)
    try:
        client.save()
    except redis.RedisError as error:
        raise VerificationFailed(f"the copy cannot be saved: {error}", "check the free disk space") from None
    return dropped, counts


def _refuse_eviction(client: redis.Redis, configuration: Configuration) -> None:
    """A server that starts with more than `maxmemory` evicts keys at the first command."""
    info = client.info("memory")
    counted = int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0))
    if configuration.evicts and counted > configuration.maxmemory:
        raise VerificationFailed(
            f"the copy needs {size(counted)}, and maxmemory is {size(configuration.maxmemory)}: keys would be evicted",
            f"raise maxmemory in {configuration.files[0]}; the live data is untouched",
        )


def _check_files(configuration: Configuration, backup: Backup, directory: Path) -> None:
    folder, stem = configuration.aof
    base = directory / folder / f"{stem}.1.base.rdb"
    manifest = directory / folder / f"{stem}.manifest"
    if not base.exists() or base.stat().st_size != (backup.path / RDB).stat().st_size or not manifest.exists():
        raise VerificationFailed("the copy's AOF differs from its content", "run it again; check the file system")


def own(block: Redis, directory: Path) -> None:
    """Change a directory's owner to the server's user, if this process is root."""
    if os.geteuid() != 0:
        return
    inside.give(directory, shell.owner_of(block.os_user))
