"""Copies of a dead server's data that survive: on its replicas, and in its own data directory (§2.3, §8.2).

A replica follows deletions too, and a replica in a full resynchronisation has neither the old data nor the new. So each
copy says how complete it is, until when it has every acknowledged write, and how many keys it has.
https://valkey.io/topics/replication/ and https://valkey.io/topics/persistence/
"""

from __future__ import annotations

import contextlib
import contextvars
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import redis

from blocks.redis.server import Redis
from runbook import clock
from runbook.errors import OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import Permit
from runbook.kinds import probe
from tasks.backups.catalogue import Backup
from tasks.redis.backup.aof import MANIFEST_ENDING, copy_aof, loaded_aof, read_parts
from tasks.redis.backup.rdb import read_rdb
from tasks.redis.backup.snapshot import RDB
from tasks.redis.content.manifest import RedisContent, expiring_in, lines_of
from tasks.redis.failover.group import GroupMember, LastSeen, member_of, quick, read_last_seen
from tasks.redis.failover.pause import LONGEST_SECONDS, Pause
from tasks.redis.scratch import refuse_empty, scratch_server
from tasks.redis.sentinels import ask_sentinels
from tasks.redis.server import call, connected, holders, key_counts, live_directory, setting, version_of
from tasks.redis.settings.file import Configuration, read_configuration
from tasks.redis.topology.isolation import TAKE_OFF
from tasks.redis.topology.topology import NOWHERE, ReplicationTopology

Kind = Literal["live", "replica", "files"]
SECTIONS = ("server", "replication", "persistence", "memory", "commandstats")
FLUSHES = ("cmdstat_flushall", "cmdstat_flushdb")
IS_EMPTY, IS_LOADING = "it is empty", "it is loading its data"
IS_SYNCING = "a full resynchronisation is running: its data is incomplete"
IS_NOT_SAVED = "the server neither has an AOF nor saves its data when it is stopped"
KEPT = "nothing: the server is neither stopped nor restored"
LEAST_RATIO = 0.5
"""A database with less than this share of the keys that a backup says should still exist was emptied by a command."""


@dataclass(frozen=True)
class SurvivingCopy:
    """`where`: `host:port`, or the data directory. `keys`: per database. `moment`: every write acknowledged by then is
    in it; None: unknown. `problem`: why it is no source. `rank`: 2 for the server that clients write to now, 1 for the
    dead master's AOF, 0 for copies that only `moment` compares. `flushes`: FLUSHALL and FLUSHDB since its start.
    `run_id`, `started`: of the server's process."""

    kind: Kind
    where: str
    keys: Mapping[int, int] = field(default_factory=dict)
    moment: datetime | None = None
    loss: str = ""
    problem: str = ""
    rank: int = 0
    version: str = ""
    memory_bytes: int = 0
    flushes: int = 0
    run_id: str = ""
    started: datetime | None = None
    precision: timedelta = timedelta(0)
    """`moment` may be earlier than the truth by as much."""

    @property
    def all_keys(self) -> int:
        """The keys of all databases."""
        return sum(self.keys.values())

    @property
    def name(self) -> str:
        """For people."""
        return {"live": "", "replica": "replica ", "files": "files in "}[self.kind] + self.where


@dataclass(frozen=True)
class Survivors:
    """The copies, and the data that the current master serves (None: the server does not answer, or its data cannot
    stay)."""

    copies: tuple[SurvivingCopy, ...] = ()
    serving: SurvivingCopy | None = None

    @property
    def able(self) -> bool:
        """Whether one of them is complete."""
        return any(not copy.problem for copy in self.copies)

    @property
    def not_yet(self) -> tuple[SurvivingCopy, ...]:
        """Copies that are getting their data."""
        return tuple(copy for copy in self.copies if copy.problem in (IS_LOADING, IS_SYNCING))


@probe
def find_survivors(block: Redis, around: ReplicationTopology, spool: Path) -> Survivors:
    """Every other server of the data set, and the server's own files. A dead server's AOF is copied to `spool` and
    loaded there; nothing is changed.

    Raises:
        OpsError: the server refuses this user.
    """
    live, server = _live(block)
    seen = read_last_seen(block, ask_sentinels(block))
    if seen and server and _is_outdated(seen, server, around):
        seen = None
    with ThreadPoolExecutor(max_workers=max(1, len(around.others))) as pool:
        # Each in a copy of this context: it has the zone in which times are shown.
        asked = [
            pool.submit(contextvars.copy_context().run, _replica, block, address, around, seen)
            for address in around.others
        ]
        found = [one.result() for one in asked]
    serving = _serving(block, live, found, around, is_master=server.is_master) if live and server else None
    found += [own] if (own := live or _files(block, spool)) else []
    return Survivors(tuple(found), serving)


