"""Where backups are in these tests: directories and real S3 servers, in either set of stores; and runs killed there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pyrage import x25519

from blocks.environment import Stores
from blocks.s3 import Bucket
from tasks.backups import catalogue
from tasks.stores.store import store_of
from tests.database.conftest import ESCROWED, NAME, OPERATIONS, Trial
from tests.fixtures import forked
from tests.fixtures.servers import PATIENT
from tests.s3.servers import ACCESS_KEY


def configure(trial: Trial, section: str, **values: object) -> None:
    """Add keys to a section of the environment's TOML, or the section; a key that is there is replaced."""
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    text = path.read_text()
    if f"[{section}]" not in text:
        text += f"\n[{section}]\n"
    head, _, rest = text.partition(f"[{section}]\n")
    kept = [line for line in rest.splitlines() if line.split(" = ")[0] not in values]
    added = [f"{key} = {value!r}".replace("'", '"') for key, value in values.items()]
    path.write_text(f"{head}[{section}]\n" + "\n".join([*added, *kept]) + "\n")


def in_bucket(trial: Trial, bucket: Bucket, section: str = "backups", **more: object) -> None:
    place = f"s3://{bucket.bucket}/{bucket.prefix}"
    configure(
        trial,
        section,
        postgres=f"{place}/postgresql",
        redis=f"{place}/redis",
        files=f"{place}/files",
        spool=str(trial.reports.parent / "spool"),
        endpoint=bucket.endpoint,
        access_key=ACCESS_KEY,
        secret_key_env="TRIAL_S3_SECRET",
        region="us-east-1",
        patience_seconds=2,
        **more,
    )


def names(trial: Trial, which: Stores = "backups") -> list[str]:
    return catalogue.names(store_of(trial.environment, "postgres", which), "postgres")


def spool_of(trial: Trial, which: Stores = "backups") -> Path:
    return trial.reports.parent / "spool" / NAME / which / "postgres"


def spooled(trial: Trial, which: Stores = "backups") -> list[str]:
    spool = spool_of(trial, which)
    return sorted(path.name for path in spool.iterdir()) if spool.exists() else []


def killed(point: str, flow: str = "flows.database.backup.backup_database") -> None:
    module, _, name = flow.rpartition(".")
    code = f"{PATIENT}from {module} import {name}; {name}.fn({NAME!r})"
    environment = {**os.environ, "OPS_FAILPOINT": point}
    done = forked.run(["-c", code], environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def encrypted(trial: Trial, *recipients: x25519.Identity) -> None:
    keys = [str(key.to_public()) for key in recipients or (OPERATIONS, ESCROWED)]
    configure(trial, "backups", recipients=keys, identity_env="TRIAL_IDENTITY")
