"""A directory of archived WAL: listed while its archiver puts files there, and what it puts there."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from tasks.backups.encryption import Key
from tasks.wal.archive.archive import Archive, written
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
