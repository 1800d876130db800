"""Detach replicas and Sentinels before a restore, and attach them when its data is proven (§2.3, §8.3).

Sentinels fail over a stopped master, and the restored server would become a replica of the bad data; replicas copy the
data that a master starts with. So first all Sentinels forget the master, and every other server of the data set gets an
unreachable master: it keeps its data, stays a replica, and refuses writes. All of that is recorded before, so that a
run after a killed one can attach everything.

Sentinels would promote a replica that has the replaced data, or none yet, if the new master died. So a replica has
replica-priority 0 until it is in sync (tasks.redis.topology.followers).

https://valkey.io/topics/sentinel/ and https://valkey.io/commands/replicaof/
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook.current import leaves, removed
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files import record
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.wait import until
from tasks.redis.sentinels import SETTINGS, ask_sentinels
from tasks.redis.server import answers, at_once, call, connected
from tasks.redis.settings.file import follow_nobody
from tasks.redis.topology.followers import NEVER, PRIORITY, note_priorities, rewrite, settle
from tasks.redis.topology.topology import NOWHERE, RECORD, ReplicationTopology, SentinelWatch

DETACHED = "the replicas and Sentinels of Redis are detached"
TAKE_OFF = "take off the replicas and Sentinels of Redis"
AGREE_SECONDS = 60.0


@action(of=lambda block: Act(TAKE_OFF, block.data_directory), idempotent=True)
def detach(block: Redis, around: ReplicationTopology, reports: Path) -> ReplicationTopology:
    """Record replicas and Sentinels, make all Sentinels forget the server, give the replicas an unreachable master, and
    ensure that this server does not start as a replica.

    Raises:
        OpsError: a Sentinel or a server refuses.
    """
    if around.is_alone:
        return around
    noted = replace(around, since=around.since or datetime.now(UTC).isoformat(timespec="seconds"))
    noted = note_priorities(noted, {address: block.at(address) for address in noted.reachable})
    record.write(reports / RECORD, noted)
    leaves(DETACHED, "reattach-redis attaches them")
    failpoint("redis: detachment recorded")
    for watcher in noted.watchers:
        _on_sentinel(block, watcher.address, partial(_forget, name=block.sentinel_master))
    failpoint("redis: sentinels removed")
    for address in noted.reachable:
        with connected(block.at(address)) as client:
            client.config_set(PRIORITY, NEVER)
            call(client, "REPLICAOF", *NOWHERE)
    if answers(block):
        _make_master(block)
    else:
        follow_nobody(Path(block.config_file))
    failpoint("redis: replicas isolated")
    return noted


def note_swapped(reports: Path, around: ReplicationTopology) -> ReplicationTopology:
    """Record that this server has the data which the others must follow."""
    if around.is_alone:
        return around
    noted = replace(around, swapped=True)
    record.write(reports / RECORD, noted)
    return noted


@dataclass(frozen=True)
class Attached:
    """The `master` that the Sentinels name, the servers that follow it but may not be in sync yet, and why others could
    not be attached. `around`: what was detached; `notes`: sentences about other problems."""

    master: str
    around: ReplicationTopology
    followers: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@action(of=lambda block: Act(TAKE_OFF, block.data_directory), idempotent=True)
def attach(block: Redis, around: ReplicationTopology, reports: Path) -> Attached:
    """Register the master with the Sentinels, so that clients find it, and let the others follow it.
    `wait_for_followers` completes that.

    The master is this server if its data was swapped, otherwise the earlier one.

    Raises:
        Unreachable: the Sentinels do not agree in time.
    """
    if around.is_alone:
        return Attached(around.own, around)
    master = around.own if around.swapped or not around.master else around.master
    servers = {around.own: block, **{address: block.at(address) for address in around.reachable}}
    lead = servers.pop(master)
    _make_master(lead)
    noted = note_priorities(around, servers)
    record.write(reports / RECORD, noted)
    failed = {address: problem for address in servers if (problem := _tried(_follow, servers[address], master))}
    failpoint("redis: replicas follow")
    for watcher in around.watchers:
        watch = partial(_watch, block=block, master=master, watcher=watcher)
        if problem := _tried(_on_sentinel, block, watcher.address, watch):
            failed[watcher.address] = problem
    watching = [watcher.address for watcher in around.watchers if watcher.address not in failed]
    if watching:
        until(
            lambda: _agreed(block, master, watching),
            what="the Sentinels' agreement",
            seconds=AGREE_SECONDS,
            hint=f"check each: SENTINEL CKQUORUM {block.sentinel_master}",
        )
    followers = tuple(address for address in servers if address not in failed)
    _note_rest(reports, noted, master, {*failed, *followers})
    notes = [
        lost for watcher in around.watchers if watcher.address in watching for lost in _lost_scripts(block, watcher)
    ]
    return Attached(master, noted, followers, failed, tuple(notes))


@action(of=lambda block: Act(TAKE_OFF, block.data_directory), idempotent=True)
def wait_for_followers(block: Redis, attached: Attached, reports: Path) -> tuple[str, ...]:
    """Wait until the replicas are in sync, and let the Sentinels promote them from then on. Returns sentences about
    servers and Sentinels that could not be attached; the record of detached servers keeps them.

    Raises:
    """
    around, master = attached.around, attached.master
    if around.is_alone:
        return ()
    servers = {around.own: block, **{address: block.at(address) for address in around.reachable}}
    followers = {address: servers[address] for address in attached.followers}
    behind = settle(followers, servers[master], around.priorities)
    _note_rest(reports, around, master, {*attached.failed, *behind})
    written = [master, *(address for address in followers if address not in behind)]
    return (
        *attached.notes,
        *filter(None, (_unwritten(servers[address]) for address in written)),
        *(
            f"{address} is not in sync with {master}: {why}. Fix it, then run reattach-redis"
            for address, why in behind.items()
        ),
        *(f"{problem}; run reattach-redis when {address} is back" for address, problem in attached.failed.items()),
        *(f"{address} does not answer: point it at {master} when it is back" for address in around.lost),
        *(
            f"Sentinel {address} does not answer: SENTINEL RESET it when it is back"
            for address in around.silent
            if address not in attached.failed
        ),
    )


def _unwritten(server: Redis) -> str:
    """Why its configuration file does not name its master; "": it does, or there is no file."""
    with connected(server) as client:
        try:
            client.config_rewrite()
        except redis.ResponseError as error:
            if "without a config file" not in str(error):
                return (
                    f"{server.address} cannot write its configuration file ({error}): after a restart it follows "
                    "its earlier master; let its user write there, then CONFIG REWRITE on it"
                )
    return ""


def _tried(work: Callable[..., None], *given: object) -> str:
    """Why a step failed, "": it succeeded. An unreachable server must not prevent the others."""
    try:
        work(*given)
    except OpsError as error:
        return error.message
    return ""


def _note_rest(reports: Path, around: ReplicationTopology, master: str, rest: Collection[str]) -> None:
    """Record the servers and Sentinels that are not attached yet, or delete the record. The master serves: without
    `since`, no later run takes it for detached."""
    left = replace(
        around,
        master=master,
        others=tuple(address for address in around.others if address in rest),
        watchers=tuple(watcher for watcher in around.watchers if watcher.address in rest),
        since="",
        swapped=False,
        priorities={address: value for address, value in around.priorities.items() if address in rest},
    )
    if left.is_alone and around.own not in rest:
        (reports / RECORD).unlink(missing_ok=True)
        removed(DETACHED)
    else:
        record.write(reports / RECORD, left)


def _on_sentinel(block: Redis, address: str, work: Callable[[redis.Redis], None]) -> None:
    with contextlib.closing(at_once(block.sentinel(address))) as client:
        try:
            work(client)
        except redis.RedisError as error:
            raise OpsError(f"Sentinel {address}: {error}", "start it, or delete it from [redis] sentinels") from None


def _forget(client: redis.Redis, name: str) -> None:
    try:
        call(client, "SENTINEL", "REMOVE", name)
    except redis.ResponseError as error:
        if "No such master" not in str(error):
            raise


def _watch(client: redis.Redis, *, block: Redis, master: str, watcher: SentinelWatch) -> None:
    name, (host, _, port) = block.sentinel_master, master.rpartition(":")
    _forget(client, name)
    call(client, "SENTINEL", "MONITOR", name, host, port, watcher.quorum)
    if password := block.password.get_secret_value():
        if block.username:
            call(client, "SENTINEL", "SET", name, "auth-user", block.username)
        call(client, "SENTINEL", "SET", name, "auth-pass", password)
    for setting in SETTINGS:
        if setting in watcher.settings:
            call(client, "SENTINEL", "SET", name, setting, watcher.settings[setting])


def _lost_scripts(block: Redis, watcher: SentinelWatch) -> list[str]:
    """Scripts that a Sentinel forgot with the master, and accepts only from its configuration file."""
    if not watcher.scripts:
        return []
    with contextlib.closing(at_once(block.sentinel(watcher.address))) as client:
        for name, script in watcher.scripts.items():
            with contextlib.suppress(redis.RedisError):  # deny-scripts-reconfig
                call(client, "SENTINEL", "SET", block.sentinel_master, name, script)
    (now,) = [view for view in ask_sentinels(block).views if view.address == watcher.address]
    return [
        f"Sentinel {watcher.address} has lost its {name} and refuses SENTINEL SET for it: add “sentinel {name} "
        f"{block.sentinel_master} {script}” to its configuration file, and restart it"
        for name, script in watcher.scripts.items()
        if now.scripts.get(name) != script
    ]


def _make_master(server: Redis) -> None:
    with connected(server) as client:
        if client.info("replication")["role"] != "master":
            call(client, "REPLICAOF", "NO", "ONE")
            rewrite(client)


def _follow(server: Redis, master: str) -> None:
    host, _, port = master.rpartition(":")
    with connected(server) as client:
        client.config_set(PRIORITY, NEVER)
        call(client, "REPLICAOF", host, port)
        rewrite(client)


def _agreed(block: Redis, master: str, watching: Sequence[str]) -> bool:
    views = {view.address: view for view in ask_sentinels(block).answering}
    return all(
        address in views and views[address].master == master and views[address].can_decide for address in watching
    )
