"""Memory stays flat: what a child process needs for a file of 300 MB, beyond what it needs to start."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.s3.servers import SECRET_KEY, S3Server

SIZE = 300 * 1024 * 1024
ALLOWED_BYTES = 120 * 1024 * 1024
CHILD = """
import sys
from pathlib import Path
from pydantic import SecretStr
from blocks.s3 import Bucket
from tasks.s3.download import download_file
from tasks.s3.upload import upload_file

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

what, name, endpoint, key, path, sha256, size = sys.argv[1:]
bucket = Bucket(name, "grc", endpoint, access_key=key, secret_key=SecretStr(sys.stdin.read()))
bucket.client()
before = peak()
if what == "upload":
    upload_file(bucket, Path(path), "a/base.tar", sha256, int(size))
else:
    download_file(bucket, "a/base.tar", Path(path), sha256, int(size))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "base.tar"
    block = os.urandom(1024 * 1024)
    with path.open("wb") as file:
        for number in range(SIZE // len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])
    return path


def test_memory(gateway: S3Server, source: Path, tmp_path: Path) -> None:
    """Sending and fetching: less than 120 MB more than at the start."""
    bucket = gateway.bucket()
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    for what, path in (("upload", source), ("download", tmp_path / "got")):
        argv = [what, bucket.bucket, bucket.endpoint, bucket.access_key, str(path), sha256, str(SIZE)]
        child = subprocess.run(
            [sys.executable, "-c", CHILD, *argv],
            input=SECRET_KEY,
            text=True,
            capture_output=True,
            cwd=Path(__file__).parents[2],
            timeout=900,
        )
        assert child.returncode == 0, child.stderr
        assert int(child.stdout) < ALLOWED_BYTES, f"{what}: {int(child.stdout) >> 20} MB"
    assert (tmp_path / "got").stat().st_size == SIZE
