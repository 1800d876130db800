"""Uploads: whole and in parts, locked and encrypted, and refused where the file is not what it was."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from runbook.errors import OpsError, VerificationFailed
from tasks.s3 import objects
from tasks.s3.multipart import MEGABYTE, PART_BYTES, part_bytes
from tasks.s3.upload import upload_file, upload_files
from tests.s3.conftest import LARGE, MakeFile, begin, kept, unfinished
from tests.s3.proxy import Proxy
from tests.s3.servers import S3Server


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, LARGE])
def test_upload(server: S3Server, make_file: MakeFile, size: int) -> None:
    """The object has the file's content and SHA-256; sent again, nothing is sent."""
    bucket, upload = server.bucket(), make_file(size)
    told: list[int] = []
    upload_file(bucket, *upload, tell=told.append)
    content, answer = kept(bucket, upload.key)
    assert content == upload.path.read_bytes()
    assert answer["Metadata"]["sha256"] == upload.sha256
    assert ("-" in answer["ETag"]) == (size > PART_BYTES)
    assert sum(told) == size
    assert not unfinished(bucket, upload.key)
    with Proxy(server.port) as proxy:
        upload_file(dataclasses.replace(bucket, endpoint=proxy.endpoint), *upload, tell=told.append)
        assert proxy.sent_bytes < 3000
    assert sum(told) == 2 * size
    assert kept(bucket, upload.key)[1]["LastModified"] == answer["LastModified"]


