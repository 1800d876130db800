"""What is measured, in which order: backups, the load beside one, restores; both sides in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.chapter import Chapter
from benchmarks.deployment_chapter import DeploymentChapter
from benchmarks.figures import Figure
from benchmarks.growth import GrowthChapter
from benchmarks.logs_chapter import LogsChapter
from benchmarks.peers import Peers, Recovered
from benchmarks.place import NAME, Called, Place
from benchmarks.recovery.chapter import RecoveryChapter
from benchmarks.redis_chapter import RedisChapter
from blocks.config import toml
from runbook.units import size
from tasks.backups import catalogue
from tasks.postgres.dump.compression import ZSTD, knows_compression
from tasks.postgres.restore.staged_copy import default_jobs
from tasks.stores.directory import DirectoryStore

CHAPTER, RECOVERY, ESTIMATE, GROWTH, TABLES = "chapter", "recovery", "estimate", "growth", "tables"
DEPLOYMENTS = "deployments"
ROUNDS = 3
RESTORE_ROUNDS = 2
IDLE_SECONDS = 9.0
BACKUP = "flows.database.backup:backup_database"
BACKUP_REDIS = "flows.redis.persistence:backup_redis"
BACKUP_FILES = "flows.application.files:backup_files"
RESTORE_DATABASE = "flows.database.restore:restore_database"
BACKUP_CLUSTER = "flows.database.base_backup:backup_cluster"
REJOIN = "flows.recovery.postgres.failover:rejoin_standby"
FULL_RESTORE = "flows.recovery.full_restore:full_restore"
# The script restores Redis too: ours must not leave the serving one as it is.
FROM_BACKUP: dict[str, Any] = {"redis_source": "backup", "confirm": NAME}


@dataclass
class Suite:
    """One run of everything. `profile` is what a full restore spends its time on."""

    place: Place
    password: str
    figures: list[Figure] = field(default_factory=list)
    profile: list[Called] = field(default_factory=list)

    def run(self, only: str = "", megabytes: int = 0, environments: int = 1) -> None:
        """Measure everything, the restores lead the table; or `only` one chapter, the estimate of the RTO, or the
        growth up to so many `megabytes`, that with many tables, or deployments of so many `environments`.

        Raises:
            OpsError: a side failed, or is not healthy afterwards.
        """
        peers = Peers(self.place)
        if only == CHAPTER:
            self.place.call(BACKUP)
            peers.back_up()
            self.figures = Chapter(self.place, peers, self.place.rows()).figures()
            return
        if only == GROWTH:
            self.figures = GrowthChapter(self.place, peers, megabytes).figures()
            return
        if only == TABLES:
            self.figures = GrowthChapter(self.place, peers, megabytes).tables()
            return
        if only == DEPLOYMENTS:
            self.figures = DeploymentChapter(self.place).figures(environments)
            return
        if only == ESTIMATE:
            peers.directory.mkdir(exist_ok=True)
            self.figures = RecoveryChapter(self.place, peers, self.place.rows()).estimates()
            return
        if only == RECOVERY:
            self.recovery(peers)
            return
        backups = self.backups(peers)
        self.place.call(BACKUP_REDIS)
        self.place.call(BACKUP_FILES)
        peers.save_redis()
        of_backups, self.figures = self.figures, []
        self.restores(peers, self.place.rows())
        self.figures += of_backups
        self.outage(self.place.rows())
        self.latency()
        self.orchestration(backups)
        self.figures += Chapter(self.place, peers, self.place.rows()).figures()
        self.figures += RedisChapter(self.place.tell).figures()
        self.figures += LogsChapter(self.place.tell).figures()
        self.recovery(peers)
        self.figures += DeploymentChapter(self.place).figures()  # the last: its automations watch what follows

    def recovery(self, peers: Peers) -> None:
        """The recovery chapter, from backups of both sides with what the database holds by now, for the load wrote."""
        for backup in (BACKUP, BACKUP_REDIS, BACKUP_FILES):
            self.place.call(backup)
        peers.back_up()
        peers.save_redis()
        for figure in RecoveryChapter(self.place, peers, self.place.rows()).figures():
            self.figures.append(figure)

    def backups(self, peers: Peers) -> list[Called]:
        """Backup against `pg_dump -F c -b -v`, and against its own pg_dump alone."""
        rows = self.place.rows()
        ours: list[Called] = []
        peer, alone = [], []
        compression = ZSTD if knows_compression(toml.environment(NAME).postgres, ZSTD) else "0"
        for number in range(ROUNDS):
            self.place.settle(rows)
            ours.append(self.place.call(BACKUP))
            self.place.settle(rows)
            peer.append(peers.back_up())
            self.place.settle(rows)
            alone.append(peers.dump_alone(default_jobs(), compression))
            self.place.tell(
                f"backup {number + 1}: ours {ours[-1].seconds:.1f} s, pg_dump -F c {peer[-1]:.1f} s, "
                f"our pg_dump alone {alone[-1]:.1f} s"
            )
        store = DirectoryStore(Path(self.place.status["stores"]["postgres"]))
        mine = catalogue.find_backup(store, "postgres").manifest.bytes
        other = peers.dump.stat().st_size
        dumping = statistics.median(call.step("dump_database") for call in ours)
        wall = statistics.median(call.seconds for call in ours)
        share = max(0.0, dumping - statistics.median(alone)) / wall
        self.figures += [
            Figure.ratio("backup ÷ pg_dump -F c -b", [call.seconds for call in ours], peer, 0.45),
            Figure("backup's size ÷ pg_dump -F c -b", mine / other, 1.02, shown=f"{mine / other:.2f} ({size(mine)})"),
            Figure(
                "manifest's share of the backup",
                share,
                0.25,
                dumping,
                statistics.median(alone),
                shown=f"{share:.0%} of {wall:.1f} s",
            ),
        ]
        return ours

    def restores(self, peers: Peers, rows: Mapping[str, int]) -> None:
        """Full restore, both ways, against disaster_recovery.sh."""
        sides = RestoreSides()
        for number in range(RESTORE_ROUNDS):
            self.place.settle(rows)
            with load.disk_growth(self.place) as grown:
                sides.dump.append(self.place.call(FULL_RESTORE, method="dump", **FROM_BACKUP))
            sides.growth.append(grown)
            self.place.settle(rows)
            self.least_loss(sides)
            self.place.settle(rows)
            sides.script.append(peers.recover())
            self.place.tell(f"full restore {number + 1}: {sides.last}")
        self.profile = sides.dump
        self.figures += sides.figures()

    def least_loss(self, sides: RestoreSides) -> None:
        """A full restore that chooses its method, after a client's writes that no backup has. Afterwards the standby
        is rebuilt, as its report asks for."""
        self.place.call(BACKUP_CLUSTER, kind="full")
        written = load.acknowledged(self.place)
        sides.auto.append(self.place.call(FULL_RESTORE, **FROM_BACKUP))
        sides.acknowledged += len(written.numbers)
        sides.lost += len(written.lost())
        self.place.call(REJOIN, confirm=NAME)

    def outage(self, rows: Mapping[str, int]) -> None:
        """What a client of the database sees of `restore_database`."""
        self.place.settle(rows)
        with load.hammering(self.place) as client:
            self.place.call(RESTORE_DATABASE, confirm=NAME)
        gap = load.longest_gap(client)
        self.place.tell(f"restore database: longest gap {gap:.2f} s")
        self.figures.append(Figure.seconds("outage that clients see during restore_database", [gap], 2.0))

    def latency(self) -> None:
        """The application's p99 during a backup against idle."""
        idle: list[float] = []
        busy: list[float] = []
        problems: list[str] = []
        with load.application_load(self.place, self.password):
            load.let_pass(2.0)  # warm
        for _ in range(RESTORE_ROUNDS):
            with load.application_load(self.place, self.password) as watched:
                load.let_pass(IDLE_SECONDS)
            idle += watched.values
            problems += watched.problems
            with load.application_load(self.place, self.password) as watched:
                self.place.call(BACKUP)
            busy += watched.values
            problems += watched.problems
        shown = f"; {len(problems)} errors" if problems else ""
        before, during = _p99(idle), _p99(busy)
        self.figures.append(
            Figure(
                "application's p99 during a backup ÷ idle",
                during / before,
                2.0,
                during,
                before,
                shown=f"{during / before:.2f} ({during * 1000:.0f} ms ÷ {before * 1000:.0f} ms{shown})",
            )
        )

    def orchestration(self, backups: Sequence[Called]) -> None:
        """Wall time in which no step ran; and a cheap flow through Prefect against the same function without it."""
        through, direct = [], []
        for _ in range(ROUNDS):
            through.append(self.place.call(BACKUP_REDIS).seconds)
            direct.append(self.place.call(BACKUP_REDIS, direct=True).seconds)
        beside = [call.beside_steps_seconds for call in self.profile]
        difference = statistics.median(through) - statistics.median(direct)
        self.figures += [
            Figure.seconds("orchestration: full restore's wall time without any step running", beside, 2.0),
            Figure.seconds(
                "orchestration: backup's wall time without any step running",
                [call.beside_steps_seconds for call in backups],
                3.0,
            ),
            Figure(
                "orchestration: backup_redis through Prefect − directly",
                difference,
                3.0,
                statistics.median(through),
                statistics.median(direct),
                unit="s",
            ),
        ]


