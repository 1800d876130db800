"""Data that a restore set aside, before it is live again: what it holds, and in which of its files.

A server with an AOF starts from that alone, with 0 keys where there is none, and one without it from its RDB. The
setting may have been changed since: the newest file is brought into the form from which the server starts now.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, VerificationFailed
from runbook.files import durable
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from tasks.redis.backup.aof import read_parts
from tasks.redis.backup.rdb import read_rdb
from tasks.redis.restore.copy import own, seed_aof
from tasks.redis.restore.swap import missing_keys
from tasks.redis.restore.undoing import UNDO
from tasks.redis.scratch import scratch_server
from tasks.redis.server import connected, key_counts
from tasks.redis.settings.file import Configuration, read_configuration


@dataclass(frozen=True)
class Kept:
    """A directory's `keys`, loaded from its newest data: an AOF, or else the RDB. `persistent` are those per database
    that nothing but a client removes; `starts` says whether the server would start from that file now."""

    directory: Path
    keys: int
    persistent: dict[int, int]
    is_aof: bool
    starts: bool


@probe
def read_kept(block: Redis, directory: Path) -> Kept:
    """Load it where it lies, in a scratch server, as the live one would.

    Raises:
        VerificationFailed: it holds no data, or what cannot be loaded.
    """
    return _load(block, directory)


@action(idempotent=True)
def prepare_kept(permit: Permit, block: Redis, kept: Kept) -> Kept:
    """Bring its newest data into the form from which the server starts. Nothing in it is removed: an older AOF is
    renamed.

    Raises:
        NotConfirmed: the permit does not cover that directory.
        OpsError: it cannot be written.
    """
    permit.require(UNDO, str(kept.directory))
    if kept.starts:
        return kept
    configuration = read_configuration(Path(block.config_file))
    try:
        if kept.is_aof:
            _save(block, configuration, kept.directory)
        else:
            _seed(block, configuration, kept.directory)
    except OSError as error:
        raise OpsError(
            f"{kept.directory} cannot be written: {error.strerror}", "check its permissions and the free disk space"
        ) from None
    return _load(block, kept.directory)


@probe
def verify_kept(block: Redis, kept: Kept) -> Kept:
    """The live server serves it.

    Raises:
        VerificationFailed: keys are missing that no client removed.
    """
    with connected(block) as client:
        if short := missing_keys(client, kept.persistent):
            raise VerificationFailed("; ".join(short), "check the log of the service redis")
    return kept


def _load(block: Redis, directory: Path) -> Kept:
    configuration = read_configuration(Path(block.config_file))
    is_aof = _is_aof(configuration, directory)
    with scratch_server(
        block, directory, appendonly=is_aof, rdb=configuration.rdb, aof=configuration.aof, user=block.os_user
    ) as client:
        keys = sum(keys for keys, _ in key_counts(client).values())
        return Kept(directory, keys, _persistent(client), is_aof, is_aof is configuration.appendonly)


def _is_aof(configuration: Configuration, directory: Path) -> bool:
    """Whether the AOF is the newest data: an RDB that was begun after the AOF's last write holds all that it does."""
    folder, stem = configuration.aof
    manifest, rdb = directory / folder / f"{stem}.manifest", directory / configuration.rdb
    has_rdb = rdb.is_file() and rdb.stat().st_size > 0
    if not manifest.is_file():
        if not has_rdb:
            raise VerificationFailed(f"{directory.name} has no data", "name another with `kept`, or restore a backup")
        return False
    if not has_rdb:
        return True
    begun, appended = read_rdb(rdb).written, read_parts(manifest).written
    if begun <= appended < begun + timedelta(seconds=1):  # an RDB tells whole seconds only of its beginning
        return configuration.appendonly or rdb.stat().st_mtime < appended.timestamp()
    return begun < appended


def _seed(block: Redis, configuration: Configuration, directory: Path) -> None:
    """No copy: neither an AOF's base nor an RDB is ever changed in its place."""
    folder = directory / configuration.aof[0]
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.older_{int(folder.stat().st_mtime)}"))
    seed_aof(configuration, directory, directory / configuration.rdb, os.link)
    own(block, folder)
    durable.sync_tree(folder)


def _save(block: Redis, configuration: Configuration, directory: Path) -> None:
    with scratch_server(
        block, directory, appendonly=True, rdb=configuration.rdb, aof=configuration.aof, user=block.os_user
    ) as client:
        try:
            client.save()
        except redis.RedisError as error:
            raise VerificationFailed(
                f"{directory.name} cannot be saved: {error}", "check the free disk space"
            ) from None


def _persistent(client: redis.Redis) -> dict[int, int]:
    """Without hashes with fields that have a TTL: such a hash goes with its last field. Valkey and Redis name them
    differently (https://valkey.io/commands/info/)."""
    return {
        int(name.removeprefix("db")): int(found["keys"])
        - int(found["expires"])
        - int(found.get("keys_with_volatile_items", found.get("subexpiry", 0)))
        for name, found in client.info("keyspace").items()
    }
