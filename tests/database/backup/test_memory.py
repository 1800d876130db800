"""A flow's memory stays flat, however large a backup is: the peak of a child process, as the kernel counted it.

What a flow needs by itself (Python, Prefect, boto3) is most of it; the bound is absolute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tasks.backups import manifest as manifests
from tasks.backups.manifest import Manifest
from tests.database.backup.test_backup import ROOT
from tests.database.conftest import NAME, Trial
from tests.database.places import in_bucket
from tests.fixtures.servers import PATIENT
from tests.s3.servers import S3Server

MEGABYTES = 250
MOST_BYTES = 300 * 1024 * 1024
CHILD = f"""{PATIENT}
import importlib, json, sys
from pathlib import Path

module, name, parameters = sys.argv[1:]
report = getattr(importlib.import_module(module), name).fn(**json.loads(parameters))
assert report.status in ("OK", "WARN"), report.sentence()
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def peak_bytes(flow: str, **parameters: object) -> int:
    """The most memory that the process of a flow had resident."""
    module, _, name = flow.rpartition(".")
    argv = [sys.executable, "-c", CHILD, module, name, json.dumps({"environment": NAME, **parameters})]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])


def seal(store: Path, megabytes: int) -> None:
    """A backup of one file that does not compress."""
    directory = store / "backup_20261125_020000"
    directory.mkdir(parents=True)
    block = os.urandom(1_000_000)
    with (directory / "base.dat").open("wb") as file:
        for number in range(megabytes):
            file.write(number.to_bytes(8, "big") + block[8:])
    sealed = Manifest(
        kind="postgres",
        name=directory.name,
        environment=NAME,
        taken=datetime.now(UTC),
        seconds=1.0,
        host="here",
        tool="by hand",
        files=manifests.sums_of(directory),
        content={},
    )
    manifests.write(directory, sealed)


def fill(trial: Trial, megabytes: int) -> None:
    """Rows of random bytes, of 1 MB each."""
    trial.sql("CREATE TABLE recordings (id int, body bytea)")
    trial.sql("ALTER TABLE recordings ALTER body SET STORAGE EXTERNAL")
    path = trial.server.root / "random"
    path.write_bytes(os.urandom(megabytes * 1_000_000))
    insert = f"INSERT INTO recordings SELECT g, pg_read_binary_file('{path}', g * 1000000::bigint, 1000000) "
    trial.sql(insert + f"FROM generate_series(0, {megabytes - 1}) g")
    path.unlink()


def test_replicating_a_large_backup(trial: Trial, gateway: S3Server) -> None:
    seal(trial.store, MEGABYTES)
    in_bucket(trial, gateway.bucket(), "copies")
    peak = peak_bytes("flows.database.copies.replicate_backups", kind="postgres")
    assert peak < MOST_BYTES, f"{peak / 1024 / 1024:.0f} MB"
    again = peak_bytes("flows.database.copies.replicate_backups", kind="postgres", read="all")
    assert again < MOST_BYTES, f"read back: {again / 1024 / 1024:.0f} MB"


def test_taking_and_verifying_a_large_backup_in_a_bucket(trial: Trial, gateway: S3Server) -> None:
    fill(trial, MEGABYTES)
    in_bucket(trial, gateway.bucket())
    for flow in ("backup_database", "verify_backup"):
        peak = peak_bytes(f"flows.database.backup.{flow}")
        assert peak < MOST_BYTES, f"{flow}: {peak / 1024 / 1024:.0f} MB"
