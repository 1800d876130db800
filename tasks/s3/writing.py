"""How objects are written, and what the server's answers must confirm."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blocks.s3 import Bucket
from runbook.errors import OpsError, VerificationFailed
from tasks.s3.requests import RequestRefused, attempt

SHA256 = "sha256"  # the object's metadata (x-amz-meta-sha256), in hexadecimal
MISSING = ("NoSuchKey", "NotFound", "404")


class Upload(NamedTuple):
    """A file to send, the key that it gets, and what it must be."""

    path: Path
    key: str
    sha256: str
    bytes: int


def written_with(bucket: Bucket, sha256: str, *, lock: bool) -> dict[str, Any]:
    """The arguments of an object's creation: its SHA-256, encryption, and until when it cannot be deleted."""
    arguments: dict[str, Any] = {"Metadata": {SHA256: sha256}, "ContentType": "application/octet-stream"}
    if bucket.sse:
        arguments["ServerSideEncryption"] = bucket.sse
    if bucket.sse == "aws:kms" and bucket.kms_key:
        arguments["SSEKMSKeyId"] = bucket.kms_key
    if lock and bucket.locks:
        arguments["ObjectLockMode"] = bucket.lock_mode
        arguments["ObjectLockRetainUntilDate"] = _lock_end(bucket)
    return arguments


def proof_of(md5: bytes) -> dict[str, str]:
    """What lets the server refuse a body that was altered on the way: its MD5, which is part of the signature."""
    return {"ContentMD5": base64.b64encode(md5).decode()}


def head(bucket: Bucket, key: str) -> dict[str, Any] | None:
    """What the server knows of an object; None: it is not there. Of a missing bucket it does not tell."""
    client, what = bucket.client(), f"looking for {key}"
    place = {"Bucket": bucket.bucket, "Key": bucket.key(key)}
    try:
        answer: dict[str, Any] = attempt(bucket, what, lambda: client.head_object(**place))
    except RequestRefused as error:
        if error.code in MISSING:
            return None
        # an answer to HEAD has no body: that to a listing says why
        attempt(bucket, what, lambda: client.list_objects_v2(Bucket=bucket.bucket, Prefix=place["Key"], MaxKeys=1))
        raise
    return answer


def shortcomings(bucket: Bucket, upload: Upload, found: dict[str, Any]) -> list[str]:
    """Wherein an object is not what an upload makes: size, SHA-256, encryption. Metadata may be lost."""
    kept = found.get("Metadata", {}).get(SHA256, upload.sha256)
    return [
        *([f"{found['ContentLength']} bytes, not {upload.bytes}"] if found["ContentLength"] != upload.bytes else []),
        *(["made of another file"] if kept != upload.sha256 else []),
        *([f"not encrypted with {bucket.sse}"] if bucket.sse and not _encrypted(bucket, found) else []),
    ]


def require_locked(bucket: Bucket, key: str) -> None:
    """That an object is locked as configured. An upload that was begun days ago, or on a server that does not lock
    what comes in parts, is locked now.

    Raises:
        OpsError: it cannot be locked, or its lock cannot be read.
    """
    found = head(bucket, key) or {}
    if _locked(bucket, found):
        return
    request = partial(
        bucket.client().put_object_retention,
        Bucket=bucket.bucket,
        Key=bucket.key(key),
        Retention={"Mode": bucket.lock_mode, "RetainUntilDate": _lock_end(bucket)},
        **({"VersionId": found["VersionId"]} if "VersionId" in found else {}),
    )
    attempt(bucket, f"locking {key}", request)
    if not _locked(bucket, head(bucket, key) or {}):
        raise OpsError(
            f"{key} in {bucket.where} is written, and is not locked or its lock is not readable",
            "allow s3:PutObjectRetention and s3:GetObjectRetention in the policy",
        )


def require_encrypted(bucket: Bucket, key: str, answer: dict[str, Any]) -> None:
    """Some servers pass over what they cannot do.

    Raises:
        OpsError: encryption was asked for, and the answer does not confirm it.
    """
    if bucket.sse and not _encrypted(bucket, answer):
        raise OpsError(
            f"{key} in {bucket.where} is not encrypted with {bucket.sse}: the server does not confirm it",
            "use a server that encrypts, or remove sse from the environment's backup store",
        )


def require_etag(bucket: Bucket, key: str, answer: dict[str, Any], md5: str) -> None:
    """That the server's ETag is the MD5 of what was sent.

    Raises:
        VerificationFailed: it is another.
    """
    if not same_etag(answer, md5):
        raise VerificationFailed(
            f"{key} in {bucket.where}: the server kept something else (ETag {answer.get('ETag', '')}, sent {md5})",
            "run it again; if it fails again, this server's ETags are no MD5s and it cannot be used",
        )


def same_etag(answer: dict[str, Any], md5: str) -> bool:
    """Whether an object's ETag is this one. KMS makes ETags that say nothing: they pass."""
    return str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or _etag(answer) == md5


def altered_here(upload: Upload) -> VerificationFailed:
    """The file that was read is not the one that its SHA-256 was taken of."""
    return VerificationFailed(
        f"{upload.path} is not what it was: its SHA-256 differs, nothing of it is kept",
        "check its disk and who writes there, then take another backup",
    )


def unreadable(path: Path, error: OSError) -> OpsError:
    """A file of this host that cannot be read or written."""
    return OpsError(f"{path}: {error.strerror or error}", "fix that, then run it again: it continues from there")


def _etag(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _lock_end(bucket: Bucket) -> datetime:
    return datetime.now(UTC) + timedelta(days=bucket.lock_days)


def _locked(bucket: Bucket, found: dict[str, Any]) -> bool:
    """In the mode (or the harder one), and for the days, less the one that sending may take."""
    until: datetime | None = found.get("ObjectLockRetainUntilDate")
    modes = (bucket.lock_mode, "COMPLIANCE")
    return found.get("ObjectLockMode") in modes and until is not None and until > _lock_end(bucket) - timedelta(days=1)


def _encrypted(bucket: Bucket, answer: dict[str, Any]) -> bool:
    return bool(answer.get("ServerSideEncryption", "") == bucket.sse)
