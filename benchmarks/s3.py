"""The bench's environment with a bucket of the tests' S3 gateway as its second set of stores."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.place import Place, variables
from tests.s3.servers import ACCESS_KEY, SECRET_KEY, S3Server

KINDS = ("postgres", "redis", "files")


@contextmanager
def copies_on(server: S3Server, directory: Path) -> Iterator[None]:
    """While the block runs: a new bucket of that server, for flows that are called directly (Prefect's blocks say what
    was registered). The changed TOML is kept in `directory`."""
    bucket = server.bucket()
    text = Path(os.environ["OPS_ENVIRONMENT_FILE"]).read_text(encoding="utf-8")
    changed = directory / "bench-s3.toml"
    changed.write_text(with_copies(text, f"s3://{bucket.bucket}/{bucket.prefix}", server.endpoint), encoding="utf-8")
    with variables(OPS_ENVIRONMENT_FILE=str(changed), OPS_BENCH_S3_SECRET=SECRET_KEY):
        yield


def with_copies(text: str, place: str, endpoint: str) -> str:
    """An environment's TOML with another `[copies]`, of which `OPS_BENCH_S3_SECRET` is the secret key."""
    lines = [f'{kind} = "{place}/{kind}"' for kind in KINDS]
    lines += [f'endpoint = "{endpoint}"', 'region = "us-east-1"', f'access_key = "{ACCESS_KEY}"']
    section = "\n".join(["[copies]", *lines, 'secret_key_env = "OPS_BENCH_S3_SECRET"', ""])
    return re.sub(r"\[copies\]\n(?:.+\n)+", section, text)


def keep_newest(place: Place) -> Path:
    """The newest backup of the database, which stays alone in the store: it is what is sent."""
    *older, newest = sorted(Path(place.status["stores"]["postgres"]).glob("backup_*"))
    for path in older:
        shutil.rmtree(path)
    return newest
