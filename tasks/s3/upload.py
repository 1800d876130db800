"""Files to objects: small ones in one request, large ones in parts; what is there already and equal is passed over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from blocks.s3 import Bucket
from runbook.errors import OpsError
from tasks.s3 import multipart
from tasks.s3.multipart import PART_BYTES, part_bytes
from tasks.s3.requests import attempt
from tasks.s3.writing import (
    SHA256,
    Upload,
    altered_here,
    head,
    proof_of,
    require_encrypted,
    require_etag,
    require_locked,
    same_etag,
    shortcomings,
    unreadable,
    written_with,
)

WORKERS = 8
EMPTY = hashlib.md5(b"", usedforsecurity=False).digest()


def _untold(_: int) -> None:
    """Nobody wants to know."""


def upload_file(
    bucket: Bucket,
    path: Path,
    key: str,
    sha256: str,
    bytes_: int,
    *,
    workers: int = WORKERS,
    tell: Callable[[int], None] = _untold,
) -> None:
    """Make the object `key` of a file. `tell` gets the bytes that are newly sent, or found there already.

    Launched again after an interruption it goes on with the parts that are there.

    Raises:
        VerificationFailed: the file is not what `sha256` and `bytes_` say, or the server kept something else.
        Unreachable: the server is away, longer than the bucket's `patience_seconds`.
        OpsError: it refuses, does not encrypt or lock as configured, or the file is not readable.
    """
    upload = Upload(path, key, sha256, bytes_)
    try:
        if _is_there(bucket, upload):
            tell(bytes_)
        elif bytes_ <= PART_BYTES:
            _put(bucket, upload)
            tell(bytes_)
        else:
            _send(bucket, upload, workers, tell)
    except OSError as error:
        raise unreadable(path, error) from None
    if bucket.locks:
        require_locked(bucket, key)


def upload_files(
    bucket: Bucket,
    items: Iterable[tuple[Path, str, str, int]],
    *,
    workers: int = WORKERS,
    tell: Callable[[int], None] = _untold,
) -> None:
    """Upload files, given as (path, key, SHA-256, bytes): small ones beside each other, then each large one in parallel
    parts. `tell` is called in the calling thread.

    Raises:
        as `upload_file`. What was sent until then is there, and passed over the next time.
    """
    uploads = [Upload(*item) for item in items]
    small = [upload for upload in uploads if upload.bytes <= PART_BYTES]
    with ThreadPoolExecutor(workers) as pool:
        try:
            for sending in [(pool.submit(upload_file, bucket, *upload), upload.bytes) for upload in small]:
                sending[0].result()
                tell(sending[1])
        finally:
            pool.shutdown(cancel_futures=True)
    for upload in uploads:
        if upload.bytes > PART_BYTES:
            upload_file(bucket, *upload, workers=workers, tell=tell)


def _put(bucket: Bucket, upload: Upload) -> None:
    content = upload.path.read_bytes()
    if len(content) != upload.bytes or hashlib.sha256(content).hexdigest() != upload.sha256:
        raise altered_here(upload)
    put(bucket, upload.key, content, upload.sha256, lock=True)


def put(bucket: Bucket, key: str, content: bytes, sha256: str, *, lock: bool) -> None:
    """One object in one request, replacing what is there.

    Raises:
        VerificationFailed: the server kept something else.
        OpsError: refused, or not encrypted as configured.
    """
    md5 = hashlib.md5(content, usedforsecurity=False).digest()
    request = partial(
        bucket.client().put_object,
        Bucket=bucket.bucket,
        Key=bucket.key(key),
        Body=content,
        **proof_of(bucket, md5),
        **written_with(bucket, sha256, lock=lock),
    )
    answer = attempt(bucket, f"writing {key}", request)
    require_encrypted(bucket, key, answer)
    require_etag(bucket, key, answer, md5.hex())


def _send(bucket: Bucket, upload: Upload, workers: int, tell: Callable[[int], None]) -> None:
    """A resumed upload has the metadata of the attempt that began it: where they are others', it is made anew."""
    if upload.path.stat().st_size != upload.bytes:
        raise altered_here(upload)
    resumed = multipart.send(bucket, upload, workers, tell, resume=True)
    if resumed and _problems(bucket, upload):
        multipart.send(bucket, upload, workers, _untold, resume=False)
    if problems := _problems(bucket, upload):
        raise OpsError(
            f"{upload.key} in {bucket.where} is written, and is {problems[0]}",
            "check the server and the policy (s3:GetObject), then run it again",
        )


def _problems(bucket: Bucket, upload: Upload) -> list[str]:
    found = head(bucket, upload.key)
    return shortcomings(bucket, upload, found) if found else ["not there"]


def _is_there(bucket: Bucket, upload: Upload) -> bool:
    """Whether the object is there and of this very file: by its metadata, and its ETag from the file as it is now."""
    found = head(bucket, upload.key)
    if found is None or SHA256 not in found.get("Metadata", {}) or shortcomings(bucket, upload, found):
        return False
    whole, sums, size = hashlib.sha256(), [], part_bytes(upload.bytes)
    with upload.path.open("rb", buffering=0) as file:
        for content in iter(partial(file.read, size), b""):
            whole.update(content)
            sums.append(hashlib.md5(content, usedforsecurity=False).digest())
    if whole.hexdigest() != upload.sha256:
        raise altered_here(upload)
    md5 = multipart.etag_of(sums) if upload.bytes > PART_BYTES else (sums or [EMPTY])[0].hex()
    return same_etag(found, md5)
