"""What the database chapter adds (§1): a backup verified, tables vacuumed, indexes rebuilt, a backup sent to S3; each
against the tool that the manual, or anybody, would use for it."""

from __future__ import annotations

import os
import re
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, NAME, Called, Place
from lab.layout import CHECKOUT
from runbook import shell
from tests.s3.servers import ACCESS_KEY, SECRET_KEY, S3Server, running_gateway

ROUNDS = 2
OVERHEAD_SECONDS = 3.0
VERIFY = "flows.database.backup:verify_backup"
VACUUM = "flows.database.vacuum:vacuum_database"
REINDEX = "flows.database.indexes:rebuild_indexes"
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
        for number in range(ROUNDS):
            self.place.settle(self.rows)
            ours.append(self.place.call(VERIFY))
            self.place.settle(self.rows)
            peer.append(self.peers.restore())
            self.place.tell(f"verify {number + 1}: ours {ours[-1].seconds:.1f} s, pg_restore {peer[-1]:.1f} s")
        filling = [call.step("fill_scratch") for call in ours]
        return [
            Figure.ratio("verify_backup ÷ pg_restore -v", [call.seconds for call in ours], peer, 0.6),
            Figure.ratio("… its restoring alone", filling, peer),
        ]

    def upkeep(self) -> list[Figure]:
        """Seconds beyond those of the programs for it."""
        sides: tuple[tuple[str, str, dict[str, Any], list[str]], ...] = (
            ("vacuum_database", VACUUM, {"mode": "plain_analyze", "jobs": 2}, ["vacuumdb", "--analyze", "-j2"]),
            (
                "rebuild_indexes",
                REINDEX,
                {"everything": True, "jobs": 2, "confirm": NAME},
                ["reindexdb", "--concurrently", "-j2"],
            ),
        )
        found = []
        for name, flow, parameters, program in sides:
            ours, peer = [], []
            for number in range(ROUNDS):
                self.place.settle(self.rows)
                ours.append(self.place.call(flow, **parameters).seconds)
                self.place.settle(self.rows)
                peer.append(self.peers.run([*program, "-d", DATABASE]))
                self.place.tell(f"{name} {number + 1}: ours {ours[-1]:.1f} s, {program[0]} {peer[-1]:.1f} s")
            mine, other = statistics.median(ours), statistics.median(peer)
            what = f"{name} − {' '.join(program)}"
            found.append(Figure(what, mine - other, OVERHEAD_SECONDS, mine, other, unit="s"))
        return found

    def s3(self) -> list[Figure]:
        """The step that sends a backup, against `aws s3 cp` of the same files to the same server."""
        _install_aws()
        ours, peer = [], []
        with running_gateway() as server:
            for number in range(ROUNDS):
                ours.append(self._replicate(server))
                peer.append(self._copy(server))
                self.place.tell(f"S3 {number + 1}: ours {ours[-1]:.1f} s, aws s3 cp {peer[-1]:.1f} s")
        # At least 0.8 of its speed is at most 1.25 of its time.
        return [Figure.ratio("S3 upload ÷ aws s3 cp (0.8 × its speed is 1.25)", ours, peer, 1.25)]

    def _replicate(self, server: S3Server) -> float:
        bucket = server.bucket()
        text = Path(os.environ["OPS_ENVIRONMENT_FILE"]).read_text(encoding="utf-8")
        place = f"s3://{bucket.bucket}/{bucket.prefix}"
        lines = [f'{kind} = "{place}/{kind}"' for kind in ("postgres", "redis", "files")]
        lines += [f'endpoint = "{server.endpoint}"', 'region = "us-east-1"', f'access_key = "{ACCESS_KEY}"']
        section = "\n".join(["[copies]", *lines, 'secret_key_env = "OPS_BENCH_S3_SECRET"', ""])
        changed = self.peers.directory / "bench-s3.toml"
        changed.write_text(re.sub(r"\[copies\]\n(?:.+\n)+", section, text), encoding="utf-8")
        kept = {"OPS_ENVIRONMENT_FILE": os.environ["OPS_ENVIRONMENT_FILE"]}
        os.environ.update(OPS_ENVIRONMENT_FILE=str(changed), OPS_BENCH_S3_SECRET=SECRET_KEY)
        try:
            called = self.place.call(REPLICATE, direct=True, kind="postgres")
        finally:
            os.environ.update(kept)
        return called.step("copy_backup")

    def _copy(self, server: S3Server) -> float:
        bucket = server.bucket()
        stored = sorted(Path(self.place.status["stores"]["postgres"]).glob("backup_*"))
        environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        argv: list[str | Path] = [
            AWS / "bin" / "aws",
            "--endpoint-url",
            server.endpoint,
            "s3",
            "cp",
            "--recursive",
            "--only-show-errors",
        ]
        copies = (shell.run([*argv, path, f"s3://{bucket.bucket}/{path.name}"], environment=environment)
                  for path in stored)  # fmt: skip
        return sum(copy.seconds for copy in copies)


def _install_aws() -> None:
    """In a virtual environment of its own: its versions of boto are not ours."""
    if (AWS / "bin" / "aws").exists():
        return
    shutil.rmtree(AWS, ignore_errors=True)
    uv = CHECKOUT / ".venv" / "tools" / "bin" / "uv"
    shell.run([uv, "venv", "--quiet", AWS])
    shell.run([uv, "pip", "install", "--quiet", "--python", AWS / "bin" / "python", AWSCLI])
