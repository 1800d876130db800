"""verify_backup of the files: really unpacked, every entry compared, nothing left; what prune_backups goes by."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from pyrage import x25519

from flows.application.files import backup_files
from flows.database.backup import verify_backup
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.application import files, staged_files
from tasks.application.files import ARCHIVE
from tasks.backups import catalogue, manifest
from tasks.host.disk import Disk, disk_of
from tasks.stores.directory import DirectoryStore
from tests.application.test_files import NAME, live, store
from tests.fixtures import forked

__all__ = ["live", "store"]


@pytest.fixture
def backup(live: Path, tmp_path: Path) -> str:
    """A backup of files of which one forbids even its owner to write there; the live directory is gone since."""
    path = tmp_path / "trial.toml"
    path.write_text(path.read_text().replace("[backups]", f'[backups]\nspool = "{tmp_path}/spool"'))
    (live / "closed").mkdir()
    (live / "closed" / "file").write_text("x")
    (live / "closed").chmod(0o500)
    name = backup_files.fn(NAME).facts["backup"]
    live.rename(live.with_name("gone"))
    return name


def left(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]


def test_a_backup_is_verified_by_unpacking_it_and_leaves_nothing_behind(
    backup: str, store: Path, tmp_path: Path
) -> None:
    report = verify_backup.fn(NAME, kind="files")
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert catalogue.open_backup(DirectoryStore(store), backup).verified
    assert verify_backup.fn(NAME, backup=backup).status in (Status.OK, Status.WARN)
    assert left(tmp_path) == []
    assert sorted(path.name for path in (tmp_path / "opt").iterdir()) == ["gone"], "nothing beside the live directory"


@pytest.mark.parametrize("kind", ["a byte", "an entry"])
def test_a_bad_backup_is_not_verified(backup: str, store: Path, tmp_path: Path, kind: str) -> None:
    catalogue.mark_verified.work(DirectoryStore(store), backup, {"by": "test"})
    whole = catalogue.open_backup(DirectoryStore(store), backup).manifest
    if kind == "a byte":
        content = bytearray((store / backup / ARCHIVE).read_bytes())
        content[len(content) // 2] ^= 1
        (store / backup / ARCHIVE).write_bytes(content)
    else:
        entries = whole.content["entries"]
        [entry] = [entry for entry in entries if entry["path"] == "main.py"]
        entry["sha256"] = "0" * 64
        changed = whole.model_copy(update={"content": {**whole.content, "entries": entries}})
        manifest.write(store / backup, changed)
    said = {"a byte": "SHA-256", "an entry": "main.py has another content"}[kind]
    with pytest.raises(RunbookFailed, match=said):
        verify_backup.fn(NAME, kind="files")
    assert not catalogue.open_backup(DirectoryStore(store), backup).verified
    assert left(tmp_path) == []


def test_what_does_not_come_out_as_it_went_in_is_not_verified(
    backup: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is whole, and this host cannot restore it as it was: here, as if chmod did nothing."""
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    with pytest.raises(RunbookFailed, match="unpacked files equal to the backup: .*mode"):
        verify_backup.fn(NAME, kind="files")
    assert not catalogue.open_backup(DirectoryStore(store), backup).verified
    assert left(tmp_path) == []


def test_what_a_killed_verification_unpacked_goes_with_the_next(backup: str, tmp_path: Path) -> None:
    code = f"from flows.database.backup import verify_backup; verify_backup.fn({NAME!r}, kind='files')"
    environment = {**os.environ, "OPS_FAILPOINT": "files: unpacked"}
    killed = forked.run(["-c", code], environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert left(tmp_path)
    verify_backup.fn(NAME, kind="files")
    assert left(tmp_path) == []


def test_there_must_be_room(backup: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_files, "disk_of", lambda _: Disk("", 0, 1000, 0))
    with pytest.raises(RunbookFailed, match="bytes are needed in .*, 1000 are free"):
        verify_backup.fn(NAME, kind="files")


def test_a_key_of_which_there_is_no_second_is_told(live: Path, tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    key = x25519.Identity.generate().to_public()
    path.write_text(path.read_text().replace("[backups]", f'[backups]\nrecipients = ["{key}"]'))
    report = backup_files.fn(NAME)
    assert {"escrowed key", "key of the backups"} <= {found.name for found in report.findings}


def test_what_a_killed_backup_left_does_not_take_the_room_of_the_next(
    live: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_there = store / f".partial-{NAME}-app_20260101_000000"
    left_there.mkdir(parents=True)
    (left_there / ARCHIVE).write_bytes(b"x")

    def small(path: Path) -> Disk:
        found = disk_of(path)
        return replace(found, free_bytes=0) if left_there.exists() else found

    monkeypatch.setattr(files, "disk_of", small)
    assert backup_files.fn(NAME).status is Status.OK
    assert not left_there.exists()
