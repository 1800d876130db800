"""Objects to files: parallel ranges, continued after a cut connection, proven by their SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from blocks.s3 import Bucket
from runbook.errors import OTHER_BACKUPS, OpsError, VerificationFailed
from runbook.files import durable
from tasks.s3.requests import RequestRefused, attempt
from tasks.s3.writing import head, unreadable

RANGE_BYTES = 2 * 1024 * 1024
WORKERS = 8
PART = ".part"
OTHER = f"where the bucket is versioned, its version before may be whole; {OTHER_BACKUPS}"


def _untold(_: int) -> None:
    """Nobody wants to know."""


def download_file(
    bucket: Bucket,
    key: str,
    target: Path,
    sha256: str,
    bytes_: int,
    *,
    workers: int = WORKERS,
    tell: Callable[[int], None] = _untold,
) -> None:
    """Make the file `target` of an object. `tell` gets the bytes that are newly there.

    Until it is whole and proven it is called `<target>.part`; launched again, that is gone on with.

    Raises:
        VerificationFailed: the object is not there, or is not what `sha256` and `bytes_` say.
        Unreachable: the server is away, longer than the bucket's `patience_seconds`; what came stays in the `.part`.
        OpsError: it refuses, or the file cannot be written.
    """
    part = target.with_name(target.name + PART)
    etag = _expected(bucket, key, bytes_)
    try:
        there = part.stat().st_size if part.is_file() else 0
        resumed = 0 < there <= bytes_
        _write(bucket, key, etag, part, there if resumed else 0, bytes_, workers, tell)
        if resumed and _sum(part) != sha256:  # what an earlier attempt left may be of another object
            _write(bucket, key, etag, part, 0, bytes_, workers, _untold)
        if _sum(part) != sha256:
            part.unlink()
            raise _altered(bucket, key, "its SHA-256 is not the manifest's")
        part.replace(target)
        durable.sync(target.parent)
    except OSError as error:
        raise unreadable(part, error) from None


def verify_object(
    bucket: Bucket, key: str, sha256: str, bytes_: int, *, workers: int = WORKERS, tell: Callable[[int], None] = _untold
) -> None:
    """Read an object to its end and compare it, keeping nothing.

    Raises:
        VerificationFailed: it is not there, or is not what `sha256` and `bytes_` say.
        Unreachable, OpsError: as `download_file`.
    """
    whole = hashlib.sha256()
    for content in _ranges(bucket, key, _expected(bucket, key, bytes_), 0, bytes_, workers):
        whole.update(content)
        tell(len(content))
    if whole.hexdigest() != sha256:
        raise _altered(bucket, key, "its SHA-256 is not the manifest's")


def _expected(bucket: Bucket, key: str, bytes_: int) -> str:
    """The ETag of an object of that size."""
    found = head(bucket, key)
    if found is None:
        raise VerificationFailed(f"{key} in {bucket.where} is not there", OTHER)
    if found["ContentLength"] != bytes_:
        raise _altered(bucket, key, f"it has {found['ContentLength']} bytes, not {bytes_}")
    return str(found["ETag"])


def _write(
    bucket: Bucket, key: str, etag: str, part: Path, start: int, end: int, workers: int, tell: Callable[[int], None]
) -> None:
    """Bring the file to `end` bytes, keeping the first `start`. It grows in order: its size says what is there."""
    with part.open("r+b" if start else "wb") as file:
        part.chmod(0o600)
        file.seek(start)
        tell(start)
        for content in _ranges(bucket, key, etag, start, end, workers):
            file.write(content)
            file.flush()
            tell(len(content))
        os.fsync(file.fileno())


def _ranges(bucket: Bucket, key: str, etag: str, start: int, end: int, workers: int) -> Iterator[bytes | bytearray]:
    """An object's content from `start` on, in order."""
    coming: deque[Future[bytearray]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for first in range(start, end, RANGE_BYTES):
                last = min(first + RANGE_BYTES, end)
                coming.append(pool.submit(_range, bucket, key, etag, first, last))
                while len(coming) > (workers if last < end else 0):
                    yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _range(bucket: Bucket, key: str, etag: str, first: int, end: int) -> bytearray:
    """One range of an object, asked for again from where it stopped; `etag`: of the object that it must still be."""
    content = bytearray()

    def more() -> bool:
        answer = bucket.client().get_object(
            Bucket=bucket.bucket, Key=bucket.key(key), Range=f"bytes={first + len(content)}-{end - 1}", IfMatch=etag
        )
        if answer["ContentLength"] != end - first - len(content):
            answer["Body"].close()
            raise OpsError(f"{bucket.where} does not answer with the requested range", "use another server")
        for block in answer["Body"].iter_chunks(1024 * 1024):
            content.extend(block)
        return first + len(content) == end

    try:
        attempt(bucket, f"reading {key} from byte {first} on", more)
    except RequestRefused as error:
        if error.code in ("PreconditionFailed", "412", "NoSuchKey"):
            raise _altered(bucket, key, "it was replaced while it was read") from None
        raise
    return content


def _altered(bucket: Bucket, key: str, how: str) -> VerificationFailed:
    return VerificationFailed(f"{key} in {bucket.where} is not what was backed up: {how}", OTHER)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
