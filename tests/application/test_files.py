"""backup_files: published whole or not at all, restorable, and honest about what it leaves out."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from blocks.config import toml
from flows.application import files_swap
from flows.application.files import backup_files
from flows.application.files_restore import restore_files, undo_restore_files
from flows.database.backup import verify_backup
from runbook.errors import OpsError, RunbookFailed
from runbook.guard.loss import Loss
from runbook.report import Status
from runbook.wait import until
from tasks.application import live_files
from tasks.application.files import ARCHIVE
from tasks.application.staged_files import build_files_copy, superseded_files
from tasks.backups import archive, catalogue, fetched_files, manifest
from tasks.backups import entries as listing
from tasks.backups.entries import ArchiveEntry
from tasks.stores.directory import DirectoryStore
from tests.fixtures.bits import GZIP_BACKUPS, flip

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


def test_a_backup_of_the_earlier_gzip_form_is_verified_and_restored(live: Path, store: Path) -> None:
    [kept] = (GZIP_BACKUPS / "files").iterdir()
    shutil.copytree(kept, store / kept.name)
    sealed = manifest.read(store / kept.name)
    mine = {"user": "", "group": "", "uid": os.geteuid(), "gid": os.getegid()}
    entries = [entry | mine for entry in sealed.content["entries"]]
    manifest.write(store / kept.name, sealed.model_copy(update={"content": sealed.content | {"entries": entries}}))
    assert verify_backup.fn(NAME, kind="files").status in (Status.OK, Status.WARN)
    assert restore_files.fn(NAME, confirm=NAME).status in (Status.OK, Status.WARN)
    assert (live / "uploads" / "cv.pdf").read_bytes() == b"a cv\n" * 20


def test_a_backup_is_published_with_its_manifest_and_can_be_restored(live: Path, store: Path) -> None:
    report = backup_files.fn(NAME)

    assert report.status is Status.OK, report.sentence()
    [name] = catalogue.names(DirectoryStore(store), "files")
    assert report.facts["backup"] == name
    backup = catalogue.open_backup(DirectoryStore(store), name)
    assert fetched_files.verify_files(backup) == []
    assert {entry["path"] for entry in backup.manifest.content["entries"]} == {
        ".",
        "main.py",
        "uploads",
        "uploads/cv.pdf",
    }
    application = toml.environment(NAME).application
    assert build_files_copy.work(application, backup).differences == ()


def test_a_directory_to_which_a_link_leads_is_backed_up_itself(live: Path, store: Path) -> None:
    live.rename(live.with_name("release-42"))
    live.symlink_to("release-42")
    report = backup_files.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    assert report.facts["directory"] == str(live.with_name("release-42"))
    backup = catalogue.open_backup(DirectoryStore(store), report.facts["backup"])
    application = toml.environment(NAME).application
    copy = build_files_copy.work(application, backup)
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
    with pytest.raises(RunbookFailed, match="is inside"):
        backup_files.fn(NAME)
    live.rename(live.with_name("elsewhere"))
    (tmp_path / "trial.toml").write_text(text)
    with pytest.raises(RunbookFailed, match="does not exist"):
        backup_files.fn(NAME)


def test_a_killed_backup_is_never_offered_and_cleaned_by_the_next(store: Path) -> None:
    assert killed(lambda: backup_files.fn(NAME), "after archive_files")
    assert catalogue.names(DirectoryStore(store), "files") == []

    report = backup_files.fn(NAME)
    assert report.facts["removed unfinished backups"]
    assert len(catalogue.names(DirectoryStore(store), "files")) == 1
    assert list(store.glob(".partial-*")) == []


def states(live: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, owner and content of every file."""
    found = (path for path in live.rglob("*") if path.is_file())
    return {str(p.relative_to(live)): (p.stat().st_mode, p.stat().st_uid, p.read_bytes()) for p in found}


def forked(run: Callable[[], object], **variables: str) -> int:
    """The exit status of a run in a process of its own, which has everything imported already."""
    if (pid := os.fork()) == 0:
        os.environ.update(variables)
        try:
            run()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def reached(run: Callable[[], object], log: Path) -> list[str]:
    """Every failpoint at which files are changed, in order."""
    forked(run, OPS_FAILPOINT_LOG=str(log))
    return [name for name in dict.fromkeys(log.read_text().splitlines()) if "files" in name]


