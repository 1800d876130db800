"""What the recovery chapter adds (§8): base backups, a point in time, the replay of WAL, failovers of the database.

The points in time are measured on the bench lab, against the manual's script and against `cp`; the failovers on
clusters of their own under writing clients, new in each round.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.figures import Figure
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, NAME, Called, Place, wait_quiet
from benchmarks.recovery import drill, failover, pgbackrest, s3
from benchmarks.recovery.estimate import EstimateChapter
from runbook import shell
from runbook.units import size

ROUNDS = 2
BACKUP = "flows.database.base_backup:backup_cluster"
POINT = "flows.recovery.point.restore:restore_to_point"
REJOIN = "flows.recovery.postgres.failover:rejoin_standby"
WAL_BYTES = 1 << 30
# One row of a hundred, all over the pages.
ONE_PERCENT = (
    "UPDATE public.interview_messages SET id = id WHERE hashtext(id::text) % 100 = 0",
    "UPDATE public.audit_events SET id = id WHERE hashtext(id::text) % 100 = 0",
)
REWRITE = "UPDATE public.interview_messages SET id = id"
LSN = "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"


@dataclass(frozen=True)
class RecoveryChapter:
    """The measurements; each returns its lines of the table."""

    place: Place
    peers: Peers
    rows: Mapping[str, int]

    def figures(self) -> Iterator[Figure]:
        """All of them, as they are measured: what fails later loses none. The backups are what the points in time start
        from; the drill leaves the other server as the primary, so it comes last."""
        place, rows = self.place, self.rows
        whole = int(place.sql(f"SELECT pg_database_size('{DATABASE}')")[0][0]) >> 20
        yield from self.base_backups()
        yield from self.points()
        yield from self.replay()
        yield from s3.figures(place, self.peers, rows)
        yield from self.estimates()
        yield from pgbackrest.figures(place.tell, whole)
        yield from failover.figures(place.tell)
        yield from drill.figures(place)

    def estimates(self) -> list[Figure]:
        """How long a recovery would take, against how long it takes."""
        return EstimateChapter(self.place, self.peers, self.rows).figures()

    def base_backups(self) -> list[Figure]:
        """Full, and incremental after an update of one row in a hundred."""
        full: list[Called] = []
        incremental: list[Called] = []
        for number in range(ROUNDS):
            self.place.settle(self.rows)
            full.append(self.place.call(BACKUP, kind="full"))
            for statement in ONE_PERCENT:
                self.place.sql(statement, DATABASE)
            incremental.append(self.place.call(BACKUP, kind="incremental"))
            self.place.tell(
                f"base backup {number + 1}: full {full[-1].seconds:.1f} s, incremental {incremental[-1].seconds:.1f} s"
            )
        return [
            Figure.ratio(
                "incremental base backup after 1 % updates ÷ full",
                [one.seconds for one in incremental],
                [one.seconds for one in full],
            ),
            Figure.ratio(
                "… their copying and verification alone (take_base)",
                [one.step("take_base") for one in incremental],
                [one.step("take_base") for one in full],
                0.15,
            ),
        ]

    def points(self) -> list[Figure]:
        """To the transaction before a bug, whole cluster, against the manual's script and against cp of its files."""
        ours: list[Called] = []
        script, copied = [], []
        for number in range(ROUNDS):
            self.place.settle(self.rows)
            self.place.call(BACKUP, kind="full")
            xid = self.bug()
            wait_quiet()
            ours.append(self.place.call(POINT, by="before_transaction", target=str(xid), confirm=NAME))
            self.place.call(REJOIN, confirm=NAME)  # both sides have a standby
            self.place.settle(self.rows)
            copied.append(self.copy())
            script.append(self.peers.recover().seconds)
            self.place.tell(
                f"point in time {number + 1}: ours {ours[-1].seconds:.1f} s, script {script[-1]:.1f} s, "
                f"cp {copied[-1]:.1f} s"
            )
        whole = [one.seconds for one in ours]
        outage = [one.from_to("stop_services", "start_services") for one in ours]
        return [
            Figure.ratio("restore to a point in time, the whole flow ÷ disaster_recovery.sh", whole, script, 0.35),
            Figure.ratio("… its outage, from stop to start of the services ÷ disaster_recovery.sh", outage, script),
            Figure.ratio(
                "… building the copy (build_instance) ÷ cp of the same bytes",
                [one.step("build_instance") for one in ours],
                copied,
            ),
        ]

    def bug(self) -> int:
        """A transaction that rewrites a row; its number."""
        self.place.sql("SELECT pg_switch_wal()")
        found = self.place.sql(
            "WITH gone AS (UPDATE public.users SET id = id WHERE id = (SELECT min(id) FROM public.users)"
            " RETURNING 1) SELECT pg_current_xact_id()::xid::text::bigint FROM gone",
            DATABASE,
        )
        return int(found[0][0])

    def copy(self) -> float:
        """`cp -a` of the live data directory, beside it; its seconds."""
        data = Path(self.place.status["postgres"]["data"])
        beside = data.with_name("copied")
        try:
            return shell.run(["cp", "-a", data, beside]).seconds
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def replay(self) -> list[Figure]:
        """A gigabyte of WAL after the base backup: what the archiver needs for it, and its replay."""
        self.place.settle(self.rows)
        self.place.call(BACKUP, kind="full")
        began, before = int(self.place.sql(LSN)[0][0]), load.archiver_seconds(self.place)
        while (written := int(self.place.sql(LSN)[0][0]) - began) < WAL_BYTES:
            self.place.sql(REWRITE, DATABASE)
        archiver = load.archiver_seconds(self.place, until_idle=True) - before
        called = self.place.call(POINT, by="latest", confirm=NAME)
        seconds = called.step("wait_recovered")
        self.place.tell(f"replay: {size(written)} of WAL in {seconds:.1f} s")
        self.place.call(REJOIN, confirm=NAME)
        return [
            Figure(
                "the archiver's processor seconds per GB of WAL, two destinations",
                archiver / (written / 1e9),
                6.0,
                unit="s",
            ),
            Figure(
                f"replay of {size(written)} of WAL (seconds per 150 MB)",
                seconds / (written / 150e6),
                1.0,
                seconds,
                unit="s",
                shown=f"{size(written / max(seconds, 1e-9))} a second",
            ),
            Figure.seconds("… the whole restore with that WAL", [called.seconds]),
        ]
