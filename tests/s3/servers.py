"""Real S3 servers on loopback: JuiceFS's MinIO gateway checks signatures and MD5s; moto has versions, locks, encryption.

    def test_it(gateway: S3Server) -> None:      # one for the whole test process
        bucket = gateway.bucket()                # blocks.s3.Bucket, created, of a name of its own

They end with the process that started them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from blocks.s3 import Bucket
from runbook.errors import Unreachable
from runbook.wait import until
from tests.fixtures.servers import free_port

ACCESS_KEY, SECRET_KEY = "backup-writer", "s3/Secret+Key-4713"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class S3Server:
    """A server that answers on `port`, with its files below `root`."""

    port: int
    root: Path
    has_locks: bool

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bucket(self, prefix: str = "grc", *, locked: bool = False, endpoint: str = "", **fields: Any) -> Bucket:
        """A new bucket; `endpoint`: a proxy's, before this server."""
        fields = {"access_key": ACCESS_KEY, "secret_key": SecretStr(SECRET_KEY), "patience_seconds": 10.0, **fields}
        name = f"test-{uuid.uuid4().hex[:12]}"
        direct = Bucket(name, prefix, self.endpoint, access_key=ACCESS_KEY, secret_key=SecretStr(SECRET_KEY))
        direct.client().create_bucket(Bucket=name, ObjectLockEnabledForBucket=locked)
        return Bucket(name, prefix, endpoint or self.endpoint, **fields)

    def flip_stored_byte(self, content: bytes) -> None:
        """Change one byte where the gateway keeps what contains `content`, behind its back."""
        for path in (Path(base, name) for base, _, names in os.walk(self.root / "data") for name in names):
            try:
                stored = path.read_bytes()
            except FileNotFoundError:  # the gateway removes what was deleted when it has time
                continue
            if (at := stored.find(content)) >= 0:
                path.write_bytes(stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :])
                return
        raise AssertionError("the gateway keeps no such content")


@contextlib.contextmanager
def running_gateway() -> Iterator[S3Server]:
    """JuiceFS's gateway (MinIO's code before a directory)."""
    root = Path(tempfile.mkdtemp(prefix="ops-s3-"))
    meta, port = f"sqlite3://{root}/meta.db", free_port()
    juicefs = str(BIN / "juicefs")
    created = [juicefs, "format", "--storage", "file", "--bucket", f"{root}/data/", "--trash-days", "0", meta, "vol"]
    subprocess.run(created, check=True, capture_output=True, timeout=300)
    options = ["--no-usage-report", "--multi-buckets", "--keep-etag", "--object-tag", "--object-meta"]
    places = ["--metrics", "127.0.0.1:0", "--cache-dir", f"{root}/cache", "--cache-size", "0"]
    secrets = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY, "HOME": str(root)}
    with _running([juicefs, "gateway", *options, *places, meta, f"127.0.0.1:{port}"], secrets, port, root):
        yield S3Server(port, root, has_locks=False)


@contextlib.contextmanager
def running_moto() -> Iterator[S3Server]:
    """moto's server."""
    root, port = Path(tempfile.mkdtemp(prefix="ops-moto-")), free_port()
    with _running([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], {}, port, root):
        yield S3Server(port, root, has_locks=True)


@pytest.fixture(scope="session")
def gateway() -> Iterator[S3Server]:
    """Checks signatures and MD5s."""
    with running_gateway() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """Has versions, object lock and encryption."""
    with running_moto() as server:
        yield server


@contextlib.contextmanager
def _running(argv: list[str], variables: Mapping[str, str], port: int, root: Path) -> Iterator[None]:
    setpriv = shutil.which("setpriv")
    command = [setpriv, "--pdeathsig", "TERM", *argv] if setpriv else argv
    log = root / "server.log"
    with log.open("wb") as output:
        path = f"{BIN}:/usr/bin:/bin"
        process = subprocess.Popen(command, env={"PATH": path, **variables}, stdout=output, stderr=output, cwd=root)

    def answers() -> bool:
        assert process.poll() is None, f"{argv[0]} ended:\n{log.read_text()[-3000:]}"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/").status_code > 0
        except httpx.TransportError as error:
            raise Unreachable(str(error)) from None

    try:
        until(answers, what=argv[0], seconds=120)
        yield
    finally:
        process.terminate()
        process.wait(120)
        shutil.rmtree(root, ignore_errors=True)
