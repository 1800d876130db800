"""Files that are the old one or the new one, whenever their writer is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from runbook import durable

BYTES = 1 << 20


def killed_while_it_writes(path: Path, moment: int) -> None:
    """A process that writes A's and B's in turn, killed somewhere in its n-th file."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for letter in "AB" * 1000:
            os.write(writing, b".")
            durable.write(path, letter * BYTES)
        os._exit(0)
    os.close(writing)
    for _ in range(moment):
        os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)


def test_it_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "record"
    durable.write(path, "A" * BYTES)
    for moment in range(1, 31):
        killed_while_it_writes(path, moment)
        content = path.read_text()
        assert content in ("A" * BYTES, "B" * BYTES), f"{len(content)} bytes of {set(content)}"


def test_its_content_is_on_disk_before_its_name_and_its_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel is asked for, in order: after a power cut the name must not lead to an empty file."""
    path, kernel, asked = tmp_path / "record", os.fsync, []

    def fsync(descriptor: int) -> None:
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
        kernel(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.write(path, "x")
    assert asked == [(tmp_path / ".record.new", False), (tmp_path, True)]


def test_it_keeps_mode_and_owner(tmp_path: Path) -> None:
    """A configuration that its server's user may read stays so, and a secret one is never readable for others."""
    path = tmp_path / "valkey.conf"
    path.write_text("old")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12346)
    before = path.stat()
    durable.write(path, "requirepass s3cret")
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino, "written over, not replaced"
    assert not list(tmp_path.glob(".*"))


def test_it_is_as_before_where_it_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_text("old")
    (tmp_path / ".record.new").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.write(path, "new")
    assert path.read_text() == "old"


def test_a_tree_with_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in" / "it").mkdir(parents=True)
    (tmp_path / "in" / "file").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "nowhere")
    durable.sync_tree(tmp_path)
    with pytest.raises(FileNotFoundError):
        durable.sync(tmp_path / "in" / "link")