def killed(run: Callable[[], object], point: str) -> bool:
    return os.WTERMSIG(forked(run, OPS_FAILPOINT=point)) == signal.SIGKILL


def test_files_are_restored_alone_undone_and_survive_a_kill_at_every_failpoint(
    live: Path, store: Path, tmp_path: Path
) -> None:
    application = toml.environment(NAME).application
    (live / "uploads" / "cv.pdf").chmod(0o640)
    name, good = backup_files.fn(NAME).facts["backup"], states(live)
    (live / "main.py").unlink()
    (live / "uploads" / "cv.pdf").chmod(0o604)
    (live / "uploads" / "new.pdf").write_text("written since the backup")
    damaged = states(live)

    plan = restore_files.fn(NAME)
    assert (plan.status, plan.pins["backup"], states(live)) == (Status.PLANNED, name, damaged)
    report = restore_files.fn(NAME, backup=name, confirm=NAME)
    assert (report.status, states(live)) == (Status.OK, good), report.sentence()
    [aside] = superseded_files(application)
    assert report.facts["undo"] == f"undo-restore-files with kept={aside.name}"
    assert states(aside) == damaged
    assert catalogue.open_backup(DirectoryStore(store), name).verified

    (live / "uploads" / "later.pdf").write_text("written since the restore")
    os.utime(live / "uploads" / "later.pdf", (time.time() + 60, time.time() + 60))
    plan = undo_restore_files.fn(NAME)
    assert (plan.status, plan.pins["kept"]) == (Status.PLANNED, aside.name)
    assert ("uploads/later.pdf",) in [row for kept in plan.evidence for row in kept.rows]
    report = undo_restore_files.fn(NAME, kept=aside.name, confirm=NAME)
    assert (report.status, states(live)) == (Status.WARN, damaged), report.sentence()
    restored = good | {"uploads/later.pdf": states(superseded_files(application)[-1])["uploads/later.pdf"]}
    assert states(superseded_files(application)[-1]) == restored

    restore, undo = partial(restore_files.fn, NAME, confirm=NAME), partial(undo_restore_files.fn, NAME, confirm=NAME)
    points = reached(restore, tmp_path / "points")
    assert {"files: between renames", "before swap_files", "after build_files_copy"} <= set(points)
    for point in points:
        for old in (live, *superseded_files(application)):
            shutil.rmtree(old)
        live.mkdir()
        (live / "main.py").write_text(point)
        assert killed(restore, point), point
        assert restore().status is Status.OK, point
        assert states(live) == good, point
        assert point in [(old / "main.py").read_text() for old in superseded_files(application)], point
        assert not live.with_name("grc.restoring").exists(), point

    (live / "main.py").write_text("restored")
    points = reached(undo, tmp_path / "undo-points")
    assert {"files: between renames", "after swap_files_back"} <= set(points)
    for number, point in enumerate(points[points.index("before swap_files_back") :]):
        (live / "main.py").write_text(f"before undo {number}")
        wanted = states(superseded_files(application)[-1])
        assert killed(undo, point), point
        assert undo().status in (Status.OK, Status.WARN), point
        assert states(live) == wanted, point
        assert (superseded_files(application)[-1] / "main.py").read_text() == f"before undo {number}", point