def _serving(
    block: Redis,
    live: SurvivingCopy,
    replicas: Iterable[SurvivingCopy],
    around: ReplicationTopology,
    *,
    is_master: bool,
) -> SurvivingCopy | None:
    """The data of the master that clients write to: this server's, or after a failover another one's. A run that was
    killed has detached the other servers (`around.since`): then they must be attached again."""
    if around.since or around.disagreement:
        return None
    if is_master and around.master in ("", around.own):
        masters = [replace(live, where=block.address)] if live.problem in ("", IS_NOT_SAVED) else []
    else:
        masters = [copy for copy in replicas if copy.rank > 1 and copy.where == around.master and not copy.problem]
    return replace(masters[0], kind="live", problem="", loss=KEPT) if masters else None


def _is_outdated(seen: LastSeen, server: GroupMember, around: ReplicationTopology) -> bool:
    """Whether the server that answers has restarted since: that begins another replication stream, and a Sentinel asks
    every 10 s only."""
    return seen.address == around.own and server.is_master and server.replid != seen.replid


def _live(block: Redis) -> tuple[SurvivingCopy | None, GroupMember | None]:
    """The files that a server which answers will have when it is stopped, and the server (None: it does not answer, or
    hangs)."""
    directory = live_directory(block)
    try:
        with quick(block) as client:
            info = client.info(*SECTIONS)
            keys = {number: counts[0] for number, counts in key_counts(client).items()}
            saves = setting(client, "appendonly") == "yes" or setting(client, "save")
            version = version_of(client)
    except Unreachable:
        return None, None
    problem = IS_LOADING if info.get("loading") else "" if sum(keys.values()) else IS_EMPTY
    if not directory.is_dir() and not block.remote:
        problem = "the directory is missing: the server cannot save its data"
    elif not saves:
        problem = problem or IS_NOT_SAVED
    copy = SurvivingCopy(
        "files",
        str(directory),
        keys,
        datetime.now(UTC),
        "nothing: the server is stopped after the application, and its files have every write",
        problem,
        1,
        version,
        int(info["used_memory"]),
        _flushes(info),
    )
    return _of_process(copy, info), member_of(block.address, info)


def _of_process(copy: SurvivingCopy, info: Mapping[str, Any]) -> SurvivingCopy:
    started = datetime.now(UTC) - timedelta(seconds=int(info["uptime_in_seconds"]))
    return replace(copy, run_id=str(info["run_id"]), started=started)


def _replica(block: Redis, address: str, around: ReplicationTopology, seen: LastSeen | None) -> SurvivingCopy:
    copy = SurvivingCopy("replica", address)
    try:
        with quick(block.at(address)) as client:
            info = client.info(*SECTIONS)
            keys = {number: counts[0] for number, counts in key_counts(client).items()}
            version = version_of(client)
    except OpsError as error:
        return replace(copy, problem=error.message)
    member = member_of(address, info)
    moment = _heard(member, int(info.get("master_link_down_since_seconds", -1)), around)
    serves = member.is_master and (around.master == address or not around.since)
    copy = replace(copy, keys=keys, moment=moment, precision=_precision(member), rank=2 * serves, version=version)
    copy = _of_process(replace(copy, flushes=_flushes(info)), info)
    copy = replace(copy, memory_bytes=int(info["used_memory"]), loss=_replica_loss(member, moment, around, seen))
    return replace(copy, problem=_incomplete(member, keys, around, seen))


def _precision(member: GroupMember) -> timedelta:
    """A replica knows the end of its link in whole seconds, which may begin up to a second before it."""
    return timedelta(0) if member.is_master or member.link_up else timedelta(seconds=1)


def _heard(member: GroupMember, broken_seconds: int, around: ReplicationTopology) -> datetime | None:
    """Until when it had every write of the master. A detached replica says nothing about its earlier link: the record
    of its detachment bounds it."""
    now = datetime.now(UTC)
    moment = now if member.is_master or member.link_up else None
    if not moment and broken_seconds >= 0:
        moment = now - timedelta(seconds=broken_seconds)
    since = datetime.fromisoformat(around.since) if around.since else None
    return min(moment or since, since) if since else moment


def _missing_bytes(member: GroupMember, seen: LastSeen | None) -> int:
    """How many bytes of the stream it certainly lacks, by the master's last INFO at a Sentinel."""
    if seen is None:
        return 0
    offset = member.promoted_at if member.earlier_replid == seen.replid else member.offset
    return max(0, seen.offset - offset)


def _replica_loss(
    member: GroupMember, moment: datetime | None, around: ReplicationTopology, seen: LastSeen | None
) -> str:
    missing = _missing_bytes(member, seen)
    certain = f"; {missing:,} bytes of the stream are missing" if missing else ""
    if member.is_master and not around.since:
        return f"writes that the dead master acknowledged just before its death and did not send yet{certain}"
    if moment is None:
        return f"unknown: it has restarted since it last heard from the master{certain}"
    return f"writes acknowledged after {clock.text(moment)}, when its link to the master ended{certain}"


