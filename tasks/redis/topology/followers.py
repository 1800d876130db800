"""The replicas of a restored master: none can be promoted before it is in sync (§2.3, §8.3).

https://valkey.io/topics/sentinel/ (replica selection and priority) and https://valkey.io/topics/replication/
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from dataclasses import replace

import redis
from pydantic import SecretStr

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.redis.server import connected, setting
from tasks.redis.topology.topology import ReplicationTopology

PRIORITY, NEVER = "replica-priority", "0"
"""Sentinels do not promote a replica with this priority."""
SYNC_SECONDS = 1800.0
LINK_SECONDS = 30.0


def note_priorities(around: ReplicationTopology, servers: Mapping[str, Redis]) -> ReplicationTopology:
    """Add the priorities of these servers, as they were before the first run that set them to 0. One that does not
    answer has none."""
    found = dict(around.priorities)
    for address, server in servers.items():
        if address not in found:
            with contextlib.suppress(OpsError), connected(server) as client:
                found[address] = setting(client, PRIORITY)
    return replace(around, priorities=found)


def settle(servers: Mapping[str, Redis], lead: Redis, priorities: Mapping[str, str]) -> dict[str, str]:
    """Wait until these replicas are in sync, and let the Sentinels promote each from then on. Returns why others are
    not in sync: one without a link is given LINK_SECONDS, one that receives data SYNC_SECONDS."""
    left = {address: _Follower(server, lead, priorities.get(address, "")) for address, server in servers.items()}
    problems = dict[str, str]()

    def settled() -> bool:
        for address, follower in [*left.items()]:
            if follower.is_ready() or follower.problem:
                del left[address]
            if follower.problem:
                problems[address] = follower.problem
        return not left

    with contextlib.suppress(Unreachable):
        until(settled, what="the replicas in sync", seconds=SYNC_SECONDS)
    return problems | dict.fromkeys(left, f"it is not in sync after {SYNC_SECONDS:.0f} s")


class _Follower:
    """A replica on its way to be in sync. `problem`: why it is given up."""

    def __init__(self, server: Redis, lead: Redis, priority: str) -> None:
        self.problem = ""
        self._server, self._lead, self._priority = server, lead, priority
        self._fed = time.monotonic()

    def is_ready(self) -> bool:
        """Whether it is in sync, and has its priority again."""
        try:
            return self._look()
        except OpsError as error:
            self._wait(error.message)
        return False

    def _look(self) -> bool:
        with connected(self._lead) as client:
            sent = client.info("replication")
        with connected(self._server) as client:
            had = client.info("replication")
            if _is_in_sync(had, sent):
                if self._priority:
                    client.config_set(PRIORITY, self._priority)
                    rewrite(client)
                return True
        if had.get("master_link_status") == "up" or int(had.get("master_sync_in_progress", 0)) or self._is_listed(sent):
            self._fed = time.monotonic()
        elif refusal := _refusal(self._server, self._lead):
            self.problem = refusal
        else:
            self._wait(f"its link to {self._lead.address} is down; its log has the reason")
        return False

    def _is_listed(self, sent: Mapping[str, object]) -> bool:
        """Whether the master knows it: it may wait there for the next save."""
        known = [value for name, value in sent.items() if name.startswith("slave") and isinstance(value, dict)]
        with contextlib.suppress(OSError):
            hosts = {self._server.host, socket.gethostbyname(self._server.host)}
            return any(int(state["port"]) == self._server.port and str(state["ip"]) in hosts for state in known)
        return False

    def _wait(self, why: str) -> None:
        if time.monotonic() - self._fed > LINK_SECONDS:
            self.problem = why


def _is_in_sync(had: Mapping[str, object], sent: Mapping[str, object]) -> bool:
    """Whether it follows this master and has all its writes so far."""
    return (
        had.get("master_link_status") == "up"
        and not int(str(had.get("master_sync_in_progress", 0)))
        and had["master_replid"] == sent["master_replid"]
        and int(str(had.get("slave_repl_offset", -1))) >= int(str(sent["master_repl_offset"]))
    )


def _refusal(server: Redis, lead: Redis) -> str:
    """Why the master refuses the replica's login; "": it does not, or that is unknown."""
    with connected(server) as client:
        try:
            user, password = setting(client, "masteruser"), setting(client, "masterauth")
        except redis.ResponseError:
            return ""
    login = lead.model_copy(update={"username": user, "password": SecretStr(password)})
    with contextlib.closing(login.client()) as client:
        try:
            client.ping()
        except redis.AuthenticationError as error:
            return f"{lead.address} refuses its login (masterauth): {error}"
        except redis.RedisError:
            return ""
    return ""


def rewrite(client: redis.Redis) -> None:
    """CONFIG REWRITE, as Sentinel does: a restart must not create a second master."""
    with contextlib.suppress(redis.ResponseError):
        client.config_rewrite()
