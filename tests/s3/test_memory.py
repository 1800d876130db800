"""Memory stays flat: what a child process needs for a file of 300 MB, and for several at a time, beyond what it needs
to start."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocks.s3 import Bucket
from tests.s3.servers import SECRET_KEY, S3Server

SIZE, SMALLER = 300 * 1024 * 1024, 60 * 1024 * 1024
ALLOWED_BYTES, ALLOWED_FOR_SEVERAL = 120 * 1024 * 1024, 180 * 1024 * 1024
CHILD = """
import sys
from pathlib import Path
from pydantic import SecretStr
from blocks.s3 import Bucket
from tasks.s3.download import download_file
from tasks.s3.upload import upload_file, upload_files

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

what, name, endpoint, key, path, sha256, size = sys.argv[1:]
bucket = Bucket(name, "grc", endpoint, access_key=key, secret_key=SecretStr(sys.stdin.read()))
bucket.client()
before = peak()
if what == "upload":
    upload_file(bucket, Path(path), "a/base.tar", sha256, int(size))
elif what == "several":
    upload_files(bucket, [(Path(path), f"b/{number}", sha256, int(size)) for number in range(6)])
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
    bucket, sha256 = gateway.bucket(), _sum_of(source)
    for what, path in (("upload", source), ("download", tmp_path / "got")):
        assert _peak(bucket, what, path, sha256, SIZE) < ALLOWED_BYTES, what
    assert (tmp_path / "got").stat().st_size == SIZE


def test_several_files(gateway: S3Server, source: Path, tmp_path: Path) -> None:
    """Several large files at a time: less than 180 MB."""
    path = tmp_path / "smaller.tar"
    path.write_bytes(source.read_bytes()[:SMALLER])
    assert _peak(gateway.bucket(), "several", path, _sum_of(path), SMALLER) < ALLOWED_FOR_SEVERAL


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _peak(bucket: Bucket, what: str, path: Path, sha256: str, size: int) -> int:
    argv = [what, bucket.bucket, bucket.endpoint, bucket.access_key, str(path), sha256, str(size)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *argv],
        input=SECRET_KEY,
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        timeout=900,
    )
    assert child.returncode == 0, child.stderr
    return int(child.stdout)