def test_part_sizes() -> None:
    """At least 8 MB, never more than 10,000 parts, up to the protocol's 5 TB."""
    assert part_bytes(1) == part_bytes(80_000 * MEGABYTE) == 8 * MEGABYTE
    for size in (80_000 * MEGABYTE + 1, 10**12, 5 * 1024**4):
        assert -(-size // part_bytes(size)) <= 10_000
    assert part_bytes(80_000 * MEGABYTE + 1) == 9 * MEGABYTE


def test_many_files(server: S3Server, make_file: MakeFile) -> None:
    """Small and large ones; all are there, and all bytes are told."""
    files = [make_file(size, f"b/{size}", seed=size + 1) for size in (0, 10, 5000, PART_BYTES - 1, 100_000, LARGE)]
    bucket = server.bucket()
    told: list[int] = []
    upload_files(bucket, files, workers=3, tell=told.append)
    assert objects.list_objects(bucket, "b") == {file.key: file.bytes for file in files}
    for file in files:
        assert hashlib.sha256(kept(bucket, file.key)[0]).hexdigest() == file.sha256
    assert sum(told) == sum(file.bytes for file in files)


def test_one_of_many_is_altered(server: S3Server, make_file: MakeFile) -> None:
    """The last of more files than are sent at a time is not what it was: it is named, and none of it is kept. The next
    launch passes over what was sent: two files had ended when this one began."""
    files = [make_file(LARGE + size, f"b/{size}", seed=size + 1) for size in range(6)]
    bucket, altered = server.bucket(), files[0]  # the smallest: the last one
    right = altered.path.read_bytes()
    altered.path.write_bytes(bytes(1) + right[1:])
    with pytest.raises(VerificationFailed, match=str(altered.path)):
        upload_files(bucket, files)
    assert altered.key not in objects.list_objects(bucket, "b")
    assert not unfinished(bucket, altered.key)
    altered.path.write_bytes(right)
    told: list[int] = []
    with Proxy(server.port) as proxy:
        upload_files(dataclasses.replace(bucket, endpoint=proxy.endpoint), files, tell=told.append)
        assert proxy.sent_bytes < 4 * LARGE + PART_BYTES
    for file in files:
        assert hashlib.sha256(kept(bucket, file.key)[0]).hexdigest() == file.sha256
    assert sum(told) == sum(file.bytes for file in files)


def test_overwritten_object_is_sent_again(server: S3Server, make_file: MakeFile) -> None:
    """An object altered in place, its size and metadata as before, does not count as sent."""
    for size in (5000, LARGE):
        bucket, upload = server.bucket(), make_file(size)
        upload_file(bucket, *upload)
        place = {"Bucket": bucket.bucket, "Key": bucket.key(upload.key)}
        bucket.client().put_object(**place, Body=bytes(size), Metadata={"sha256": upload.sha256})
        upload_file(bucket, *upload)
        assert kept(bucket, upload.key)[0] == upload.path.read_bytes()


@pytest.mark.parametrize("size", [5000, LARGE])
def test_file_altered_on_this_host(server: S3Server, make_file: MakeFile, size: int) -> None:
    """One flipped bit, or another length, since the manifest was written: nothing is kept there, whole or in parts."""
    bucket, upload = server.bucket(), make_file(size)
    content = bytearray(upload.path.read_bytes())
    content[-1] ^= 1
    for altered in (bytes(content), bytes(content[:-1]), bytes(content) + b"x"):
        upload.path.write_bytes(altered)
        with pytest.raises(VerificationFailed, match=str(upload.path)):
            upload_file(bucket, *upload)
    assert objects.list_names(bucket) == []
    assert not unfinished(bucket, upload.key)
    upload.path.unlink()
    with pytest.raises(OpsError, match="No such file"):
        upload_file(bucket, *upload)


def test_locked_and_encrypted(moto: S3Server, make_file: MakeFile) -> None:
    """Both kinds of uploads write with the retention and the encryption that are configured."""
    bucket = moto.bucket(locked=True, lock_mode="GOVERNANCE", lock_days=7, sse="aws:kms")
    upload_files(bucket, [make_file(5000, "a/small"), make_file(LARGE, "a/large")])
    for key in ("a/small", "a/large"):
        found = bucket.client().head_object(Bucket=bucket.bucket, Key=bucket.key(key))
        assert (found["ObjectLockMode"], found["ServerSideEncryption"]) == ("GOVERNANCE", "aws:kms")
        assert 6 <= (found["ObjectLockRetainUntilDate"] - found["LastModified"]).days <= 7


def test_lock_is_added(moto: S3Server, make_file: MakeFile) -> None:
    """What was sent, or begun, before the lock was configured (or long ago) does not stay unlocked."""
    bucket = moto.bucket(locked=True)
    sent, begun = make_file(5000, "a/sent"), make_file(LARGE, "a/begun")
    upload_file(bucket, *sent)
    begin(bucket, begun, {1: begun.path.read_bytes()[:PART_BYTES]})
    for days in (7, 30):
        locking = dataclasses.replace(bucket, lock_mode="GOVERNANCE", lock_days=days)
        upload_files(locking, [sent, begun])
        for key in (sent.key, begun.key):
            found = kept(bucket, key)[1]
            assert found["ObjectLockMode"] == "GOVERNANCE"
            assert (found["ObjectLockRetainUntilDate"] - found["LastModified"]).days in (days - 1, days)
    versions = bucket.client().list_object_versions(Bucket=bucket.bucket)["Versions"]
    assert len(versions) == 2, "sent once each"


def test_not_encrypted_is_not_passed_over(gateway: S3Server, make_file: MakeFile) -> None:
    """A server that cannot encrypt gets nothing."""
    bucket = gateway.bucket()
    for size in (5000, LARGE):
        with pytest.raises(OpsError, match="cannot do that"):
            upload_file(dataclasses.replace(bucket, sse="AES256"), *make_file(size))
    assert objects.list_names(bucket) == []


def test_wrong_secret(gateway: S3Server, make_file: MakeFile) -> None:
    """The reason is said, though the first request (HEAD) is answered without one."""
    bucket = dataclasses.replace(gateway.bucket(), secret_key=type(gateway.bucket().secret_key)("wrong"))
    with pytest.raises(OpsError, match="the secret key is wrong"):
        upload_file(bucket, *make_file(10))


def test_missing_bucket(server: S3Server, make_file: MakeFile) -> None:
    """Said as such, for small and large files."""
    for size in (10, LARGE):
        with pytest.raises(OpsError, match="the bucket does not exist"):
            upload_file(dataclasses.replace(server.bucket(), bucket="nowhere-to-be-found"), *make_file(size))


def test_unreadable_path(gateway: S3Server, tmp_path: Path) -> None:
    """A directory is no file."""
    with pytest.raises(OpsError, match="Is a directory"):
        upload_file(gateway.bucket(), tmp_path, "a", "0" * 64, 10)
