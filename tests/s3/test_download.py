"""Downloads: whole, gone on with after a cut, and refused where the object is not what was backed up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from blocks.s3 import Bucket
from runbook.errors import OpsError, Unreachable, VerificationFailed
from tasks.s3.download import PART, RANGE_BYTES, download_file, verify_object
from tasks.s3.upload import upload_file
from tasks.s3.writing import Upload
from tests.s3.conftest import MakeFile
from tests.s3.proxy import Proxy
from tests.s3.servers import S3Server

LARGE = 5 * RANGE_BYTES + 12345


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "restored" / "base.tar"


@pytest.fixture(autouse=True)
def _directory(target: Path) -> None:
    target.parent.mkdir()


def sent(bucket: Bucket, upload: Upload) -> Upload:
    upload_file(bucket, *upload)
    return upload


def fetch(bucket: Bucket, upload: Upload, target: Path, **how: object) -> None:
    download_file(bucket, upload.key, target, upload.sha256, upload.bytes, **how)  # type: ignore[arg-type]


def part_of(target: Path) -> Path:
    return target.with_name(target.name + PART)


@pytest.mark.parametrize("size", [0, 1, RANGE_BYTES, LARGE])
def test_download(server: S3Server, make_file: MakeFile, target: Path, size: int) -> None:
    """The file is the object, readable by its owner only; nothing else is left."""
    bucket = server.bucket()
    told: list[int] = []
    upload = sent(bucket, make_file(size))
    fetch(bucket, upload, target, tell=told.append)
    assert target.read_bytes() == upload.path.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(target.parent.iterdir()) == [target]
    assert sum(told) == size
    verify_object(bucket, upload.key, upload.sha256, upload.bytes)


def test_cut_in_the_middle(cuttable: Bucket, proxy: Proxy, make_file: MakeFile, target: Path) -> None:
    """Connections that are cut within a range: it goes on from the byte where it stopped."""
    upload = sent(cuttable, make_file(LARGE))
    before = proxy.answered_bytes
    proxy.cut_answers(after_bytes=RANGE_BYTES - 100_000, times=2)
    fetch(dataclasses.replace(cuttable, patience_seconds=30.0), upload, target, workers=1)
    assert proxy.faults == 2
    assert target.read_bytes() == upload.path.read_bytes()
    assert proxy.answered_bytes - before < LARGE + 2_500_000


def test_gone_on_with_after_the_line_was_down(
    cuttable: Bucket, proxy: Proxy, make_file: MakeFile, target: Path
) -> None:
    """The line stays down: Unreachable, and no file of that name. The next launch reads only what is missing."""
    upload = sent(cuttable, make_file(LARGE))
    told: list[int] = []

    def tell(_: int) -> None:
        if proxy.answered_bytes > 3 * RANGE_BYTES:
            proxy.cut_answers(after_bytes=1, times=-1)

    with pytest.raises(Unreachable, match=r"reading 20261125_020000/base\.tar"):
        fetch(cuttable, upload, target, workers=1, tell=tell)
    assert not target.exists()
    there = part_of(target).stat().st_size
    assert 2 * RANGE_BYTES <= there < LARGE
    proxy.heal()
    before = proxy.answered_bytes
    fetch(cuttable, upload, target, tell=told.append)
    assert proxy.answered_bytes - before < LARGE - there + 100_000
    assert target.read_bytes() == upload.path.read_bytes()
    assert told[0] == there
    assert sum(told) == LARGE


@pytest.mark.parametrize("left", [b"x" * 5000, b"x" * LARGE, b"x" * (LARGE + 1)])
def test_part_of_something_else(server: S3Server, make_file: MakeFile, target: Path, left: bytes) -> None:
    """What an earlier attempt left is of another object, or too long: read anew."""
    bucket = server.bucket()
    upload = sent(bucket, make_file(LARGE))
    part_of(target).write_bytes(left)
    fetch(bucket, upload, target)
    assert target.read_bytes() == upload.path.read_bytes()


def test_altered_in_place(server: S3Server, make_file: MakeFile, target: Path) -> None:
    """Another content of the same size and with the same metadata: named, refused, nothing left."""
    bucket = server.bucket()
    upload = sent(bucket, make_file(LARGE))
    place = {"Bucket": bucket.bucket, "Key": bucket.key(upload.key)}
    bucket.client().put_object(**place, Body=bytes(LARGE), Metadata={"sha256": upload.sha256})
    with pytest.raises(VerificationFailed, match=r"base\.tar .* is not what was backed up"):
        fetch(bucket, upload, target)
    assert list(target.parent.iterdir()) == []
    with pytest.raises(VerificationFailed, match="SHA-256"):
        verify_object(bucket, upload.key, upload.sha256, upload.bytes)


def test_flipped_on_the_servers_disk(gateway: S3Server, make_file: MakeFile, target: Path) -> None:
    """One bit, which the server delivers with the old ETag."""
    bucket = gateway.bucket()
    upload = sent(bucket, make_file(LARGE, seed=4716))  # no other test's content
    gateway.flip_stored_byte(upload.path.read_bytes()[RANGE_BYTES + 1000 : RANGE_BYTES + 1100])
    with pytest.raises(VerificationFailed, match="SHA-256"):
        verify_object(bucket, upload.key, upload.sha256, upload.bytes)
    with pytest.raises(VerificationFailed, match="SHA-256"):
        fetch(bucket, upload, target)
    assert list(target.parent.iterdir()) == []


def test_replaced_while_it_is_read(server: S3Server, make_file: MakeFile, target: Path) -> None:
    """Half of one object and half of another never become a file."""
    bucket = server.bucket()
    upload = sent(bucket, make_file(LARGE))

    def tell(_: int) -> None:
        bucket.client().put_object(Bucket=bucket.bucket, Key=bucket.key(upload.key), Body=bytes(LARGE))

    with pytest.raises(VerificationFailed, match="replaced while it was read"):
        fetch(bucket, upload, target, workers=1, tell=tell)
    assert not target.exists()


def test_missing_or_shortened(server: S3Server, make_file: MakeFile, target: Path) -> None:
    """Said before anything is read."""
    bucket, upload = server.bucket(), make_file(LARGE)
    for read in (lambda: fetch(bucket, upload, target), lambda: verify_object(bucket, *upload[1:])):
        with pytest.raises(VerificationFailed, match="is not there"):
            read()
    bucket.client().put_object(Bucket=bucket.bucket, Key=bucket.key(upload.key), Body=b"short")
    for read in (lambda: fetch(bucket, upload, target), lambda: verify_object(bucket, *upload[1:])):
        with pytest.raises(VerificationFailed, match=f"it has 5 bytes, not {LARGE}"):
            read()
    assert list(target.parent.iterdir()) == []


def test_target_not_writable(gateway: S3Server, make_file: MakeFile, target: Path) -> None:
    """A directory that is not there, in one sentence."""
    bucket = gateway.bucket()
    upload = sent(bucket, make_file(10))
    with pytest.raises(OpsError, match="No such file or directory"):
        fetch(bucket, upload, target.parent / "missing" / "base.tar")
