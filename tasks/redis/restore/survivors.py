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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import redis

from blocks.redis.server import Redis
from runbook import clock
from runbook.errors import LossExceeded, OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.loss import Loss
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.backups.catalogue import Backup
from tasks.redis.backup.aof import copy_aof, loaded_aof, read_parts
from tasks.redis.backup.snapshot import RDB
from tasks.redis.content.manifest import RedisContent, expiring_in, lines_of
from tasks.redis.failover.group import GroupMember, member_of, quick, read_member
from tasks.redis.failover.pause import LONGEST_SECONDS, Pause
from tasks.redis.persistence.newest import NewestData, aof_manifest, find_newest
from tasks.redis.position import (
    POSITION,
    StreamPosition,
    known_positions,
    position_of,
    read_position,
    received,
    received_until,
    record_position,
)
from tasks.redis.scratch import scratch_server
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
PART = "Redis"
NOTHING = Loss(PART)
NOT_MEASURED = Loss.not_known(PART, "it was not measured")
LEAST_RATIO = 0.5
"""A database with less than this share of the keys that a backup says should still exist was emptied by a command."""


@dataclass(frozen=True)
class SurvivingCopy:
    """`where`: `host:port`, or the data directory. `keys`: per database. `moment`: every write acknowledged by then is
    in it; None: unknown. `received`: by replication stream, the offset up to which it has the writes. `problem`: why it
    is no source. `serves`: clients write to this server now. `is_aof`: the files are an AOF. `flushes`: FLUSHALL and
    FLUSHDB since its start. `run_id`, `started`: of the server's process."""

    kind: Kind
    where: str
    keys: Mapping[int, int] = field(default_factory=dict)
    moment: datetime | None = None
    loss: Loss = NOT_MEASURED
    problem: str = ""
    received: Mapping[str, int] = field(default_factory=dict)
    serves: bool = False
    is_aof: bool = False
    version: str = ""
    memory_bytes: int = 0
    flushes: int = 0
    run_id: str = ""
    started: datetime | None = None

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
    stay). `known`: positions of masters that show what the copies have received."""

    copies: tuple[SurvivingCopy, ...] = ()
    serving: SurvivingCopy | None = None
    known: tuple[StreamPosition, ...] = ()

    @property
    def able(self) -> bool:
        """Whether one of them is complete."""
        return any(not copy.problem for copy in self.copies)

    @property
    def not_yet(self) -> tuple[SurvivingCopy, ...]:
        """Copies that are getting their data."""
        return tuple(copy for copy in self.copies if copy.problem in (IS_LOADING, IS_SYNCING))

    def measured(self, backup: Backup | None) -> Survivors:
        """With the loss of each replica, as far as the offsets show it. A backup's offset is one of them."""
        position = position_in(backup) if backup else None
        known = [*self.known, *([position] if position else [])]
        return replace(self, copies=tuple(measured(copy, known) for copy in self.copies))


@probe
def find_survivors(block: Redis, around: ReplicationTopology, spool: Path, reports: Path) -> Survivors:
    """Every other server of the data set, and the server's own files. A dead server's AOF is copied to `spool` and
    loaded there; nothing is changed. The losses of replicas are not measured yet.

    Raises:
        OpsError: the server refuses this user.
    """
    live, server = _live(block)
    with ThreadPoolExecutor(max_workers=max(1, len(around.others))) as pool:
        # Each in a copy of this context: it has the zone in which times are shown.
        asked = [
            pool.submit(contextvars.copy_context().run, _replica, block, address, around) for address in around.others
        ]
        others = [one.result() for one in asked]
    found = [copy for copy, _ in others]
    serving = _serving(block, live, found, around, is_master=server.is_master) if live and server else None
    found += [own] if (own := live or _files(block, spool)) else []
    now = [position for _, position in others]
    now += [position_of(server, live.moment) if live and live.moment and server else None]
    return Survivors(tuple(found), serving, (*filter(None, now), *known_positions(block, reports)))


