"""Files to objects: small ones in one request, large ones in parts; what is there already and equal is passed over."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from blocks.s3 import Bucket
from runbook.errors import OpsError
from tasks.s3 import multipart
from tasks.s3.multipart import PART_BYTES, PartSenders, part_bytes
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
LARGE_FILES = 4
"""At a time: while one is begun or completed, parts of the others are on the way."""
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
    with ThreadPoolExecutor(workers) as pool:
        _upload(bucket, Upload(path, key, sha256, bytes_), PartSenders(pool, workers), tell)


def upload_files(
    bucket: Bucket,
    items: Iterable[tuple[Path, str, str, int]],
    *,
    workers: int = WORKERS,
    tell: Callable[[int], None] = _untold,
) -> None:
    """Upload files, given as (path, key, SHA-256, bytes): several at a time, the largest first. `tell` is called by one
    thread at a time.

    Raises:
        as `upload_file`; the other uploads stop, too. What was sent until then stays, and is passed over the next time.
    """
    uploads = sorted((Upload(*item) for item in items), key=lambda upload: upload.bytes, reverse=True)
    large = sum(upload.bytes > PART_BYTES for upload in uploads)
    at_a_time = max(1, min(LARGE_FILES, large))
    telling = threading.Lock()

    def tell_alone(added: int) -> None:
        with telling:
            tell(added)

    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(at_a_time) as readers:
        senders = PartSenders(pool, max(1, workers // at_a_time))
        try:
            sending = [
                (readers if upload.bytes > PART_BYTES else pool).submit(_upload, bucket, upload, senders, tell_alone)
                for upload in uploads
            ]
            done, _ = wait(sending, return_when=FIRST_EXCEPTION)
            for one in done:
                one.result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)  # an upload under way ends at its next part


def _upload(bucket: Bucket, upload: Upload, senders: PartSenders, tell: Callable[[int], None]) -> None:
    try:
        if _is_there(bucket, upload):
            tell(upload.bytes)
        elif upload.bytes <= PART_BYTES:
            _put(bucket, upload)
            tell(upload.bytes)
        else:
            _send(bucket, upload, senders, tell)
    except OSError as error:
        raise unreadable(upload.path, error) from None
    if bucket.locks:
        require_locked(bucket, upload.key)


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
        **proof_of(md5),
        **written_with(bucket, sha256, lock=lock),
    )
    answer = attempt(bucket, f"writing {key}", request)
    require_encrypted(bucket, key, answer)
    require_etag(bucket, key, answer, md5.hex())


def _send(bucket: Bucket, upload: Upload, senders: PartSenders, tell: Callable[[int], None]) -> None:
    """A resumed upload has the metadata of the attempt that began it: where they are others', it is made anew."""
    if upload.path.stat().st_size != upload.bytes:
        raise altered_here(upload)
    resumed = multipart.send(bucket, upload, senders, tell, resume=True)
    if resumed and _problems(bucket, upload):
        multipart.send(bucket, upload, senders, _untold, resume=False)
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
