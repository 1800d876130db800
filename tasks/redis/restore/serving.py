"""A master that serves its data during a full restore: did its last start lose data, does it still run (§8.2)?"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from tasks.backups.catalogue import Backup
from tasks.redis.backup.snapshot import RDB
from tasks.redis.failover.group import quick
from tasks.redis.restore.survivors import LEAST_RATIO, SurvivingCopy
from tasks.redis.scratch import scratch_server
from tasks.redis.server import call, key_counts

SAMPLED_KEYS = 1_000


@probe
def find_lost_keys(block: Redis, copy: SurvivingCopy, backup: Backup) -> str:
    """Whether a server that has started since the backup, or ran FLUSHALL, lost its data then, as a sentence; "": it
    did not.

    Clients fill an empty server again: a count of keys does not show that. So keys of the backup, from a scratch
    server, are searched for on the live one. Keys that have expired do not count.
    """
    has_restarted = copy.started is not None and copy.started > backup.manifest.taken
    if not has_restarted and not copy.flushes:
        return ""
    since = f"FLUSHALL or FLUSHDB ran {copy.flushes} times since its start"
    if has_restarted:
        since = "it has restarted since the backup"
    try:
        with scratch_server(block, backup.path, rdb=RDB) as scratch, quick(block.at(copy.where)) as live:
            for number in key_counts(scratch):
                keys = list(_sample(scratch, number, block.drop_prefixes))
                found = sum(_exist(live, number, keys))
                if found < len(keys) * LEAST_RATIO:
                    return f"{since}, and has {found:,} of {len(keys):,} sampled keys of the backup, database {number}"
    except OpsError as error:
        return f"{since}, and could not be compared with it: {error.message}"
    return ""


def _sample(client: redis.Redis, number: int, dropped: Collection[str]) -> Iterator[bytes]:
    """Keys of a database, in the order of the server's hash table. Those that a restore drops do not count."""
    call(client, "SELECT", number)
    prefixes = tuple(prefix.encode() for prefix in dropped)
    keys = (cast(bytes, key) for key in client.scan_iter(count=1_000))
    return itertools.islice((key for key in keys if not prefixes or not key.startswith(prefixes)), SAMPLED_KEYS)


def _exist(client: redis.Redis, number: int, keys: list[bytes]) -> list[int]:
    pipe = client.pipeline(transaction=False)
    call(pipe, "SELECT", number)
    for key in keys:
        pipe.exists(key)
    return cast(list[int], pipe.execute()[1:])


@probe
def find_change(block: Redis, copy: SurvivingCopy) -> str:
    """Whether the master that was kept is not the same process any more, as a sentence; "": it serves as before."""
    try:
        with quick(block.at(copy.where)) as client:
            info = client.info("server")
            keys = sum(counts[0] for counts in key_counts(client).values())
    except (Unreachable, OpsError) as error:
        return error.message
    restarted = info["run_id"] != copy.run_id
    return f"it restarted during this run, and serves {keys:,} keys" if restarted else ""
