"""How the times grow: with ten times the data, and with five thousand tables. They are not a part of `make bench`,
which would take twice as long:

    python -m benchmarks --only growth --megabytes 10000
    python -m benchmarks --only tables
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from psycopg.conninfo import make_conninfo

from benchmarks.figures import Figure
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, NAME, Place
from blocks.environment import Environment
from flows.store import store_for
from lab.data.seed import seed
from tasks.backups import catalogue
from tasks.cluster.content import cluster_in
from tasks.postgres.restore.staged_copy import default_jobs
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.prune import find_old_wal
from tasks.wal.format.names import Timeline

TABLES = 5000
BAR = 1.1
DUMP_BAR, RESTORE_BAR = 2.0, 1.5
BACKUP = "flows.database.backup:backup_database"
VERIFY = "flows.database.backup:verify_backup"
RESTORE = "flows.database.restore:restore_database"
FULL_RESTORE = "flows.recovery.full_restore:full_restore"
BACKUP_CLUSTER = "flows.database.base_backup:backup_cluster"
REJOIN = "flows.recovery.postgres.failover:rejoin_standby"
FROM_DUMP: dict[str, Any] = {"method": "dump", "redis_source": "backup", "confirm": NAME}
MANY = """
DO $$ BEGIN
  CREATE SCHEMA many;
  FOR number IN 1..5000 LOOP
    EXECUTE format('CREATE TABLE many.t%s (id int PRIMARY KEY, words text)', number);
    EXECUTE format('INSERT INTO many.t%s SELECT n, md5(n::text) FROM generate_series(1, 20) AS n', number);
    IF number % 250 = 0 THEN COMMIT; END IF;
  END LOOP;
END $$
"""


@dataclass(frozen=True)
class GrowthChapter:
    """The measurements, on a lab whose database has a tenth of `megabytes`."""

    place: Place
    peers: Peers
    megabytes: int

    def figures(self) -> list[Figure]:
        """Seconds with ten times the data, against ten times the seconds.

        Raises:
            OpsError: a side failed.
        """
        small_bytes, small = self._bytes(), self._round()
        self.place.tell(f"growing to {self.megabytes} MB")
        dsn = make_conninfo(self.place.status["postgres"]["admin_dsn"], dbname=DATABASE)
        seed(dsn, self.megabytes - (small_bytes >> 20), progress=lambda _: None)
        times = self._bytes() / small_bytes
        self.place.call(BACKUP_CLUSTER, kind="full")
        large = self._round()
        return [
            Figure(
                f"{name}: {times:.1f} times the data ÷ {times:.1f} × the seconds",
                large[name] / (times * small[name]),
                BAR,
                large[name],
                small[name],
            )
            for name in small
        ]

    def _bytes(self) -> int:
        return int(self.place.sql(f"SELECT pg_database_size('{DATABASE}')")[0][0])

    def _round(self) -> dict[str, float]:
        """Each once: seconds."""
        rows, took = self.place.rows(), dict[str, float]()
        for flow in ("flows.redis.persistence:backup_redis", "flows.application.files:backup_files"):
            self.place.call(flow)
        for name, flow, parameters in (
            ("backup_database", BACKUP, {}),
            ("verify_backup", VERIFY, {}),
            ("backup_cluster", BACKUP_CLUSTER, {"kind": "full"}),
            ("full restore, auto", FULL_RESTORE, {"redis_source": "backup", "confirm": NAME}),
            ("full restore, dump", FULL_RESTORE, FROM_DUMP),
        ):
            self._keep_newest()
            self.place.settle(rows)
            called = self.place.call(flow, **parameters)
            restores = flow == FULL_RESTORE
            took[name] = called.from_to("stop_services", "smoke_check") if restores else called.seconds
            self.place.tell(f"{name}: {took[name]:.1f} s")
            if name == "full restore, auto":
                self.place.call(REJOIN, confirm=NAME)
        return took

    def _keep_newest(self) -> None:
        """Delete all backups but the newest of each kind, and the archived WAL that this one does not need: the disk is
        for ten times the data."""
        env = Environment.find(NAME)
        for kind in ("postgres", "cluster"):
            store = store_for(env, kind)
            for name in catalogue.names(store, kind)[:-1]:
                shutil.rmtree(store.local(name) or store.spool / name)
        if not (found := catalogue.names(store, "cluster")):
            return
        base = catalogue.open_backup(store, found[-1])
        system = cluster_in(base).system
        for which in ("backups", "copies"):
            archive = archive_of(env, which, system)
            doomed = find_old_wal.work(archive, system, [base], timedelta(), Timeline(1)).doomed
            archive.note_pruned(doomed, 1)  # or the archiver would store again what the receiver still has
            archive.remove(doomed)

    def tables(self) -> list[Figure]:
        """A database with five thousand more tables, against pg_dump and pg_restore of the same.

        Raises:
            OpsError: a side failed.
        """
        self.place.sql(MANY, DATABASE)
        self.place.settle(self.place.rows())
        jobs, target, other = str(default_jobs()), self.peers.directory / "many", f"{DATABASE}_many"
        shutil.rmtree(target, ignore_errors=True)
        self.peers.directory.mkdir(exist_ok=True)
        ours = self.place.call(BACKUP).seconds
        peer = self.peers.run(["pg_dump", "-d", DATABASE, "-Fd", "-j", jobs, "-f", str(target)])
        self.place.tell(f"{TABLES} tables: backup {ours:.1f} s, pg_dump {peer:.1f} s")
        restored = self.place.call(RESTORE, confirm=NAME).seconds
        self.place.sql(f"CREATE DATABASE {other} TEMPLATE template0")
        loaded = self.peers.run(["pg_restore", "-d", other, "-j", jobs, str(target)])
        self.place.sql(f"DROP DATABASE {other} WITH (FORCE)")
        self.place.tell(f"{TABLES} tables: restore {restored:.1f} s, pg_restore {loaded:.1f} s")
        what = f"with {TABLES:,} more tables"
        return [
            Figure.ratio(f"backup_database {what} ÷ pg_dump -Fd -j{jobs}", [ours], [peer], DUMP_BAR),
            Figure.ratio(f"restore_database {what} ÷ pg_restore -j{jobs}", [restored], [loaded], RESTORE_BAR),
        ]
