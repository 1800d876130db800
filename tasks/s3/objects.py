"""Objects below a bucket's prefix: list, read and write small ones, delete. Keys are relative to the prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from blocks.s3 import Bucket
from runbook.errors import OTHER_BACKUPS, OpsError, VerificationFailed
from runbook.units import size
from tasks.s3.requests import RequestRefused, attempt
from tasks.s3.upload import put
from tasks.s3.writing import MISSING, SHA256, require_encrypted, require_locked, written_with

SMALL_BYTES = 512 * 1024 * 1024  # a manifest of files has some 250 bytes for each
BATCH = 1000  # the protocol's limit for DeleteObjects


def list_names(bucket: Bucket) -> list[str]:
    """The first path components below the prefix, sorted: backups ("directories"), and objects directly there."""
    start = bucket.key("")
    names: set[str] = set()
    for page in _pages(bucket, start, Delimiter="/"):
        names.update(entry["Prefix"][len(start) :].rstrip("/") for entry in page.get("CommonPrefixes", []))
        names.update(entry["Key"][len(start) :] for entry in page.get("Contents", []))
    return sorted(names - {""})


def list_objects(bucket: Bucket, below: str) -> dict[str, int]:
    """Every object below a "directory" (empty: all): its key relative to the bucket's *prefix* → its bytes."""
    start = len(bucket.key(""))
    where = bucket.key(f"{below.strip('/')}/" if below else "")
    return {
        entry["Key"][start:]: int(entry["Size"])
        for page in _pages(bucket, where)
        for entry in page.get("Contents", [])
        if not entry["Key"].endswith("/")  # some servers list directories as empty objects
    }


def list_stamps(bucket: Bucket, folder: str) -> dict[str, str]:
    """The objects directly in a "directory": name → its ETag, which changes whenever it is written."""
    start = bucket.key(f"{folder.strip('/')}/")
    return {
        entry["Key"][len(start) :]: str(entry["ETag"])
        for page in _pages(bucket, start, Delimiter="/")
        for entry in page.get("Contents", [])
        if entry["Key"] != start
    }


def read_identity(bucket: Bucket, key: str) -> str | None:
    """ETag, size and time of an object, which change when it is written again; None: it is not there.

    Raises:
        OpsError: it is not readable.
    """
    head = partial(bucket.client().head_object, Bucket=bucket.bucket, Key=bucket.key(key))
    try:
        answer = attempt(bucket, f"reading {key}", head)
    except RequestRefused as error:
        if error.code in MISSING:
            return None
        raise
    return f"{answer['ETag']} {answer['ContentLength']} {answer['LastModified'].isoformat()}"


def read_small(bucket: Bucket, key: str) -> bytes | None:
    """A small object's content; None: it is not there.

    Raises:
        VerificationFailed: it is not what its own SHA-256 says, or larger than anything that is written so.
        OpsError: it is not readable.
    """

    def read() -> tuple[dict[str, Any], bytes]:
        answer = bucket.client().get_object(Bucket=bucket.bucket, Key=bucket.key(key))
        if answer["ContentLength"] > SMALL_BYTES:
            answer["Body"].close()
            told = f"{key} in {bucket.where} has {answer['ContentLength']} bytes"
            raise VerificationFailed(told, f"that is no manifest; {OTHER_BACKUPS}")
        return answer, answer["Body"].read()

    try:
        answer, content = attempt(bucket, f"reading {key}", read)
    except RequestRefused as error:
        if error.code in MISSING:
            return None
        raise
    expected = answer.get("Metadata", {}).get(SHA256, "")
    if expected and hashlib.sha256(content).hexdigest() != expected:
        raise VerificationFailed(
            f"{key} in {bucket.where} is not what was written: its SHA-256 differs",
            f"restore the object's previous version if the bucket is versioned; {OTHER_BACKUPS}",
        )
    return bytes(content)


def write_small(bucket: Bucket, key: str, content: bytes, *, lock: bool = True) -> None:
    """Write one object in one request, replacing what is there. `lock=False`: what will be written again.

    Raises:
        OpsError: too large, refused, or the server did not encrypt, lock or keep it as asked.
    """
    require_small(len(content), key)
    put(bucket, key, content, hashlib.sha256(content).hexdigest(), lock=lock)
    if lock and bucket.locks:
        require_locked(bucket, key)


