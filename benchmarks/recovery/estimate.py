"""The estimate of the RTO (check-recovery-objectives, show-recovery-options) against a restore that is really measured.

Its samples are verified restores of the same application's database at a tenth and at three tenths of the size, as
weekly runs of verify-backup leave them while a system grows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import make_conninfo

from benchmarks.figures import Figure
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, NAME, TABLES, Called, Place, variables, wait_quiet
from blocks.config import toml
from lab.data.seed import seed
from tasks.recovery_points.estimate import DurationSample, estimate, from_private

SMALL_ROUNDS = 3
SHARES = (0.1, 0.3)
SMALL = "grc_small"
BAR = 0.25
BACKUP = "flows.database.backup:backup_database"
VERIFY = "flows.database.backup:verify_backup"
RESTORE = "flows.database.restore:restore_database"


@dataclass(frozen=True)
class EstimateChapter:
    """The measurements; each returns its lines of the table."""

    place: Place
    peers: Peers
    rows: Mapping[str, int]

    def figures(self) -> list[Figure]:
        """Of a verification, and of a restore that becomes live. Both are told of the same samples.

        Raises:
            OpsError: a side failed.
        """
        whole = int(self.place.sql(f"SELECT pg_database_size('{DATABASE}')")[0][0]) >> 20
        small = [one for share in SHARES for one in self.restored(max(int(whole * share), 1))]
        self.place.call(BACKUP, direct=True)
        return [
            self._against(small, VERIFY, "verify_backup"),
            self._against(from_private(small), RESTORE, "restore_database", confirm=NAME),
        ]

    def restored(self, megabytes: int) -> list[DurationSample]:
        """Verified restores of a backup of a database of that size, on the same server."""
        with self._database(megabytes):
            self.place.call(BACKUP, direct=True)
            found = [self._verified() for _ in range(SMALL_ROUNDS)]
        told = ", ".join(f"{one.seconds:.1f} s" for one in found)
        self.place.tell(f"estimate: {megabytes} MB of database verified in {told}")
        return found

    def _verified(self) -> DurationSample:
        wait_quiet()
        return _sample(self.place.call(VERIFY, direct=True))

    def _against(self, samples: list[DurationSample], flow: str, name: str, **parameters: object) -> Figure:
        self.place.settle(self.rows)
        found = _sample(self.place.call(flow, direct=True, **parameters))
        expected = estimate(samples, found.bytes)
        assert expected
        real = found.seconds
        off = expected.seconds / real - 1
        self.place.tell(f"estimate of {name}: {expected.seconds:.1f} s, measured {real:.1f} s")
        return Figure(
            f"estimate of the RTO from restores of 10 % and 30 % of the size, off {name}'s measured seconds",
            abs(off),
            BAR,
            expected.seconds,
            real,
            shown=f"{off:+.0%}",
        )

    @contextmanager
    def _database(self, megabytes: int) -> Iterator[None]:
        """The application's tables with that much data, in a database of their own beside the live one; the
        environment of flows that are called directly is that database, with stores and reports of its own."""
        kept = self.peers.directory / f"{SMALL}_{megabytes}"
        kept.mkdir(exist_ok=True)
        text = Path(os.environ["OPS_ENVIRONMENT_FILE"]).read_text(encoding="utf-8")
        file = kept / "environment.toml"
        suites = str(toml.environment(NAME).suites)
        file.write_text(smaller(text, kept, suites), encoding="utf-8")
        self._create(megabytes, kept / "schema.dump")
        try:
            with variables(OPS_ENVIRONMENT_FILE=str(file)):
                yield
        finally:
            self.place.sql(f"DROP DATABASE {SMALL} WITH (FORCE)")

    def _create(self, megabytes: int, schema: Path) -> None:
        self.place.sql(f"DROP DATABASE IF EXISTS {SMALL} WITH (FORCE)")
        self.place.sql(f"CREATE DATABASE {SMALL} OWNER grc_user TEMPLATE template0")
        empty = [f"--exclude-table-data=public.{table}*" for table in TABLES]  # and of their partitions
        self.peers.run(["pg_dump", "-d", DATABASE, "-F", "c", *empty, "-f", str(schema)])
        self.peers.run(["pg_restore", "-d", SMALL, str(schema)])
        seed(
            make_conninfo(self.place.status["postgres"]["admin_dsn"], dbname=SMALL), megabytes, progress=lambda _: None
        )
        self.place.sql("VACUUM (ANALYZE)", SMALL)
        self.place.sql("CHECKPOINT")


def smaller(text: str, kept: Path, suites: str) -> str:
    """The bench's TOML with another database on the same servers, its backups and reports below `kept`. The directory
    of the suites, relative in it, is `suites`."""
    text = text.replace(f'database = "{DATABASE}"', f'database = "{SMALL}"')
    text = re.sub(r"(?m)^reports = .*", f'reports = "{kept}/reports"', text)
    text = re.sub(r'(?m)^directory = ".*expectations/.*"', f'directory = "{suites}"', text)
    return re.sub(r'(?m)^postgres = ".*/var/backups/postgresql"', f'postgres = "{kept}/postgresql"', text, count=1)


def _sample(called: Called) -> DurationSample:
    """What the flow's own report measured, as the estimate reads it."""
    (measure,) = called.told()["measures"]
    return DurationSample(int(measure["bytes"]), float(measure["seconds"]))
