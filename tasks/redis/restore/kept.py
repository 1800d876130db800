"""Data that a restore replaced, before it becomes live again: its keys, and its newest file.

A server with an AOF starts only from that, with 0 keys if it is missing; a server without an AOF starts from its RDB.
The setting can have changed since: the newest file is converted to the form that the server starts from now.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, VerificationFailed
from runbook.files import durable, inside
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.redis.persistence.newest import find_newest
from tasks.redis.restore.copy import own, seed_aof
from tasks.redis.restore.final_save import persistent_keys
from tasks.redis.restore.swap import missing_keys
from tasks.redis.restore.undoing import UNDO
from tasks.redis.scratch import scratch_server
from tasks.redis.server import connected, key_counts
from tasks.redis.settings.file import Configuration, read_configuration


@dataclass(frozen=True)
class KeptRedisData:
    """A directory's `keys`, loaded from its newest file: an AOF, or else the RDB. `persistent`: per database those
    without a TTL. `starts`: the server would start from that file now."""

    directory: Path
    keys: int
    persistent: dict[int, int]
    is_aof: bool
    starts: bool


@probe
def read_kept(block: Redis, directory: Path) -> KeptRedisData:
    """Load it in place, in a scratch server, as the live one would.

    Raises:
        VerificationFailed: it has no data, or cannot be loaded.
    """
    return _load(block, directory)


@action(of=lambda kept: Act(UNDO, str(kept.directory)), idempotent=True)
def prepare_kept(block: Redis, kept: KeptRedisData) -> KeptRedisData:
    """Convert its newest data to the form that the server starts from. Nothing is deleted; an older AOF is renamed.

    Raises:
        OpsError: it cannot be written.
    """
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
def verify_kept(block: Redis, kept: KeptRedisData) -> KeptRedisData:
    """The live server has its keys.

    Raises:
        VerificationFailed: keys are missing that no client deleted.
    """
    with connected(block) as client:
        if short := missing_keys(client, kept.persistent):
            raise VerificationFailed("; ".join(short), "check the log of the service redis")
    return kept


def _load(block: Redis, directory: Path) -> KeptRedisData:
    configuration = read_configuration(Path(block.config_file))
    is_aof = find_newest(configuration, directory).is_aof
    with scratch_server(
        block, directory, appendonly=is_aof, rdb=configuration.rdb, aof=configuration.aof, user=block.os_user
    ) as client:
        keys = sum(keys for keys, _ in key_counts(client).values())
        return KeptRedisData(directory, keys, persistent_keys(client), is_aof, is_aof is configuration.appendonly)


def _seed(block: Redis, configuration: Configuration, directory: Path) -> None:
    """Link it: an AOF's base and an RDB are never changed in place."""
    folder = directory / configuration.aof[0]
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.older_{int(folder.stat().st_mtime)}"))
    seed_aof(configuration, directory, directory / configuration.rdb, inside.link)
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