def test_damage_is_found_before_anything_is_replaced(live: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, good = backup_files.fn(NAME).facts["backup"], states(live)

    def altered(directory: Path, entries: Sequence[ArchiveEntry]) -> list[str]:
        (directory / "main.py").chmod(0o777)
        return compare(directory, entries)

    compare = listing.compare
    with monkeypatch.context() as patch:
        patch.setattr(listing, "compare", altered)
        with pytest.raises(RunbookFailed, match="files equal to the backup: main.py has mode 0777"):
            restore_files.fn(NAME, confirm=NAME)
    flip(store / name / ARCHIVE)
    with pytest.raises(RunbookFailed, match=f"files of {name}"):
        restore_files.fn(NAME)
    with pytest.raises(OpsError, match="no restore has replaced application files"):
        undo_restore_files.fn(NAME)
    assert (states(live), superseded_files(toml.environment(NAME).application)) == (good, [])


def meanwhile(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Do this once, when the run is confirmed and the application is stopped."""
    real, todo = files_swap.pass_files, [work]

    def passing(*given: Any) -> Loss:
        while todo:
            todo.pop()()
        return real(*given)

    monkeypatch.setattr(files_swap, "pass_files", passing)


def another_tree(live: Path) -> None:
    """Somebody puts other files in the place of the live ones, which were written before the plan."""
    live.rename(live.with_name("replaced"))
    live.with_name("other").rename(live)


def test_the_changes_that_a_restore_loses_are_counted_with_their_times(live: Path) -> None:
    """Those since the backup, and those that a client makes until the swap; not what only was touched."""
    backup_files.fn(NAME)
    (live / "main.py").touch()
    (live / "uploads" / "new.pdf").write_text("written since the backup")
    plan = restore_files.fn(NAME)
    assert "1 changed file of the files is lost (" in plan.headline, plan.headline
    assert "later writes are added" in plan.headline
    written = dict[str, float]()

    def write(ended: threading.Event) -> None:
        while not ended.wait(0.001):
            name = f"uploads/{len(written)}.txt"
            with contextlib.suppress(FileNotFoundError):  # between the two renames
                (live / name).write_text("x")
                written[name] = time.time()

    ended = threading.Event()
    client = threading.Thread(target=write, args=(ended,))
    client.start()
    try:
        until(lambda: len(written) > 20, what="files", seconds=60)
        loss = restore_files.fn(NAME, confirm=NAME).losses["the files"]
    finally:
        ended.set()
        client.join()
    lost = [name for name in written if not (live / name).exists()]
    assert loss.count == len(lost) + 1
    assert loss.first
    assert loss.last
    assert loss.later
    assert loss.first.timestamp() <= min(written[name] for name in lost)
    assert loss.last.timestamp() >= max(written[name] for name in lost) - 0.1


def test_a_restore_that_would_lose_more_than_its_plan_said_replaces_nothing(
    live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeded failure: other files are live by then, and older than the plan."""
    other = live.with_name("other")
    shutil.copytree(live, other)
    (other / "main.py").write_text("print('another release')\n")
    backup_files.fn(NAME)
    (other / "uploads" / "cv.pdf").write_text("written since the backup")
    time.sleep(0.2)
    meanwhile(monkeypatch, lambda: another_tree(live))
    with pytest.raises(
        RunbookFailed, match="1 changed file of the files is lost .*, but the plan said: 0 changed files"
    ):
        restore_files.fn(NAME, confirm=NAME)
    assert (live / "uploads" / "cv.pdf").read_text() == "written since the backup"
    assert superseded_files(toml.environment(NAME).application) == []


def test_an_undo_that_would_lose_more_than_its_plan_said_replaces_nothing(
    live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts the files written since the restore, and no others."""
    (live / "current").symlink_to("main.py")
    for path in (live / "main.py", live / "uploads" / "cv.pdf"):
        os.utime(path, (time.time() - 60, time.time() - 60))
    backup_files.fn(NAME)
    restore_files.fn(NAME, confirm=NAME)
    plan = undo_restore_files.fn(NAME)
    assert "0 changed files of the files are lost as of" in plan.headline, plan.headline
    time.sleep(1.1)  # the name of the replaced directory has whole seconds
    (live / "main.py").write_text("print('since')\n")
    plan = undo_restore_files.fn(NAME)
    assert "1 changed file of the files is lost (" in plan.headline, plan.headline
    other = live.with_name("other")
    shutil.copytree(live, other, symlinks=True)
    (other / "uploads" / "new.pdf").write_text("written since the restore")
    time.sleep(0.2)
    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: another_tree(live))
        with pytest.raises(
            RunbookFailed, match="changed files of the files are lost .*, but the plan said: 1 changed file"
        ):
            undo_restore_files.fn(NAME, confirm=NAME)
    assert (live / "uploads" / "new.pdf").exists()
    loss = undo_restore_files.fn(NAME, confirm=NAME).losses["the files"]
    assert loss.count
    assert not (live / "uploads" / "new.pdf").exists()


def test_changes_that_cannot_be_counted_are_everything_since_the_backup(
    live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that counted is not enough for a run that cannot."""
    backup_files.fn(NAME)

    def walk(_: Path) -> NoReturn:
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: patch.setattr(live_files.listing, "walk", walk))
        with pytest.raises(RunbookFailed, match="the loss of the files is unknown, because"):
            restore_files.fn(NAME, confirm=NAME)
    assert (live / "main.py").exists()
    shutil.rmtree(live)
    plan = restore_files.fn(NAME)
    assert "writes of the files of the last" in plan.headline, plan.headline