@dataclass
class RestoreSides:
    """The calls of each side of a full restore. `lost`: of the `acknowledged` writes, after those that chose their
    method."""

    auto: list[Called] = field(default_factory=list)
    dump: list[Called] = field(default_factory=list)
    script: list[Recovered] = field(default_factory=list)
    growth: list[load.Growth] = field(default_factory=list)
    acknowledged: int = 0
    lost: int = 0

    @property
    def last(self) -> str:
        """Of the newest round."""
        return (
            f"auto {self.auto[-1].seconds:.1f} s, dump {self.dump[-1].seconds:.1f} s, script "
            f"{self.script[-1].seconds:.1f} s"
        )

    def figures(self) -> list[Figure]:
        """As the script is measured: from the stop of the services until they are healthy and verified."""
        auto, dump = (
            [call.from_to("stop_services", "smoke_check") for call in side] for side in (self.auto, self.dump)
        )
        script = [one.seconds for one in self.script]
        awake = [one.seconds - one.slept_seconds for one in self.script]
        whole = [call.seconds for call in self.auto]
        return [
            Figure.ratio("full restore, auto (base backup and WAL) ÷ disaster_recovery.sh", auto, script, 0.40),
            Figure("… acknowledged writes lost", self.lost, 0, shown=f"{self.lost} of {self.acknowledged:,} (auto)"),
            Figure.ratio("… the whole flow, with judging before and reporting after", whole, script),
            Figure.ratio("full restore, dump ÷ disaster_recovery.sh", dump, script, 0.65),
            Figure.ratio("… ÷ the script without its sleep 10", dump, awake),
            Figure.bytes("peak extra disk during the restore from a dump", [one.peak_bytes for one in self.growth]),
            Figure.bytes("WAL written by the restore from a dump", [one.wal_bytes for one in self.growth]),
        ]


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]