def require_small(bytes_: int, what: str) -> None:
    """That it can be read again as one small object.

    Raises:
        OpsError: it is larger.
    """
    if bytes_ > SMALL_BYTES:
        raise OpsError(
            f"{what} has {size(bytes_)}, and {size(SMALL_BYTES)} is the most that a bucket takes",
            "split the backup, or store these backups in a directory",
        )


def delete(bucket: Bucket, keys: Sequence[str]) -> None:
    """Delete objects; one that is not there is no error. In a versioned bucket their versions stay (`is_versioned`).

    Raises:
        OpsError: an object lock or the policy holds one; those that could be deleted are.
    """
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        errors = attempt(bucket, f"deleting {len(batch)} objects", partial(_delete, bucket, batch))
        if errors:
            first = errors[0]
            raise OpsError(
                f"{len(errors)} of {len(batch)} objects in {bucket.where} are not deleted; {first.get('Key', '')}: "
                f"{first.get('Code', '')} {first.get('Message', '')}".rstrip(),
                "wait for the end of the object lock, or allow s3:DeleteObject in the policy",
            )
    _remove_emptied(bucket, {key.partition("/")[0] for key in keys if "/" in key})


def is_versioned(bucket: Bucket) -> bool | None:
    """Whether a deleted object's content stays as a version (suspended versioning keeps earlier ones too). None: the
    policy does not let that be asked."""
    client = bucket.client()
    try:
        answer = attempt(bucket, "versioning", lambda: client.get_bucket_versioning(Bucket=bucket.bucket))
    except RequestRefused as error:
        return False if error.code == "NotImplemented" else None
    return bool(answer.get("Status"))


def check(bucket: Bucket) -> None:
    """That the bucket exists, can be listed and written to with the encryption and lock that are configured.

    Leaves nothing there: an upload is begun and aborted.

    Raises:
        Unreachable: no answer.
        OpsError: it is not usable; the hint says what to correct.
    """
    client = bucket.client()
    first = {"Bucket": bucket.bucket, "Prefix": bucket.key(""), "MaxKeys": 1}
    attempt(bucket, "listing", lambda: client.list_objects_v2(**first))
    place = {"Bucket": bucket.bucket, "Key": bucket.key(".writable")}
    arguments = written_with(bucket, hashlib.sha256().hexdigest(), lock=True)
    answer = attempt(bucket, "writing", lambda: client.create_multipart_upload(**place, **arguments))
    attempt(bucket, "writing", lambda: client.abort_multipart_upload(**place, UploadId=answer["UploadId"]))
    require_encrypted(bucket, "an object", answer)
    if bucket.locks:
        attempt(bucket, "object lock", lambda: client.get_object_lock_configuration(Bucket=bucket.bucket))


def _pages(bucket: Bucket, start: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    client, token = bucket.client(), ""
    while True:
        more = {"ContinuationToken": token} if token else {}
        request = partial(client.list_objects_v2, Bucket=bucket.bucket, Prefix=start, **arguments, **more)
        page = attempt(bucket, "listing", request)
        yield page
        if not page.get("IsTruncated"):
            return
        token = page["NextContinuationToken"]


def _remove_emptied(bucket: Bucket, names: set[str]) -> None:
    """Servers on a file system keep the directories of what was deleted in a batch, as empty objects."""
    client = bucket.client()
    for start in (bucket.key(name) for name in sorted(names)):  # without a slash: the directory itself is listed too
        keys = [entry["Key"] for page in _pages(bucket, start) for entry in page.get("Contents", [])]
        for key in keys:
            if key.startswith(f"{start}/") and key.endswith("/"):
                attempt(bucket, f"deleting {key}", partial(client.delete_object, Bucket=bucket.bucket, Key=key))


def _delete(bucket: Bucket, keys: Sequence[str]) -> list[dict[str, str]]:
    answer = bucket.client().delete_objects(
        Bucket=bucket.bucket, Delete={"Objects": [{"Key": bucket.key(key)} for key in keys], "Quiet": True}
    )
    return list(answer.get("Errors", []))
