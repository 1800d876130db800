"""What the database chapter adds (§1): a backup verified, tables vacuumed, indexes rebuilt, a backup sent to S3; each
against the tool that the manual, or anybody, would use for it."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.figures import Figure
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, NAME, Called, Place, wait_quiet
from benchmarks.s3 import copies_on, keep_newest
from lab.state.base import CHECKOUT
from runbook import shell
from runbook.errors import OpsError
from tests.s3.servers import ACCESS_KEY, SECRET_KEY, S3Server, running_gateway

ROUNDS = 2
S3_ROUNDS = 3
S3_BAR = 1.0
OVERHEAD_SECONDS = 2.0
VERIFY = "flows.database.backup:verify_backup"
VACUUM = "flows.database.upkeep.vacuum:vacuum_database"
REINDEX = "flows.database.upkeep.indexes:rebuild_indexes"
REPLICATE = "flows.database.copies:replicate_backups"
AWS = CHECKOUT / ".venv" / "awscli"
AWSCLI = "awscli==1.46.3"


@dataclass(frozen=True)
class Chapter:
    """The measurements; each returns its lines of the table."""

    place: Place
    peers: Peers
    rows: Mapping[str, int]

    def figures(self) -> list[Figure]:
        """All of them."""
        return [*self.verify(), *self.upkeep(), *self.s3()]

    def verify(self) -> list[Figure]:
        """Against `pg_restore` into another database, as the manual has it: which proves nothing."""
        ours: list[Called] = []
        peer = []
        written: list[int] = []
        for number in range(ROUNDS):
            self.place.settle(self.rows)
            with load.disk_growth(self.place) as grown:
                ours.append(self.place.call(VERIFY))
            written.append(grown.wal_bytes)
            self.place.settle(self.rows)
            peer.append(self.peers.restore())
            self.place.tell(f"verify {number + 1}: ours {ours[-1].seconds:.1f} s, pg_restore {peer[-1]:.1f} s")
        filling = [call.step("fill_scratch") for call in ours]
        return [
            Figure.ratio("verify_backup ÷ pg_restore -v", [call.seconds for call in ours], peer, 0.70),
            Figure.ratio("… its restoring alone", filling, peer),
            Figure.bytes("… WAL that it writes to production", written, 1 << 20),
        ]

    def upkeep(self) -> list[Figure]:
        """Seconds beyond those of the programs for it."""
        vacuum, vacuumdb = {"mode": "plain_analyze", "jobs": 2}, ["vacuumdb", "--analyze", "-j2"]
        reindex = {"everything": True, "jobs": 2, "confirm": NAME}
        return [
            self._against(VACUUM, vacuum, vacuumdb, dead=True),
            self._against(REINDEX, reindex, ["reindexdb", "--concurrently", "-j2"]),
        ]

    def _against(self, flow: str, parameters: dict[str, Any], program: list[str], *, dead: bool = False) -> Figure:
        """A flow and a program in turns; `dead`: dead rows are made before each, or both would find nothing to do."""
        name, made = flow.rpartition(":")[2], list[int]()
        ours, peer = [], []
        for number in range(ROUNDS):
            with self._settled(made, dead=dead):
                ours.append(self.place.call(flow, **parameters).seconds)
            with self._settled(made, dead=dead):
                peer.append(self.peers.run([*program, "-d", DATABASE]))
            self.place.tell(f"{name} {number + 1}: ours {ours[-1]:.1f} s, {program[0]} {peer[-1]:.1f} s")
        mine, other = statistics.median(ours), statistics.median(peer)
        rows = f" ({statistics.median(made):,.0f} dead rows each)" if dead else ""
        return Figure(f"{name} − {' '.join(program)}{rows}", mine - other, OVERHEAD_SECONDS, mine, other, unit="s")

    @contextmanager
    def _settled(self, made: list[int], *, dead: bool) -> Iterator[None]:
        """The same start, and with `dead` the same dead rows, for the block, which has to remove them.

        Raises:
            OpsError: there were none, or they are still there: no vacuum was measured.
        """
        self.place.settle(self.rows)
        if dead:
            made.append(self.place.make_dead_rows())
        yield
        if dead and not self.place.dead_rows() < made[-1] / 10:
            raise OpsError(f"{self.place.dead_rows()} of {made[-1]} dead rows are left", "look for old transactions")

    def s3(self) -> list[Figure]:
        """A backup sent to a gateway of its own each time: by `replicate_backups`, and by `aws s3 cp`."""
        _install_aws()
        stored = keep_newest(self.place)
        megabytes = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file()) / 1e6
        ours: list[Called] = []
        peer, starting = [], []
        for number in range(S3_ROUNDS):
            with running_gateway() as server:
                wait_quiet()
                ours.append(self._replicate(server))
            with running_gateway() as server:
                wait_quiet()
                peer.append(self._copy(server, stored))
            starting.append(shell.run([AWS / "bin" / "aws", "--version"]).seconds)
            self.place.tell(
                f"S3 {number + 1}: ours {ours[-1].step('copy_backup'):.1f} s of {ours[-1].seconds:.1f} s, "
                f"aws s3 cp {peer[-1]:.1f} s"
            )
        return s3_figures(ours, peer, starting, megabytes)

    def _replicate(self, server: S3Server) -> Called:
        with copies_on(server, self.peers.directory):
            return self.place.call(REPLICATE, direct=True, kind="postgres")

    def _copy(self, server: S3Server, stored: Path) -> float:
        bucket = server.bucket()
        environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        options = ["--endpoint-url", server.endpoint, "s3", "cp", "--recursive", "--only-show-errors"]
        argv: list[str | Path] = [AWS / "bin" / "aws", *options, stored, f"s3://{bucket.bucket}/{stored.name}"]
        return shell.run(argv, environment=environment).seconds


def s3_figures(
    ours: Sequence[Called], peer: Sequence[float], starting: Sequence[float], megabytes: float
) -> list[Figure]:
    """Our seconds are those of a flow whose modules are imported; so the program's start-up is taken off in the line
    that is stricter for us, and both lines have the bar."""
    start = statistics.median(starting)
    sent = [call.step("copy_backup") for call in ours]
    copied = [seconds - start for seconds in peer]
    return [
        Figure.ratio(
            f"S3: copy_backup, the step of replicate_backups that hashes and sends a backup of "
            f"{megabytes:.0f} MB ÷ aws s3 cp --recursive",
            sent,
            peer,
            S3_BAR,
        ),
        Figure.ratio(f"… ÷ aws s3 cp without its start-up (aws --version: {start:.2f} s)", sent, copied, S3_BAR),
        Figure.ratio(
            "… the whole replicate_backups: comparing stores, sending, reading all back by SHA-256, "
            "reporting ÷ aws s3 cp, which only sends",
            [call.seconds for call in ours],
            peer,
        ),
        Figure.seconds("… of that, reading back (prove_copy)", [call.step("prove_copy") for call in ours]),
    ]


def _install_aws() -> None:
    """In a virtual environment of its own: its versions of boto are not ours."""
    if (AWS / "bin" / "aws").exists():
        return
    shutil.rmtree(AWS, ignore_errors=True)
    uv = CHECKOUT / ".venv" / "tools" / "bin" / "uv"
    shell.run([uv, "venv", "--quiet", AWS])
    shell.run([uv, "pip", "install", "--quiet", "--python", AWS / "bin" / "python", AWSCLI])
