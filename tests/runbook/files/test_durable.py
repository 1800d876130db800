"""Files that are the old one or the new one, whenever their writer is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from runbook.files import durable
from runbook.run import runbook
from tests.runbook.system import System

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
    (file, named), last = asked
    assert (file.parent, file.suffix, named) == (tmp_path, ".new", False)
    assert last == (tmp_path, True)


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
    with pytest.raises(UnicodeEncodeError):
        durable.write(path, "new \udcff")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_planted_link_leads_a_writer_away(tmp_path: Path) -> None:
    """Whoever can write the directory could have root's files overwritten or given away: their names were known."""
    victim, path = tmp_path / "shadow", tmp_path / "conf" / "valkey.conf"
    path.parent.mkdir()
    victim.write_text("root's")
    victim.chmod(0o600)
    before = victim.stat()
    planted = [path, path.with_name(".valkey.conf.new"), path.with_name(".valkey.conf.switched"), path.with_name("log")]
    for link in planted:
        link.symlink_to(victim)
        if os.geteuid() == 0:
            os.chown(link, 12345, 12346, follow_symlinks=False)
    durable.write(path, "theirs", mode=0o644, owner=(12345, 12346))
    durable.write(path, "theirs, kept")
    with pytest.raises(OSError, match="symbolic links"):
        durable.append(path.with_name("log"))
    after = victim.stat()
    assert victim.read_text() == "root's"
    assert (after.st_uid, after.st_mode, after.st_ino) == (before.st_uid, before.st_mode, before.st_ino)
    assert path.read_text() == "theirs, kept"
    assert not path.is_symlink()
    link = path.with_name("other")
    link.symlink_to(victim)
    if os.geteuid() == 0:
        os.chown(link, 12345, 12346, follow_symlinks=False)
        durable.write(link, "x")
        assert link.stat().st_uid == 0, "it is nobody's who made a link"
        assert link.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    os.umask(before := os.umask(0))
    return before


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_reports_are_readable_for_their_group_and_for_nobody_else(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with runbook("Check something", System(reports_directory=tmp_path)):
            pass
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.suffix in (".json", ".md")}
    assert len(modes) == 2
    assert set(modes.values()) == {0o640}


def test_what_a_killed_writer_left_is_removed_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    path, left = tmp_path / "a[b]", tmp_path / ".a[b].01234567.new"
    left.write_text("secret")
    with durable.replacing(path) as file:
        file.write(b"first")
        durable.write(path, "second")
        assert not left.exists()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_tree_with_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in" / "it").mkdir(parents=True)
    (tmp_path / "in" / "file").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "nowhere")
    durable.sync_tree(tmp_path)
    with pytest.raises(FileNotFoundError):
        durable.sync(tmp_path / "in" / "link")
