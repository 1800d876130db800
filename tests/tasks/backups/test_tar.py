"""What tar's end means: a damaged backup, this host's own trouble, or a death. Only the first says so of the backup."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from runbook.errors import OpsError, VerificationFailed
from tasks.cluster.catalog import find_in_backup
from tasks.cluster.unpack import BASE, WAL, unpack_tar

WHOLE = 300_000
# GNU tar 1.35 in LC_ALL=C: what it prints, and how it ends.
TROUBLE = {
    "disk": ("tar: base/1/2619: Cannot write: No space left on device; exit 2", "the disk is full at"),
    "quota": ("tar: base/1: Cannot mkdir: Disk quota exceeded; exit 2", "cannot be unpacked into"),
    "rights": ("tar: base: Cannot mkdir: Permission denied; exit 2", "cannot be unpacked into"),
    "read-only": ("tar: base: Cannot mkdir: Read-only file system; exit 2", "cannot be unpacked into"),
    "memory": ("tar: Cannot allocate memory; exit 2", "cannot be unpacked into"),
    "killed": ("; kill -9 $$", "tar was killed by signal 9"),
    "unzip": ("tar (child): gzip: Cannot exec: No such file or directory; exit 2", "gzip"),
}


def backup(directory: Path) -> Path:
    """Two tars, as pg_basebackup writes them."""
    directory.mkdir()
    for name in (BASE, WAL):
        with tarfile.open(directory / name, "w:gz", compresslevel=0) as archive:
            entry = tarfile.TarInfo("PG_VERSION")
            entry.size = WHOLE
            archive.addfile(entry, io.BytesIO(b"1" * WHOLE))
    return directory


def test_a_whole_one_is_unpacked_and_a_damaged_one_is_not_whole(tmp_path: Path) -> None:
    source = backup(tmp_path / "backup")
    unpack_tar(source, tmp_path / "data")
    assert (tmp_path / "data" / "pg_wal" / "PG_VERSION").stat().st_size == WHOLE
    content = (source / BASE).read_bytes()
    for number, damaged in enumerate((content[: WHOLE // 2], b"x" * 1000, content[:200] + b"!" + content[201:])):
        (source / BASE).write_bytes(damaged)
        with pytest.raises(VerificationFailed, match="cannot be unpacked: "):
            unpack_tar(source, tmp_path / f"data-{number}")
    with pytest.raises(VerificationFailed, match="the catalog of b cannot be read"):
        find_in_backup(source, "grc", "users", tmp_path, "b")


@pytest.mark.parametrize("trouble", TROUBLE)
def test_this_host_s_own_trouble_makes_no_backup_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A stand-in for tar says what tar says: no test may fill this host's disk."""
    said, told = TROUBLE[trouble]
    text, _, end = said.partition("; ")
    (tmp_path / "bin").mkdir()
    tar = tmp_path / "bin" / "tar"
    tar.write_text(f"#!/bin/sh\necho '{text}' >&2\n{end}\n")
    tar.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    source = backup(tmp_path / "backup")
    for work in (
        lambda: unpack_tar(source, tmp_path / "data"),
        lambda: find_in_backup(source, "grc", "users", tmp_path, "b"),
    ):
        with pytest.raises(OpsError, match=told) as error:
            work()  # type: ignore[no-untyped-call]
        assert not isinstance(error.value, VerificationFailed)
        assert error.value.hint