def measured(copy: SurvivingCopy, known: Sequence[StreamPosition]) -> SurvivingCopy:
    """The copy with its loss by the known positions of masters. The loss of files, and of a server that stops with all
    of its writes, is known without them."""
    if copy.problem or not copy.received:
        return copy
    if moment := received_until(copy.received, known):
        return replace(copy, moment=copy.moment or moment, loss=Loss.at_most_since(PART, moment))
    why = f"no recorded offset of a master belongs to the replication stream of {copy.name}"
    if on_stream := [one for one in known if one.replid in copy.received]:
        last = max(on_stream, key=lambda one: one.offset)
        lacks = last.offset - copy.received[last.replid]
        why = f"{copy.name} lacks {lacks:,} bytes of what the master had written by {clock.text(last.at)}, or more"
    return replace(copy, loss=Loss.not_known(PART, why))


def position_in(backup: Backup) -> StreamPosition | None:
    """The master's position at the end of a backup, which has nothing after it. None: its manifest does not have it."""
    found = backup.manifest.content.get(POSITION)
    return StreamPosition(found["id"], int(found["offset"]), backup.manifest.taken) if found else None


def lacks(copy: SurvivingCopy, backup: Backup) -> bool:
    """Whether the offsets show that a copy has less than a backup."""
    found = position_in(backup)
    return found is not None and copy.received.get(found.replid, found.offset) < found.offset


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
        masters = [copy for copy in replicas if copy.serves and copy.where == around.master and not copy.problem]
    return replace(masters[0], kind="live", problem="", loss=NOTHING) if masters else None


def _live(block: Redis) -> tuple[SurvivingCopy | None, GroupMember | None]:
    """The files that a server which answers will have when it is stopped, and the server (None: it does not answer, or
    hangs)."""
    directory, asked = live_directory(block), datetime.now(UTC)
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
    server = member_of(block.address, info)
    copy = SurvivingCopy(
        "files",
        str(directory),
        keys,
        asked,
        NOTHING,  # the server is stopped after the application, and its files have every write
        problem,
        version=version,
        memory_bytes=int(info["used_memory"]),
        flushes=_flushes(info),
        is_aof=bool(info.get("aof_enabled")),
    )
    if not server.is_master:
        copy = replace(copy, moment=None, received=received(server))
    return _of_process(copy, info), server


def _of_process(copy: SurvivingCopy, info: Mapping[str, Any]) -> SurvivingCopy:
    started = datetime.now(UTC) - timedelta(seconds=int(info["uptime_in_seconds"]))
    return replace(copy, run_id=str(info["run_id"]), started=started)


def _replica(block: Redis, address: str, around: ReplicationTopology) -> tuple[SurvivingCopy, StreamPosition | None]:
    """A replica's data; and the server's position, if it was promoted and serves."""
    copy, asked = SurvivingCopy("replica", address), datetime.now(UTC)
    try:
        with quick(block.at(address)) as client:
            info = client.info(*SECTIONS)
            keys = {number: counts[0] for number, counts in key_counts(client).items()}
            version = version_of(client)
    except OpsError as error:
        return replace(copy, problem=error.message), None
    member = member_of(address, info)
    copy = replace(copy, keys=keys, received=received(member), version=version, flushes=_flushes(info))
    copy = replace(copy, memory_bytes=int(info["used_memory"]), problem=_incomplete(member, keys, around))
    copy = _of_process(copy, info)
    if not member.is_master or (around.since and around.master != address):
        return copy, None
    # Its writes since its promotion say nothing about those of the dead master.
    earlier = {replid: offset for replid, offset in copy.received.items() if replid != member.replid}
    return replace(copy, serves=True, moment=asked, received=earlier), position_of(member, asked)


