"""SENTINEL FAILOVER, and whether a Sentinel can use the master's own FAILOVER (§8.3).

https://valkey.io/commands/sentinel-failover/
"""

from __future__ import annotations

import contextlib
import re
from typing import Literal

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from tasks.redis.server import at_once, call, family, version_of

How = Literal["coordinated", "forced", "under way"]
COORDINATED_SINCE = 9
_UNCOORDINATED = re.compile(r"wrong number of arguments|NOGOODPRIMARY|Unknown failover option|syntax", re.IGNORECASE)


def coordinates(block: Redis, address: str, version: str) -> bool:
    """Whether this Sentinel can use FAILOVER of a master of this version: both must be Valkey 9 or later. False if it
    does not answer.
    """
    try:
        with contextlib.closing(at_once(block.sentinel(address))) as client:
            return _hands_over(version_of(client)) and _hands_over(version)
    except redis.RedisError:
        return False


def _hands_over(version: str) -> bool:
    major = version.partition(" ")[2].partition(".")[0]
    return family(version) == "valkey" and major.isdecimal() and int(major) >= COORDINATED_SINCE


def begin_failover(block: Redis, address: str, *, coordinated: bool) -> How:
    """SENTINEL FAILOVER at one Sentinel; returns how it started. If one is already in progress there, no second one
    starts.

    Raises:
        OpsError: it refuses (it would promote no replica).
        Unreachable: it does not answer, and may have started one.
    """
    words = ("SENTINEL", "FAILOVER", block.sentinel_master)
    try:
        with contextlib.closing(at_once(block.sentinel(address))) as client:
            if coordinated:
                try:
                    call(client, *words, "COORDINATED")
                    return "coordinated"
                except redis.ResponseError as error:
                    if not _UNCOORDINATED.search(str(error)):
                        raise
            call(client, *words)
            return "forced"
    except redis.ResponseError as error:
        if "INPROG" in str(error):
            return "under way"
        raise OpsError(f"the Sentinel {address} refuses: {error}", "check the replicas in the report") from None
    except redis.RedisError as error:
        raise Unreachable(
            f"the Sentinel {address} did not answer: {error}", "run it again: it reports the master"
        ) from None
