"""A snapshot over the network: a scratch server becomes a replica of the server, receives every acknowledged write, and
is then detached and saved (§2.3).

If the server forbids replication (managed services do), keys are read one by one, and the report warns that they are
not from one moment.
https://valkey.io/topics/replication/
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.log import logger
from runbook.masking import MASK
from runbook.wait import until
from tasks.redis.backup.relay import relayed
from tasks.redis.backup.snapshot import RDB, Snapshot, SnapshotSource
from tasks.redis.keys import Carried, carry, keys_under
from tasks.redis.line import live_line, log_of, scratch_line
from tasks.redis.persistence.saving import SAVE_SECONDS
from tasks.redis.scratch import scratch_server
from tasks.redis.sentinels import ask_sentinels
from tasks.redis.server import call, connected, key_counts, program_version, version_of

PROGRESS_SECONDS = 5.0
ANSWER_SECONDS = 60.0
RUNNING = "configuration-running.conf"
USERS = "users-running.acl"
_SECRETS = ("requirepass", "masterauth", "primaryauth", "tls-key-file-pass", "tls-client-key-file-pass")
_LOGIN = re.compile(r"Unable to AUTH to \w+: -(.*)")
_FORBIDDEN = re.compile(
    r"(?:aborted replication with an error|Unexpected reply to PSYNC from \w+): -?((?:NOPERM|ERR unknown command).*)"
)
_UNREADABLE = re.compile(r"# .*(Can't handle RDB format version \d+|Wrong signature.*|Wrong RDB checksum.*)")


class ReplicationForbidden(OpsError):
    """The server refuses replicas."""


@dataclass(frozen=True)
class NetworkSnapshot(Snapshot):
    """`moment` False: keys were read one by one between `taken` and the end. `way`: how, and from which server."""

    way: str = ""
    moment: bool = True


@probe
def read_remote_source(block: Redis, place: Path) -> SnapshotSource:
    """As `read_source`, without the server's directory: a scratch server saves to `place`.

    Raises:
        Unreachable: it is down, or loading.
        OpsError: it refuses the password or INFO.
    """
    with connected(block) as client:
        persistence = client.info("persistence")
        if persistence.get("loading"):
            raise Unreachable("Redis is still loading its data", "run it again when it has loaded them")
        memory = client.info("memory")
        return SnapshotSource(
            version=version_of(client),
            role=str(client.info("replication")["role"]),
            keys=sum(keys for keys, _ in key_counts(client).values()),
            dataset_bytes=int(memory.get("used_memory_dataset", memory["used_memory"])),
            directory=place,
            rdb="",
            save_status="ok",
        )


@action
def snapshot_over_network(block: Redis, directory: Path) -> NetworkSnapshot:
    """A scratch server's copy of the live server, saved to `directory`: by replication, or else key by key.

    Raises:
        Unreachable: the server does not answer, or replication does not start.
        OpsError: it refuses, or the scratch server cannot read its data.
    """
    started = time.monotonic()
    try:
        taken, way = _by_replication(block, directory)
        moment = True
    except ReplicationForbidden as error:
        logger().warning("%s: keys are read one by one", error.message)
        taken, way = _by_keys(block, directory)
        moment = False
    missed = tuple(_copy_settings(block, directory))
    return NetworkSnapshot(directory / RDB, taken, time.monotonic() - started, missed, way, moment)


def _by_replication(block: Redis, directory: Path) -> tuple[datetime, str]:
    source = _source(block)
    with (
        tempfile.TemporaryDirectory(prefix=".replica-", dir=directory) as place,
        scratch_server(block, Path(place), rdb=RDB) as client,
        relayed(source) as (host, port),
    ):
        _follow(client, source, host, port)
        failpoint("redis: scratch replica linked")
        taken = _caught_up(block, client)
        call(client, "REPLICAOF", "NO", "ONE")
        client.save()
        (Path(place) / RDB).rename(directory / RDB)
    (directory / RDB).chmod(0o600)
    way = f"by replication from {source.address}" + ("" if source is block else f", a replica of {block.address}")
    return taken, way


def _source(block: Redis) -> Redis:
    """The server to replicate: under Sentinel a replica that is in sync. Sentinels treat each follower of the master as
    a replica, remember it permanently, and might promote it."""
    for view in ask_sentinels(block).answering:
        for follower in view.followers:
            if follower.link_up and not follower.flags & {"s_down", "o_down", "disconnected"}:
                return block.at(follower.address)
    return block


@probe
def find_remembering(block: Redis) -> tuple[str, ...]:
    """The Sentinels that list a scratch server as a replica of the master, because no replica was healthy. They report
    it as down until they are reset."""
    views = ask_sentinels(block).answering
    return tuple(view.address for view in views if any(one.address.endswith(":0") for one in view.followers))


def _follow(client: redis.Redis, source: Redis, host: str, port: int) -> None:
    """Become a replica, and wait for the end of the first transfer. Secrets are sent over the scratch server's socket
    only."""
    client.config_set("masteruser", source.username)
    client.config_set("masterauth", source.password.get_secret_value())
    client.config_set("replica-priority", 0)
    client.config_set("replica-announced", "no")
    call(client, "REPLICAOF", host, port)
    reported, started = [time.monotonic()], time.monotonic()

    def linked() -> bool:
        info = client.info("replication")
        _refuse(client, source)
        if info["master_link_status"] == "up":
            return True
        if not info.get("master_sync_in_progress") and time.monotonic() - started > ANSWER_SECONDS:
            raise OpsError(f"{source.address} refuses a replica", _last_line(log_of(client)))
        _report(info, reported)
        return False

    until(linked, what=f"a copy of {source.address} by replication", seconds=SAVE_SECONDS, every_seconds=0.05)


def _refuse(client: redis.Redis, source: Redis) -> None:
    log = log_of(client)
    if found := _LOGIN.search(log):
        raise OpsError(f"{source.address} refuses a replica's log-in: {found[1]}", "correct the secret of [redis]")
    if found := _FORBIDDEN.search(log):
        raise ReplicationForbidden(
            f"{source.address} forbids replication: {found[1]}",
            f"ACL SETUSER {source.username or 'default'} +psync +replconf +ping",
        )
    if found := _UNREADABLE.search(log):
        raise VerificationFailed(
            f"{program_version(source)} cannot read the data of {source.address}: {found[1]}",
            "correct [redis] server_program: it needs the live server's version, on this host",
        )


def _last_line(log: str) -> str:
    return (log.strip().splitlines() or ["check that this host can reach its port"])[-1][:200]


def _report(info: dict[str, Any], reported: list[float]) -> None:
    if time.monotonic() - reported[0] > PROGRESS_SECONDS:
        reported[0] = time.monotonic()
        logger().info(
            "replication: %s of %s bytes",
            info.get("master_sync_read_bytes", 0),
            info.get("master_sync_total_bytes", "an unknown number of"),
        )


def _caught_up(block: Redis, client: redis.Redis) -> datetime:
    """Wait until the scratch server has all writes that the master acknowledged before a time; returns that time."""
    with connected(block) as master:
        taken = datetime.now(UTC)
        sent = master.info("replication")
    if sent["role"] != "master":
        raise OpsError(f"{block.address} is no longer the master", "run it again: it finds the new master")

    def had_all() -> bool:
        had = client.info("replication")
        if had["master_link_status"] == "up" and had["master_replid"] != sent["master_replid"]:
            raise OpsError("another server was promoted meanwhile", "run it again: it finds the new master")
        return int(had.get("slave_repl_offset", -1)) >= int(sent["master_repl_offset"])

    until(had_all, what="the last acknowledged write on the copy", seconds=ANSWER_SECONDS, every_seconds=0.01)
    return taken


def _by_keys(block: Redis, directory: Path) -> tuple[datetime, str]:
    """Copy every key by DUMP, in small parts. Only some of the writes meanwhile are included."""
    taken, done = datetime.now(UTC), Carried()
    with (
        tempfile.TemporaryDirectory(prefix=".copy-", dir=directory) as place,
        scratch_server(block, Path(place), rdb=RDB) as client,
        live_line(block) as live,
        scratch_line(block, client) as copy,
    ):
        with connected(block) as counting:
            numbers = sorted(key_counts(counting))
        for number in numbers:
            for page in keys_under(live, number, b""):
                carry(live, copy, number, page, done)
        with contextlib.suppress(OpsError):
            copy.call(0, "FUNCTION", "RESTORE", live.call(0, "FUNCTION", "DUMP"))
        client.save()
        (Path(place) / RDB).rename(directory / RDB)
    (directory / RDB).chmod(0o600)
    return taken, f"key by key from {block.address}: replication is forbidden"


def _copy_settings(block: Redis, directory: Path) -> Iterator[str]:
    """Save the server's configuration and users, without secrets; yields what could not be read."""
    with connected(block) as client:
        try:
            known = {str(name): str(value) for name, value in client.config_get("*").items()}
            lines = [f'{name} "{MASK if name in _SECRETS and value else value}"\n' for name, value in known.items()]
            (directory / RUNNING).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        except redis.ResponseError as error:
            yield f"the configuration of {block.address}: {error}"
        try:
            users = [re.sub(r"#[0-9a-f]{64}", f"#{MASK}", _text(user)) for user in call(client, "ACL", "LIST")]
            (directory / USERS).write_text("\n".join(users) + "\n", encoding="utf-8")
        except redis.ResponseError as error:
            yield f"the users of {block.address}: {error}"


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="backslashreplace")
