"""Uploads over a bad line, to a server in trouble, and after an earlier attempt."""

from __future__ import annotations

import dataclasses

import pytest

from blocks.s3 import Bucket
from runbook.errors import Unreachable, VerificationFailed
from tasks.s3 import multipart
from tasks.s3.multipart import MEGABYTE, PART_BYTES
from tasks.s3.upload import upload_file, upload_files
from tasks.s3.writing import Upload
from tests.s3.conftest import LARGE, MakeFile, begin, kept, unfinished
from tests.s3.proxy import Proxy
from tests.s3.servers import S3Server


def test_cut_once_in_the_middle(cuttable: Bucket, proxy: Proxy, make_file: MakeFile) -> None:
    """A connection that is cut costs a part at most, and nobody notices."""
    upload = make_file(LARGE)
    proxy.cut_requests(after_bytes=LARGE // 2)
    upload_file(cuttable, *upload)
    assert proxy.faults == 1
    assert kept(cuttable, upload.key)[0] == upload.path.read_bytes()
    assert proxy.sent_bytes < LARGE + 2 * PART_BYTES


def test_gone_on_with_after_the_line_was_down(cuttable: Bucket, proxy: Proxy, make_file: MakeFile) -> None:
    """The line stays down: Unreachable. The next launch sends only what is missing."""
    upload = make_file(6 * PART_BYTES)
    with pytest.raises(Unreachable, match=r"part . of 20261125_020000/base\.tar"):
        _send_with_line_going_down(cuttable, proxy, upload)
    proxy.heal()
    before = proxy.sent_bytes
    told: list[int] = []
    assert len(unfinished(cuttable, upload.key)) == 1
    upload_file(cuttable, *upload, tell=told.append)
    assert 3 * PART_BYTES < proxy.sent_bytes - before < 4 * PART_BYTES + 100_000
    assert kept(cuttable, upload.key)[0] == upload.path.read_bytes()
    assert sum(told) == upload.bytes
    assert not unfinished(cuttable, upload.key)


def test_line_down_beneath_several_files(cuttable: Bucket, proxy: Proxy, make_file: MakeFile) -> None:
    """Files that are sent at a time all stop, Unreachable, and with them the parts and files that wait for a thread.
    The next launch sends only what is missing."""
    files = [make_file(6 * PART_BYTES, f"b/{number}", seed=number) for number in range(3)]
    files += [make_file(1000 + number, f"b/small-{number}", seed=number) for number in range(20)]
    whole = sum(file.bytes for file in files)

    def tell(_: int) -> None:
        if proxy.sent_bytes > whole // 2:
            proxy.cut_requests(after_bytes=1, times=-1)

    with pytest.raises(Unreachable):
        upload_files(cuttable, files, workers=2, tell=tell)
    proxy.heal()
    before = proxy.sent_bytes
    upload_files(cuttable, files)
    assert proxy.sent_bytes - before < whole * 2 // 3
    for file in files:
        assert kept(cuttable, file.key)[0] == file.path.read_bytes()
        assert not unfinished(cuttable, file.key)


def _send_with_line_going_down(bucket: Bucket, proxy: Proxy, upload: Upload) -> None:
    def tell(_: int) -> None:
        if proxy.sent_bytes > 2 * PART_BYTES:
            proxy.cut_requests(after_bytes=1, times=-1)

    upload_file(bucket, *upload, workers=1, tell=tell)


def test_other_part_is_replaced(server: S3Server, make_file: MakeFile) -> None:
    """A part that an earlier attempt left and that differs from the file is sent again."""
    bucket, upload = server.bucket(), make_file(LARGE)
    content = upload.path.read_bytes()
    begin(bucket, upload, {1: content[:PART_BYTES], 2: bytes(PART_BYTES)})
    upload_file(bucket, *upload)
    assert kept(bucket, upload.key)[0] == content


def test_attempt_for_another_file(server: S3Server, make_file: MakeFile) -> None:
    """An unfinished upload of the same key and size, begun for another file: its SHA-256 does not stay on the object."""
    bucket, upload = server.bucket(), make_file(LARGE)
    begin(bucket, upload, {1: bytes(PART_BYTES)}, sha256="0" * 64)
    upload_file(bucket, *upload)
    content, answer = kept(bucket, upload.key)
    assert content == upload.path.read_bytes()
    assert answer["Metadata"]["sha256"] == upload.sha256


def test_stale_attempts_are_aborted(server: S3Server, make_file: MakeFile) -> None:
    """Parts cut otherwise, or none: aborted. Those of other keys stay, until they are asked for."""
    bucket, upload = server.bucket(), make_file(LARGE)
    begin(bucket, upload, {1: bytes(5 * MEGABYTE), 2: bytes(5 * MEGABYTE)}, sha256="0" * 64)
    begin(bucket, upload, {}, sha256="0" * 64)
    other = upload._replace(key="20261125_020000/base.tar.sig")
    begin(bucket, other, {1: b"x"})
    assert len(unfinished(bucket, upload.key)) == 2
    with Proxy(server.port) as proxy:
        upload_file(dataclasses.replace(bucket, endpoint=proxy.endpoint), *upload)
        assert LARGE < proxy.sent_bytes < LARGE + PART_BYTES, "once: nothing of theirs is used"
    assert kept(bucket, upload.key)[0] == upload.path.read_bytes()
    assert not unfinished(bucket, upload.key)
    assert len(unfinished(bucket, other.key)) == 1
    assert multipart.abort_unfinished(bucket, "20261125_020000") == 1
    assert not unfinished(bucket, other.key)


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
def test_errors_of_the_server_in_the_middle(
    cuttable: Bucket, proxy: Proxy, make_file: MakeFile, status: int, code: str
) -> None:
    """Some parts are answered with the server's own errors: sent again."""
    upload, bucket = make_file(LARGE), dataclasses.replace(cuttable, patience_seconds=60.0)
    armed: list[bool] = []

    def tell(_: int) -> None:
        if not armed:
            armed.append(True)
            proxy.answer(status, code, times=4)

    upload_file(bucket, *upload, workers=1, tell=tell)
    assert proxy.faults == 4
    assert kept(bucket, upload.key)[0] == upload.path.read_bytes()


@pytest.mark.parametrize("size", [PART_BYTES, LARGE])
def test_altered_on_the_way(cuttable: Bucket, proxy: Proxy, make_file: MakeFile, size: int) -> None:
    """A flipped bit between here and the server: it refuses the body, which is sent again."""
    upload = make_file(size)
    proxy.alter_request()
    upload_file(dataclasses.replace(cuttable, patience_seconds=30.0), *upload)
    assert proxy.faults == 1
    assert kept(cuttable, upload.key)[0] == upload.path.read_bytes()


@pytest.mark.parametrize("size", [PART_BYTES, LARGE])
def test_altered_on_the_way_unnoticed(moto: S3Server, make_file: MakeFile, size: int) -> None:
    """A server that does not compare bodies with their signature: its ETag tells."""
    with Proxy(moto.port) as proxy:
        proxy.alter_request()
        with pytest.raises(VerificationFailed, match="the server kept something else"):
            upload_file(moto.bucket(endpoint=proxy.endpoint), *make_file(size))


def test_lost_answer_to_the_completion(cuttable: Bucket, proxy: Proxy, make_file: MakeFile) -> None:
    """The server makes the object and its answer is lost: asked again, it knows no such upload, and all is well."""
    upload = make_file(LARGE)

    def tell(_: int) -> None:  # the last part's: what follows is the completion
        proxy.cut_answers(after_bytes=1)

    upload_file(cuttable, *upload, workers=1, tell=lambda size: tell(size) if size < PART_BYTES else None)
    assert proxy.faults == 1
    assert kept(cuttable, upload.key)[0] == upload.path.read_bytes()
