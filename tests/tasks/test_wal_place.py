"""A directory of archived WAL is listed while its archiver puts files there and takes others away."""

from __future__ import annotations

import threading
from pathlib import Path

from tasks.wal.place import DirectoryPlace

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
