"""An option to recover a database: a backup, the WAL that is replayed on it, what it loses, how long it takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from blocks.environment import Environment
from flows.database import restore_steps as database
from flows.database.free_space import WAL_RATIO
from flows.recovery.destruction import WalTarget
from flows.recovery.gate import ClusterCopy, planned_loss
from flows.recovery.point.build import BUILD, REPLAY, expected_seconds
from flows.recovery.point.choice import PointOrigin
from flows.recovery.point.target import FoundTarget
from runbook import clock
from runbook.guard.loss import Loss
from runbook.kinds import Pending
from tasks.backups.catalogue import Backup
from tasks.cluster.copy import BuiltCluster
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.target import Stop
from tasks.postgres.restore.staged_copy import content_in

PHYSICAL, LOGICAL = "base backup and WAL", "dump"
EXTRACTED = "one database from base backup and WAL"
DUMP_RATIO, DUMP_BYTES_PER_SECOND = 0.8, 150e6
"""The most disk space that a database's dump uses, by its size; and how fast two workers take it (measured)."""


@dataclass(frozen=True)
class Replay:
    """The replay of an option: the end of its WAL, the target, and the private instance that replays it. `building`:
    its data directory, where that is built already."""

    origin: PointOrigin
    found: FoundTarget
    target: WalTarget
    instance: PrivateInstance
    building: Pending[BuiltCluster] | None = None

    @property
    def stop(self) -> Stop:
        """Where the recovery stops."""
        return self.target.stop

    @property
    def wal_bytes(self) -> int:
        """The WAL that it replays at most."""
        return len(self.found.links) * self.origin.content.segment_bytes


@dataclass(frozen=True)
class RestoreOption:
    """One backup to restore the database from, with the WAL after it where `replay` is set. It has every write up to
    `newest`, and none after it.

    `extracted_bytes`: the size of the application's database, where only that is taken out of the recovered cluster;
    0: the whole cluster is restored."""

    backup: Backup
    newest: datetime
    replay: Replay | None = None
    extracted_bytes: int = 0

    @property
    def kind(self) -> str:
        """Base backup and WAL, one database of it, or dump."""
        if not self.replay:
            return LOGICAL
        return EXTRACTED if self.extracted_bytes else PHYSICAL

    @property
    def text(self) -> str:
        """The backup, and the newest write that it has."""
        newest = clock.text(self.newest, "microseconds")
        if not self.replay:
            return f"{self.backup.name}, newest write at {newest}"
        return f"{self.backup.name} with {len(self.replay.found.links)} segments of WAL, newest write at {newest}"

    def copy(
        self, part: str, databases: Collection[int] = (), names: Mapping[int, str] = MappingProxyType({})
    ) -> ClusterCopy:
        """The copy of the cluster that it makes, for the gate. `databases`: the OIDs of those that are replaced, none
        for all; `names`: databases by OID."""
        assert self.replay
        replay, target = self.replay, self.replay.target
        without = (target.destruction.end.xid,) if target.destruction else ()
        return ClusterCopy(part, replay.origin, replay.stop, replay.found.commits, without, databases, names)

    def planned_loss(self, env: Environment, *, in_place: bool, confirmed: Loss | None = None) -> Loss:
        """The loss by what is known now. `in_place`: the live cluster's WAL can still be read when it is replaced.
        `confirmed`: that of the plan which a run carries out."""
        part = env.postgres.database
        if not self.replay or not in_place or self.replay.found.behind:
            return Loss.everything_since(part, self.newest)
        target = self.replay.target
        copy, to_the_end = self.copy(part), target.is_the_end
        return planned_loss(env, copy, target.given_up, to_the_end=to_the_end, confirmed=confirmed)

    def expected_seconds(self, env: Environment) -> float:
        """An estimate of its restore, without the application's start: the same as the plan's steps."""
        if self.replay:
            built = expected_seconds(env, BUILD, self.replay.origin.content.bytes)
            built += expected_seconds(env, REPLAY, self.replay.wal_bytes)
            rates = DUMP_BYTES_PER_SECOND, database.RESTORE_BYTES_PER_SECOND
            return built + sum(self.extracted_bytes / rate for rate in rates)
        return content_in(self.backup).bytes / database.RESTORE_BYTES_PER_SECOND

    @property
    def needs(self) -> int:
        """The bytes of disk space that it needs."""
        if self.replay:
            taken_out = int(self.extracted_bytes * (1 + WAL_RATIO + DUMP_RATIO))
            return int(self.replay.origin.content.bytes * 1.05) + self.replay.wal_bytes + taken_out
        return int(content_in(self.backup).bytes * (1 + WAL_RATIO))
