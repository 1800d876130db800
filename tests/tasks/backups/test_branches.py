"""Which of an archive's timelines is in use, where no server and no data directory is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import SecretStr

from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from tasks.backups.encryption import Key
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.place import DirectoryPlace
from tasks.wal.branch import Branches
from tasks.wal.format.names import Segment, lsn_text
from tests.fixtures.servers import binaries

SYSTEM, FORK = 7, 3 << 24
NOBODY = SecretStr("")
POSTGRES = Postgres(programs=str(binaries().postgres), database="e", user="e", password=NOBODY, admin_password=NOBODY)
ENV = cast(Any, SimpleNamespace(name="e", postgres=POSTGRES))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Timeline 1, without a commit in it."""
    found = Archive(DirectoryPlace(tmp_path), Key())
    found.put(Segment(3, 1).name, bytes(1 << 20))
    return found


def branch(archive: Archive, number: int, *parents: int) -> None:
    """A timeline that left the last of its parents at FORK; each of them left the one before it there too."""
    lines = "".join(f"{parent}\t{lsn_text(FORK)}\tno recovery target specified\n" for parent in parents)
    archive.put(f"{number:08X}.history", lines.encode())
    archive.put(Segment(3, number).name, bytes([number]) * (1 << 20))


def in_use(archive: Archive) -> int:
    return Branches.found(ENV, archive, archive.listing(), SYSTEM, of="another").in_use()


def test_promotions_in_one_line_need_no_record(archive: Archive) -> None:
    assert in_use(archive) == 1
    branch(archive, 2, 1)
    branch(archive, 3, 1, 2)
    assert in_use(archive) == 3


def test_the_record_decides_and_what_was_left_is_not_followed_again(archive: Archive) -> None:
    branch(archive, 2, 1)
    archive.note_in_use(2)
    archive.note_in_use(1)  # the undo
    assert in_use(archive) == 1
    archive.note_in_use(1)
    assert len([name for name in archive.place.names() if name.endswith(".in_use")]) == 2, "said once"
    branch(archive, 3, 1, 2)  # somebody started the replaced directory by hand, and promoted its standby
    assert in_use(archive) == 1
    branch(archive, 4, 1)  # a promotion that nobody recorded
    assert in_use(archive) == 4
    archive.note_in_use(1)
    assert in_use(archive) == 1


def test_of_two_branches_that_nobody_recorded_a_person_chooses(archive: Archive) -> None:
    branch(archive, 2, 1)
    branch(archive, 3, 1)
    with pytest.raises(OpsError, match="3 or 2") as caught:
        in_use(archive)
    assert "timeline=…" in str(caught.value)
