"""One large object, sent in parts. An unfinished upload is continued; its parts are compared by their MD5.

Not boto3's own transfer (s3transfer): it aborts or forgets the upload of a killed run, where a later run must continue
it, and it does not compare the parts on the server with the file that it sends.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
https://boto3.amazonaws.com/v1/documentation/api/latest/guide/s3.html
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from blocks.s3 import Bucket
from tasks.s3.requests import RequestRefused, attempt
from tasks.s3.writing import (
    Upload,
    altered_here,
    head,
    proof_of,
    require_encrypted,
    require_etag,
    same_etag,
    written_with,
)

MEGABYTE = 1024 * 1024
PART_BYTES = 8 * MEGABYTE
PARTS = 10_000  # the protocol's limit
MEMORY_BYTES = 32 * MEGABYTE  # of a file's parts in flight: above 80 GB they are larger, and soon fewer at a time


class PartSenders(NamedTuple):
    """Threads that send parts, of one file or of several at a time, and how many parts of each may be in flight."""

    pool: ThreadPoolExecutor
    ahead: int


@dataclass(frozen=True)
class Begun:
    """An upload that is begun: its id, and the parts that are there already (number → MD5 in hexadecimal)."""

    id: str
    parts: dict[int, str]


def part_bytes(size: int) -> int:
    """The size of a part: whole megabytes, at least 8, and not more than 10,000 parts."""
    return max(PART_BYTES, -(-size // (PARTS * MEGABYTE)) * MEGABYTE)


def send(bucket: Bucket, upload: Upload, senders: PartSenders, tell: Callable[[int], None], *, resume: bool) -> bool:
    """Send a file's parts and make one object of them; returns whether an unfinished upload was resumed.

    Raises:
        OSError: the file cannot be read; what was sent stays.
        VerificationFailed: the file is not what `upload` says (the upload is aborted), or the server kept another.
        Unreachable: what was sent stays for the next attempt.
        OpsError: refused.
    """
    unfinished = _unfinished(bucket, upload, resume)
    begun = unfinished or _begin(bucket, upload)
    whole = hashlib.sha256()
    sums = list(_send_parts(bucket, upload, begun, senders, whole.update, tell))
    if whole.hexdigest() != upload.sha256:
        _abort(bucket, upload.key, begun.id)
        raise altered_here(upload)
    _complete(bucket, upload, begun.id, sums)
    return unfinished is not None


def etag_of(sums: Sequence[bytes]) -> str:
    """The ETag of an object that is made of parts with these MD5s."""
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"


def abort_unfinished(bucket: Bucket, below: str) -> int:
    """Abort the uploads that are begun and not completed below a "directory"; returns how many. Their parts cost space
    that no listing of objects shows. Where the policy does not let them be listed, they stay."""
    try:
        found = list(_uploads(bucket, f"{below.strip('/')}/" if below else ""))
    except RequestRefused:
        return 0
    start = len(bucket.key(""))
    for upload in found:
        _abort(bucket, upload["Key"][start:], upload["UploadId"])
    return len(found)


def _send_parts(
    bucket: Bucket,
    upload: Upload,
    begun: Begun,
    senders: PartSenders,
    update: Callable[[bytes], None],
    tell: Callable[[int], None],
) -> Iterator[bytes]:
    """The parts' MD5s, in order. Read and added to the SHA-256 here, one after another."""
    size = part_bytes(upload.bytes)
    ahead = max(1, min(senders.ahead, MEMORY_BYTES // size))
    sending: deque[Future[tuple[bytes, int]]] = deque()
    with upload.path.open("rb", buffering=0) as file:
        try:
            for number in range(1, -(-upload.bytes // size) + 1):
                content = file.read(size)
                update(content)
                sending.append(senders.pool.submit(_send_part, bucket, upload.key, begun, number, content))
                while len(sending) > (ahead if number * size < upload.bytes else 0):
                    md5, sent = sending.popleft().result()
                    tell(sent)
                    yield md5
        finally:
            wait([one for one in sending if not one.cancel()])


def _send_part(bucket: Bucket, key: str, begun: Begun, number: int, content: bytes) -> tuple[bytes, int]:
    md5 = hashlib.md5(content, usedforsecurity=False).digest()
    if begun.parts.get(number) != md5.hex():
        request = partial(
            bucket.client().upload_part,
            Bucket=bucket.bucket,
            Key=bucket.key(key),
            UploadId=begun.id,
            PartNumber=number,
            Body=content,
            **proof_of(md5),
        )
        answer = attempt(bucket, f"sending part {number} of {key}", request)
        require_etag(bucket, f"part {number} of {key}", answer, md5.hex())
    return md5, len(content)


def _begin(bucket: Bucket, upload: Upload) -> Begun:
    request = partial(
        bucket.client().create_multipart_upload,
        Bucket=bucket.bucket,
        Key=bucket.key(upload.key),
        **written_with(bucket, upload.sha256, lock=True),
    )
    answer = attempt(bucket, f"beginning {upload.key}", request)
    try:
        require_encrypted(bucket, upload.key, answer)
    except Exception:
        _abort(bucket, upload.key, answer["UploadId"])
        raise
    return Begun(answer["UploadId"], {})


def _complete(bucket: Bucket, upload: Upload, upload_id: str, sums: Sequence[bytes]) -> None:
    """Make the object. An answer may get lost and the repeated request find no upload: then the object counts."""
    parts = [{"PartNumber": number, "ETag": f'"{md5.hex()}"'} for number, md5 in enumerate(sums, 1)]
    request = partial(
        bucket.client().complete_multipart_upload,
        Bucket=bucket.bucket,
        Key=bucket.key(upload.key),
        UploadId=upload_id,
        MultipartUpload={"Parts": parts},
    )
    try:
        answer = attempt(bucket, f"completing {upload.key}", request)
    except RequestRefused as error:
        answer = head(bucket, upload.key) if error.code == "NoSuchUpload" else None
        if answer is None or not same_etag(answer, etag_of(sums)):
            raise
    require_etag(bucket, upload.key, answer, etag_of(sums))


def _unfinished(bucket: Bucket, upload: Upload, resume: bool) -> Begun | None:
    """The newest unfinished upload of the same key with parts of the same size. Others of that key are aborted.

    None too where the server or the policy does not let uploads be listed.
    """
    found: Begun | None = None
    try:
        uploads = [entry for entry in _uploads(bucket, upload.key) if entry["Key"] == bucket.key(upload.key)]
        for entry in sorted(uploads, key=lambda entry: entry["Initiated"], reverse=True):
            parts = _sent(bucket, upload, entry["UploadId"]) if resume and not found else {}
            if parts:
                found = Begun(entry["UploadId"], parts)
            else:
                _abort(bucket, upload.key, entry["UploadId"])
    except RequestRefused:
        return found
    return found


def _sent(bucket: Bucket, upload: Upload, upload_id: str) -> dict[int, str]:
    """The parts of an unfinished upload; none where they are not cut as this upload's are."""
    client, found, marker = bucket.client(), {}, 0
    size, place = part_bytes(upload.bytes), {"Bucket": bucket.bucket, "Key": bucket.key(upload.key)}
    while True:
        request = partial(client.list_parts, **place, UploadId=upload_id, PartNumberMarker=marker)
        page = attempt(bucket, f"listing the parts of {upload.key}", request)
        for part in page.get("Parts", []):
            marker = int(part["PartNumber"])
            if part["Size"] != min(size, upload.bytes - (marker - 1) * size):
                return {}
            found[marker] = part["ETag"].strip('"')
        if not page.get("IsTruncated"):
            return found


def _uploads(bucket: Bucket, below: str) -> Iterator[dict[str, Any]]:
    client, more = bucket.client(), {"Prefix": bucket.key(below)}
    while True:
        request = partial(client.list_multipart_uploads, Bucket=bucket.bucket, **more)
        page = attempt(bucket, "listing unfinished uploads", request)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        more |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _abort(bucket: Bucket, key: str, upload_id: str) -> None:
    place = {"Bucket": bucket.bucket, "Key": bucket.key(key), "UploadId": upload_id}
    try:
        attempt(bucket, f"aborting {key}", partial(bucket.client().abort_multipart_upload, **place))
    except RequestRefused as error:
        if error.code != "NoSuchUpload":
            raise