def _incomplete(member: GroupMember, keys: Mapping[int, int], around: ReplicationTopology) -> str:
    """Why it is no complete copy of the master; "": it is one."""
    if member.loading:
        return IS_LOADING
    if member.syncing:
        return IS_SYNCING
    if not sum(keys.values()):
        return IS_EMPTY
    if member.is_master and not member.earlier_replid and around.master != member.address:
        return "it is a master that never followed this one"
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
        newest = find_newest(configuration, directory)
        with _loaded(block, directory, configuration, spool, is_aof=newest.is_aof) as client:
            keys = {number: counts[0] for number, counts in key_counts(client).items()}
            copy = replace(copy, keys=keys, is_aof=newest.is_aof, version=version_of(client))
            copy = replace(copy, memory_bytes=int(client.info("memory")["used_memory"]))
    except (OpsError, OSError) as error:
        return replace(copy, problem=str(getattr(error, "message", error)))
    if not copy.all_keys:
        return replace(copy, problem=IS_EMPTY)
    if master := configuration.replica_of:
        why = f"this server was a replica of {master}: its files do not show what the master acknowledged"
        return replace(copy, loss=Loss.not_known(PART, why))
    return replace(copy, moment=newest.complete_until, loss=files_loss(newest))


def files_loss(newest: NewestData) -> Loss:
    """The loss by the files of a dead master. An AOF has each write up to its last append; whether it was still
    switched on after that, the files do not show."""
    since = Loss.at_most_since if newest.is_aof else Loss.everything_since
    return since(PART, newest.complete_until)


@contextlib.contextmanager
def _loaded(
    block: Redis, directory: Path, configuration: Configuration, spool: Path, *, is_aof: bool
) -> Iterator[redis.Redis]:
    if not is_aof:
        with scratch_server(block, directory, rdb=configuration.rdb) as client:
            yield client
        return
    aof = read_parts(aof_manifest(directory, configuration))
    spool.mkdir(parents=True, exist_ok=True)
    # A copy: a server that loads an AOF truncates an incomplete command at its end.
    with tempfile.TemporaryDirectory(prefix=".aof-", dir=spool) as place:
        copy_aof(aof, Path(place))
        with loaded_aof(block, Path(place), RDB) as client:
            yield client


def expected_keys(backup: Backup) -> dict[int, int]:
    """The keys of a backup that should still exist: those without a TTL, and those that have not expired since."""
    content = RedisContent.model_validate(backup.manifest.content)
    now, ahead = datetime.now(UTC).timestamp() * 1000, Counter[int]()
    with contextlib.suppress(FileNotFoundError, VerificationFailed):
        for line in lines_of(expiring_in(backup.path), content):
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


@probe
def require_received(block: Redis, copy: SurvivingCopy) -> None:
    """Check that a detached replica still has what it had when it was judged: meanwhile it can have copied a master
    that had started without its data.

    Raises:
        LossExceeded: it does not.
        OpsError: it does not answer.
    """
    member = read_member(block, copy.where)
    if member.problem:
        raise OpsError(f"{copy.name} does not answer: {member.problem}", member.hint)
    now = received(member)
    if any(now.get(replid, -1) < offset for replid, offset in copy.received.items()):
        raise LossExceeded(
            f"{copy.name} has copied another master since it was judged, and no longer has its data",
            "run this again: it judges the sources anew. Nothing of Redis was replaced",
        )


@action(of=lambda block: Act(TAKE_OFF, block.data_directory))
def back_up_replica(block: Redis, copy: SurvivingCopy, reports: Path, take: Callable[[Redis], Backup]) -> Backup:
    """Let `take` back up a detached replica. Meanwhile it is a master whose writes are paused: a server whose master is
    dead serves no replica, and so no copy. Afterwards it is detached again. Its data does not change; its replication
    stream does, so its position in the new one is recorded.

    Raises:
        Unreachable, OpsError: it does not answer, or refuses.
    """
    replica = block.at(copy.where)
    with Pause(replica, LONGEST_SECONDS) as pause:
        try:
            with connected(replica) as client:
                call(client, "REPLICAOF", "NO", "ONE")
            if copy.loss.since and (position := read_position(replica, copy.loss.since)):
                record_position(reports, position)
            failpoint("redis: survivor released")
            backup = take(replica)
        finally:
            with connected(replica) as client:
                call(client, "REPLICAOF", *NOWHERE)
        pause.lift()
    return backup
