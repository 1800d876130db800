"""A directory of archived WAL: listed while its archiver puts files there, and what it puts there."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest

from runbook.errors import VerificationFailed
from tasks.backups.encryption import Key
from tasks.wal.archive.archive import Archive, StoredSegment, written
from tasks.wal.archive.place import DirectoryPlace
from tasks.wal.archive.received import Frames

LISTINGS = 2000


def test_what_takes_the_place_of_another_file_meanwhile_is_not_missed(tmp_path: Path) -> None:
    """As the archiver does with what is written of a segment: the longer one first, then the shorter one goes."""
    place, done = DirectoryPlace(tmp_path), threading.Event()

    def write() -> None:
        number = 0
        while not done.wait(0.0002):
            (tmp_path / f"partial-{number + 1}").touch()
            (tmp_path / f"partial-{number}").unlink()
            number += 1

    (tmp_path / "partial-0").touch()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [len(place.names()) for _ in range(LISTINGS)]
    finally:
        done.set()
        writer.join()
    assert set(seen) <= {1, 2}


def test_a_segment_that_is_still_written_is_stored_as_it_is_whatever_part_of_it_is_zeros(tmp_path: Path) -> None:
    archive, frames, size = Archive(DirectoryPlace(tmp_path), Key()), Frames(), 4 << 20
    for end in (1, 8192, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 8192, size):
        content = (bytes(end // 2) + b"\x01" * (end - end // 2)).ljust(size, b"\0")
        assert written(content) == end
        packed = frames.compress(content, end)
        stored = archive.put_packed("000000010000000000000003", hashlib.sha256(content).hexdigest(), packed, end=end)
        assert stored.bytes < size / 100
        assert archive.get(stored) == content
    assert [written(content) for content in (b"", b"\0" * 3, b"ab\0\0", bytes(2 << 20))] == [0, 0, 2, 0]


NAME, SIZE = "000000010000000000000003", 1 << 20


def _stored(archive: Archive, content: bytes, end: int) -> StoredSegment:
    return archive.put(NAME, content[: end or SIZE].ljust(SIZE, b"\0"), end=end)


@pytest.mark.parametrize("end", [8192, 0], ids=["a longer unfinished one", "the finished one"])
def test_an_unfinished_segment_that_was_replaced_since_it_was_listed_is_read_from_what_replaced_it(
    tmp_path: Path, end: int
) -> None:
    """A recovery lists the archive while the archiver goes on: nothing is missing, the same bytes are in the other."""
    archive, wal = Archive(DirectoryPlace(tmp_path), Key()), random.Random(3).randbytes(SIZE)
    listed = _stored(archive, wal, 4096)
    _stored(archive, wal, end)
    archive.remove([listed])
    assert archive.get(listed) == wal[:4096].ljust(SIZE, b"\0")


def test_a_damaged_successor_does_not_hide_a_good_one(tmp_path: Path) -> None:
    archive, wal = Archive(DirectoryPlace(tmp_path), Key()), random.Random(3).randbytes(SIZE)
    listed = _stored(archive, wal, 4096)
    finished = _stored(archive, wal, 0)
    _stored(archive, wal, 8192)
    (tmp_path / finished.name).write_bytes(b"damaged")
    archive.remove([listed])
    assert archive.get(listed) == wal[:4096].ljust(SIZE, b"\0")


def test_an_unfinished_segment_is_not_read_from_another_server_s_wal(tmp_path: Path) -> None:
    archive, wal = Archive(DirectoryPlace(tmp_path), Key()), random.Random(3).randbytes(SIZE)
    listed = _stored(archive, wal, 4096)
    _stored(archive, bytes([wal[0] ^ 1]) + wal[1:], 8192)
    archive.remove([listed])
    with pytest.raises(VerificationFailed, match="is not in"):
        archive.get(listed)
