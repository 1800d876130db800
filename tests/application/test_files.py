"""backup_files: published whole or not at all, restorable, and honest about what it leaves out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blocks import toml
from flows.application.files import backup_files
from runbook.errors import RunbookFailed
from runbook.permit import Act, Permit
from runbook.report import Status
from tasks import archive, at_hand, catalogue
from tasks.files_copy import REPLACE_FILES, build_files_copy
from tasks.stores.directory import DirectoryStore
from tests.bits import flip

NAME = "trial"
ROOT = Path(__file__).parents[2]
TOML = """
name = "trial"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[backups]
files = "{base}/backups/files"
[application]
directory = "{base}/opt/grc"
"""


@pytest.fixture(autouse=True)
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The application's directory, and an environment that names it."""
    (tmp_path / "trial.toml").write_text(TOML.format(base=tmp_path))
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    directory = tmp_path / "opt" / "grc"
    (directory / "uploads").mkdir(parents=True)
    (directory / "main.py").write_text("print('hello')\n")
    (directory / "uploads" / "cv.pdf").write_bytes(os.urandom(50_000))
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "backups" / "files"


def test_a_backup_is_published_with_its_manifest_and_can_be_restored(live: Path, store: Path) -> None:
    report = backup_files.fn(NAME)

    assert report.status is Status.OK, report.sentence()
    [name] = catalogue.names(DirectoryStore(store), "files")
    assert report.facts["backup"] == name
    backup = catalogue.open_backup(DirectoryStore(store), name)
    assert at_hand.verify_files(backup) == []
    assert {entry["path"] for entry in backup.manifest.content["entries"]} == {
        ".",
        "main.py",
        "uploads",
        "uploads/cv.pdf",
    }
    application = toml.environment(NAME).application
    permit = Permit(NAME, (Act(REPLACE_FILES, application.directory),))
    assert build_files_copy(permit, application, backup).differences == ()


def test_a_directory_to_which_a_link_leads_is_backed_up_itself(live: Path, store: Path) -> None:
    live.rename(live.with_name("release-42"))
    live.symlink_to("release-42")
    report = backup_files.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    assert report.facts["directory"] == str(live.with_name("release-42"))
    backup = catalogue.open_backup(DirectoryStore(store), report.facts["backup"])
    application = toml.environment(NAME).application
    copy = build_files_copy(Permit(NAME, (Act(REPLACE_FILES, application.directory),)), application, backup)
    assert copy.differences == ()
    assert (copy.path / "main.py").read_text() == "print('hello')\n"


def test_what_is_left_out_is_in_the_report(live: Path) -> None:
    os.mkfifo(live / "pipe")
    report = backup_files.fn(NAME)
    [table] = [item for item in report.evidence if item.name == "Not in the backup"]
    assert table.rows == (("pipe (pipe)",),)


def test_an_archive_that_does_not_read_back_is_not_published(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = archive.write

    def damaging(directory: Path, target: Path) -> object:
        written = write(directory, target)
        flip(target)
        return written

    monkeypatch.setattr(archive, "write", damaging)
    with pytest.raises(RunbookFailed, match="archive read back"):
        backup_files.fn(NAME)
    assert catalogue.names(DirectoryStore(store), "files") == []


def test_a_missing_directory_and_a_store_inside_it_are_critical(live: Path, tmp_path: Path) -> None:
    text = (tmp_path / "trial.toml").read_text()
    (tmp_path / "trial.toml").write_text(text.replace("backups/files", "opt/grc/backups"))
    with pytest.raises(RunbookFailed, match="lies inside"):
        backup_files.fn(NAME)
    live.rename(live.with_name("elsewhere"))
    (tmp_path / "trial.toml").write_text(text)
    with pytest.raises(RunbookFailed, match="is not there"):
        backup_files.fn(NAME)


def test_a_killed_backup_is_never_offered_and_cleaned_by_the_next(store: Path) -> None:
    code = f"from flows.application.files import backup_files; backup_files.fn({NAME!r})"
    environment = {**os.environ, "OPS_FAILPOINT": "after archive_files"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert catalogue.names(DirectoryStore(store), "files") == []

    report = backup_files.fn(NAME)
    assert report.facts["removed unfinished backups"]
    assert len(catalogue.names(DirectoryStore(store), "files")) == 1
    assert list(store.glob(".partial-*")) == []