def _incomplete(
    member: GroupMember, keys: Mapping[int, int], around: ReplicationTopology, seen: LastSeen | None
) -> str:
    """Why it is no complete copy of the master; "": it is one."""
    if member.loading:
        return IS_LOADING
    if member.syncing:
        return IS_SYNCING
    if not sum(keys.values()):
        return IS_EMPTY
    if member.is_master and not member.earlier_replid and around.master != member.address:
        return "it is a master that never followed this one"
    streams = {member.replid, member.earlier_replid}
    if seen and seen.address == around.own and seen.replid not in streams:
        return "it follows another replication stream than the dead master's"
    return ""


def _flushes(info: Mapping[str, Any]) -> int:
    return sum(int(info[name]["calls"]) for name in FLUSHES if name in info)


def _files(block: Redis, spool: Path) -> SurvivingCopy | None:
    """The files of a server that does not answer, loaded by a scratch server; None: there is no directory."""
    directory = live_directory(block)
    if not directory.is_dir():
        return None
    copy = SurvivingCopy("files", str(directory))
    try:
        if working := holders(block, directory):
            return replace(copy, problem=f"process {working[0]} still works there, and does not answer")
        configuration = read_configuration(Path(block.config_file))
        with _loaded(block, directory, configuration, spool) as (client, moment):
            keys = {number: counts[0] for number, counts in key_counts(client).items()}
            copy = replace(copy, keys=keys, moment=moment, version=version_of(client))
            copy = replace(copy, memory_bytes=int(client.info("memory")["used_memory"]))
    except (OpsError, OSError) as error:
        return replace(copy, problem=str(getattr(error, "message", error)))
    if not copy.all_keys:
        return replace(copy, problem=IS_EMPTY)
    is_complete = configuration.appendonly and not configuration.replica_of
    if not is_complete:
        since = clock.text(copy.moment) if copy.moment else "an unknown time"
        return replace(copy, loss=f"writes acknowledged after {since}")
    fsync = configuration.get("appendfsync", "everysec")
    loss = f"nothing if only the process died; if the host failed, its last seconds (AOF, appendfsync {fsync})"
    return replace(copy, rank=1, loss=loss)


@contextlib.contextmanager
def _loaded(
    block: Redis, directory: Path, configuration: Configuration, spool: Path
) -> Iterator[tuple[redis.Redis, datetime]]:
    if not configuration.appendonly:
        refuse_empty(directory / configuration.rdb)
        with scratch_server(block, directory, rdb=configuration.rdb) as client:
            yield client, read_rdb(directory / configuration.rdb).written
        return
    aof = read_parts(aof_manifest(directory, configuration))
    # A copy: a server that loads an AOF truncates an incomplete command at its end.
    with tempfile.TemporaryDirectory(prefix=".aof-", dir=spool) as place:
        copy_aof(aof, Path(place))
        with loaded_aof(block, Path(place), RDB) as client:
            yield client, aof.written


def aof_manifest(directory: Path, configuration: Configuration) -> Path:
    """The manifest of the AOF in a data directory."""
    folder, stem = configuration.aof
    return directory / folder / f"{stem}{MANIFEST_ENDING}"


def expected_keys(backup: Backup) -> dict[int, int]:
    """The keys of a backup that should still exist: those without a TTL, and those that have not expired since."""
    content = RedisContent.model_validate(backup.manifest.content)
    now, ahead = datetime.now(UTC).timestamp() * 1000, Counter[int]()
    with contextlib.suppress(FileNotFoundError, VerificationFailed):
        for line in lines_of(expiring_in(backup.path)):
            number, expires, _, what = line.rstrip(b"\n").split(b"\t")
            ahead[int(number)] += what == b"key" and int(expires) > now
    return {number: found.persistent_keys + ahead[number] for number, found in content.databases.items()}


def deleted_keys(copy: SurvivingCopy, expected: Mapping[int, int]) -> str:
    """Which databases lack keys that no expiry explains, as a sentence; "": none does."""
    short = [
        f"database {number} has {copy.keys.get(number, 0):,} keys, at least {keys:,} of the backup should still exist"
        for number, keys in expected.items()
        if copy.keys.get(number, 0) < keys * LEAST_RATIO
    ]
    flushed = f"; FLUSHALL or FLUSHDB ran {copy.flushes} times since its start" if short and copy.flushes else ""
    return "; ".join(short) + flushed


@contextlib.contextmanager
def released(permit: Permit, block: Redis, replica: Redis) -> Iterator[None]:
    """Within the block a detached replica is a master whose writes are paused: a server whose master is dead serves no
    replica, and so no copy. Afterwards it is detached again. Its data does not change.

    Raises:
        NotConfirmed: the permit does not cover the servers of this data set.
        Unreachable, OpsError: it does not answer, or refuses.
    """
    permit.require(TAKE_OFF, block.data_directory)
    with Pause(replica, LONGEST_SECONDS) as pause:
        try:
            with connected(replica) as client:
                call(client, "REPLICAOF", "NO", "ONE")
            failpoint("redis: survivor released")
            yield
        finally:
            with connected(replica) as client:
                call(client, "REPLICAOF", *NOWHERE)
        pause.lift()
