"""Proof that a backup of Redis loads and equals its manifest, without the live server."""

from __future__ import annotations

from pydantic import ValidationError

from blocks.redis.server import Redis
from runbook.errors import OTHER_BACKUPS, VerificationFailed
from runbook.kinds import probe
from tasks.backups.catalogue import Backup
from tasks.redis.backup.snapshot import RDB
from tasks.redis.content.manifest import EXPIRING, RedisComparison, RedisContent, compare, expiring_in
from tasks.redis.content.reading import read_content
from tasks.redis.scratch import refuse_empty, scratch_server
from tasks.redis.scratch_place import scratch_place


@probe
def prove_backup(block: Redis, backup: Backup) -> RedisComparison:
    """Load a fetched backup's RDB into a scratch server, read all of it, and compare it with the manifest.

    Raises:
        VerificationFailed: the manifest is not of Redis, or the server program cannot load the RDB (with its reason: a
            newer version, too little memory).
    """
    try:
        expected = RedisContent.model_validate(backup.manifest.content)
    except ValidationError:
        raise VerificationFailed(f"{backup.name} has no readable content manifest", OTHER_BACKUPS) from None
    refuse_empty(backup.path / RDB)
    with scratch_server(block, backup.path, rdb=RDB) as client, scratch_place() as place:
        sidecar = place / EXPIRING
        actual = read_content(client, sidecar)
        return compare(expected, expiring_in(backup.path), actual, sidecar)
