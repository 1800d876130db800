"""Files: archived as they were read, restored beside with mode and owner, hostile archives refused, swapped by rename."""

from __future__ import annotations

import io
import os
import pwd
import shutil
import signal
import socket
import tarfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocks.places import Application
from runbook.errors import NotConfirmed, OpsError, VerificationFailed
from tasks.application import staged_files
from tasks.application.files import ARCHIVE, archive_files, directory_of, measure_files, read_archive_back
from tasks.application.staged_files import (
    build_files_copy,
    judge_files_backup,
    superseded_files,
    swap_files,
)
from tasks.backups import archive, catalogue, codec, entries, fetched_files, manifest
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Manifest
from tasks.host.disk import Disk
from tasks.stores.directory import DirectoryStore
from tests.fixtures import forked

IS_ROOT = os.geteuid() == 0
NOBODY = pwd.getpwnam("nobody")
NAME = "app_20261125_120000"


@pytest.fixture
def application(tmp_path: Path) -> Application:
    """A directory with every kind of file that an installation has."""
    live = tmp_path / "opt" / "grc"
    (live / "backend" / "uploads" / "応募 書類").mkdir(parents=True)
    (live / "backend" / "__pycache__").mkdir()
    (live / "backend" / "__pycache__" / "main.pyc").write_bytes(b"\0")
    (live / "backend" / "main.py").write_text("print('hello')\n")
    (live / "backend" / ".env").write_text("DATABASE_URL=secret\n")
    (live / "backend" / ".env").chmod(0o600)
    (live / "backend" / "run").write_text("#!/bin/sh\n")
    (live / "backend" / "run").chmod(0o4755)
    (live / "backend" / "uploads" / "応募 書類" / "履歴書.pdf").write_bytes(os.urandom(200_000))
    (live / "backend" / "uploads" / os.fsdecode(b"latin-\xe9.txt")).write_text("é")
    (live / "backend" / "empty").mkdir(mode=0o555)
    (live / "current").symlink_to("backend")
    (live / "python").symlink_to("/usr/bin/python3")
    (live / "dangling").symlink_to("gone")
    if IS_ROOT:
        os.chown(live / "backend" / "main.py", NOBODY.pw_uid, NOBODY.pw_gid)
    return Application(directory=str(live))


def backup_of(application: Application, store: Path, name: str = NAME) -> Backup:
    directory = store / name
    directory.mkdir(parents=True)
    archived = archive.write(directory_of(application), directory / ARCHIVE)
    seal(directory, archived)
    return catalogue.open_backup(DirectoryStore(store), name)


def seal(directory: Path, archived: entries.ArchivedFiles) -> Manifest:
    """Valid checksums for whatever is in the directory: sabotage is sealed too."""
    sealed = Manifest(
        kind="files",
        name=directory.name,
        environment="test",
        taken=datetime.now(UTC),
        seconds=1,
        host="h",
        tool="tar.zst",
        files=manifest.sums_of(directory),
        content=archived.model_dump(mode="json"),
    )
    manifest.write(directory, sealed)
    return sealed


def listing(directory: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for path in [directory, *entries.walk(directory)]:
        status = path.lstat()
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mode = 0 if path.is_symlink() else status.st_mode
        found[str(path.relative_to(directory))] = (mode, status.st_uid, status.st_gid, content)
    return found


def test_what_was_backed_up_comes_back_as_it_was(application: Application, tmp_path: Path) -> None:
    live = directory_of(application)
    before = listing(live)
    backup = backup_of(application, tmp_path / "store")
    judgement = judge_files_backup(application, backup)
    assert judgement.problems == ()
    assert judgement.entries == len(before)
    assert "python leads out of the directory, to /usr/bin/python3" in judgement.notes
    (live / "backend" / "main.py").write_text("broken")
    (live / "backend" / "run").unlink()

    copy = build_files_copy.work(application, backup)
    assert copy.differences == ()
    assert (live / "backend" / "main.py").read_text() == "broken", "the live files are untouched"
    swapped = swap_files.work(application, copy)

    assert listing(live) == before
    assert swapped.kept is not None
    assert (swapped.kept / "backend" / "main.py").read_text() == "broken"
    assert superseded_files(application) == [swapped.kept]
    assert not copy.path.exists()


def test_it_comes_back_where_nothing_is_left(application: Application, tmp_path: Path) -> None:
    backup = backup_of(application, tmp_path / "store")
    before = listing(directory_of(application))
    shutil.rmtree(directory_of(application))

    copy = build_files_copy.work(application, backup)
    assert swap_files.work(application, copy).kept is None

    assert listing(directory_of(application)) == before
    assert superseded_files(application) == []


@pytest.fixture
def linked(application: Application, tmp_path: Path) -> Application:
    """The same files as a release, to which a relative link leads: `opt/current` → `releases/42`."""
    releases = tmp_path / "opt" / "releases"
    releases.mkdir()
    Path(application.directory).rename(releases / "42")
    (tmp_path / "opt" / "current").symlink_to("releases/42")
    return Application(directory=str(tmp_path / "opt" / "current"))


def taken(application: Application, store: Path) -> Backup:
    """A backup by the steps of the flow."""
    (store / NAME).mkdir(parents=True)
    archived = archive_files.work(application, store / NAME)
    assert read_archive_back.work(store / NAME, archived.entries) == ()
    seal(store / NAME, archived)
    return catalogue.open_backup(DirectoryStore(store), NAME)


def test_where_a_link_leads_to_the_directory_the_directory_is_replaced(linked: Application, tmp_path: Path) -> None:
    link, live = Path(linked.directory), tmp_path / "opt" / "releases" / "42"
    before = listing(live)
    backup = taken(linked, tmp_path / "store")
    assert judge_files_backup(linked, backup).problems == ()
    (live / "backend" / "main.py").write_text("broken")
    shutil.rmtree(live / "backend" / "uploads")

    copy = build_files_copy.work(linked, backup)
    assert (copy.path, copy.differences) == (live.with_name("42.restoring"), ())
    assert (link / "backend" / "main.py").read_text() == "broken", "the live files are untouched"
    swapped = swap_files.work(linked, copy)

    assert str(link.readlink()) == "releases/42"
    assert listing(live) == before
    assert swapped.live == live
    assert swapped.kept is not None
    assert superseded_files(linked) == [swapped.kept]
    assert swapped.kept.name.startswith("42.superseded_")
    swapped.live.rename(copy.path)  # the undo that a report gives: two renames
    swapped.kept.rename(swapped.live)
    assert (link / "backend" / "main.py").read_text() == "broken"
    assert sorted(path.name for path in (tmp_path / "opt").iterdir()) == ["current", "releases"]


def test_where_a_link_leads_to_nothing_any_more_it_comes_back(linked: Application, tmp_path: Path) -> None:
    backup = taken(linked, tmp_path / "store")
    live = directory_of(linked)
    before = listing(live)
    shutil.rmtree(live)
    swapped = swap_files.work(linked, build_files_copy.work(linked, backup))
    assert swapped.kept is None
    assert Path(linked.directory).is_symlink()
    assert listing(live) == before


def test_a_link_that_was_changed_since_the_copy_was_built_is_not_followed(linked: Application, tmp_path: Path) -> None:
    copy = build_files_copy.work(linked, taken(linked, tmp_path / "store"))
    other = tmp_path / "opt" / "releases" / "43"
    other.mkdir()
    Path(linked.directory).unlink()
    Path(linked.directory).symlink_to(other)
    with pytest.raises(VerificationFailed, match=f"now links to another directory, {other}"):
        swap_files.work(linked, copy)
    assert list(other.iterdir()) == []
    assert superseded_files(linked) == []
    Path(linked.directory).unlink()
    Path(linked.directory).symlink_to("current")
    with pytest.raises(OpsError, match="is a circular link"):
        directory_of(linked)


def test_a_backup_of_a_link_is_refused_when_it_is_made_read_back_and_restored(
    linked: Application, tmp_path: Path
) -> None:
    """`.` as a link to a directory: nothing can be unpacked below it."""
    with pytest.raises(OpsError, match="is a link, not a directory"):
        archive.write(Path(linked.directory), tmp_path / "x.tar.zst")
    backup = taken(linked, tmp_path / "store")
    archived = entries.ArchivedFiles.model_validate(backup.manifest.content)
    root = archived.entries[0].model_copy(update={"kind": "symlink", "target": "releases/42"})
    forged = archived.model_copy(update={"entries": (root, *archived.entries[1:])})
    with tarfile.open(backup.path / ARCHIVE, "w:gz") as tar:
        _special(".", tarfile.SYMTYPE, "releases/42")(tar)
    assert "its root is no directory (symlink)" in read_archive_back.work(backup.path, forged.entries)
    seal(backup.path, forged)
    judgement = judge_files_backup(linked, catalogue.open_backup(DirectoryStore(backup.path.parent), NAME))
    assert judgement.problems == (f"{NAME} cannot be unpacked: its root is no directory (symlink)",)
    with pytest.raises(VerificationFailed, match="cannot be unpacked"):
        build_files_copy.work(linked, catalogue.open_backup(DirectoryStore(backup.path.parent), NAME))


def test_what_a_killed_build_left_is_removed(application: Application, tmp_path: Path) -> None:
    backup = backup_of(application, tmp_path / "store")
    left = directory_of(application).with_name("grc.restoring")
    (left / "locked").mkdir(parents=True)
    (left / "locked" / "stray").write_text("x")
    (left / "locked").chmod(0o000)
    copy = build_files_copy.work(application, backup)
    assert copy.differences == ()
    assert not (copy.path / "locked").exists()


def test_without_a_plan_nothing_is_written(application: Application, tmp_path: Path) -> None:
    backup = backup_of(application, tmp_path / "store")
    with pytest.raises(NotConfirmed):
        build_files_copy.bind(application, backup)()
    assert not directory_of(application).with_name("grc.restoring").exists()


def test_sockets_and_pipes_are_skipped_and_named(application: Application, tmp_path: Path) -> None:
    live = directory_of(application)
    os.mkfifo(live / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(live / "s.sock"))
        archived = archive.write(live, tmp_path / "x.tar.zst")
    assert set(archived.skipped) == {"pipe (pipe)", "s.sock (socket)"}
    assert not any("__pycache__" in entry.path for entry in archived.entries)
    assert archive.compare_members(tmp_path / "x.tar.zst", archived.entries) == []


@pytest.mark.parametrize("size", [1000, archive.IN_MEMORY_BYTES + 100_000], ids=["small", "large"])
def test_a_file_that_changes_while_it_is_read_is_consistent_with_its_hash(tmp_path: Path, size: int) -> None:
    live, target = tmp_path / "live", tmp_path / "x.tar.zst"
    live.mkdir()
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            with (live / "busy").open("wb") as file:
                file.write(os.urandom(1000) * (size // 1000))

    (live / "busy").write_bytes(bytes(size))
    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(5):
            archived = archive.write(live, target)
            assert archive.compare_members(target, archived.entries) == []
    finally:
        stop.set()
        writer.join()


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    (live / "big").write_bytes(bytes(archive.IN_MEMORY_BYTES * 2))

    class Shrinking(archive._Hashing):
        def read(self, size: int) -> bytes:
            os.truncate(live / "big", archive.IN_MEMORY_BYTES)
            return super().read(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_Hashing", Shrinking)
        archived = archive.write(live, tmp_path / "x.tar.zst")
    assert archived.changed == ("big changed while it was read",)
    assert archive.compare_members(tmp_path / "x.tar.zst", archived.entries) == []


def test_what_cannot_be_archived_is_an_error(application: Application, tmp_path: Path) -> None:
    with pytest.raises(OpsError, match="cannot be archived"):
        archive.write(tmp_path / "nowhere", tmp_path / "x.tar.zst")
    with pytest.raises(OpsError, match="names no directory"):
        measure_files(Application(), tmp_path)
    with pytest.raises(OpsError, match="is inside"):
        measure_files(application, directory_of(application) / "store")
    assert measure_files(application, tmp_path / "store").files == 5


# A hostile member: name, kind, link. Each is sealed with valid checksums.
Member = Callable[[tarfile.TarFile], None]


def _file(name: str, content: bytes = b"evil") -> Member:
    def add(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    return add


def _special(name: str, kind: bytes, link: str = "") -> Member:
    def add(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member)

    return add


HOSTILE: dict[str, tuple[Member, ...]] = {
    "absolute": (_file("/tmp/evil"),),
    "dotdot": (_file("../evil"),),
    "dotdot inside": (_file("backend/../../evil"),),
    "not named": (_file("evil"),),
    "link outside": (_special("evil", tarfile.SYMTYPE, "/etc"),),
    "named link elsewhere": (_special("current", tarfile.SYMTYPE, "/etc"),),
    "through a link": (_special("current", tarfile.SYMTYPE, "backend"), _file("current/main.py")),
    "hard link": (_special("backend", tarfile.DIRTYPE), _special("backend/main.py", tarfile.LNKTYPE, "/etc/passwd")),
    "device": (_special("backend", tarfile.DIRTYPE), _special("backend/main.py", tarfile.CHRTYPE)),
    "twice": (_special("backend", tarfile.DIRTYPE), _file("backend/run"), _file("backend/run")),
    "no parent": (_file("backend/main.py"),),
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(
    application: Application, tmp_path: Path, members: tuple[Member, ...]
) -> None:
    backup = backup_of(application, tmp_path / "store")
    with tarfile.open(backup.path / ARCHIVE, "w:gz") as tar:
        for add in (_special(".", tarfile.DIRTYPE), *members):
            add(tar)
    seal(backup.path, entries.ArchivedFiles.model_validate(backup.manifest.content))
    forged = catalogue.open_backup(DirectoryStore(backup.path.parent), NAME)
    assert judge_files_backup(application, forged).problems == (), "the checksums are valid"

    with pytest.raises(VerificationFailed, match="not this backup's"):
        build_files_copy.work(application, forged)
    assert not (tmp_path / "opt" / "evil").exists()
    assert not Path("/tmp/evil").exists()
    assert not (tmp_path / "evil").exists()


def test_a_manifest_that_leads_out_is_refused(application: Application, tmp_path: Path) -> None:
    backup = backup_of(application, tmp_path / "store")
    archived = entries.ArchivedFiles.model_validate(backup.manifest.content)
    forged = archived.entries[1].model_copy(update={"path": "../evil"})
    seal(backup.path, archived.model_copy(update={"entries": (*archived.entries, forged)}))
    judgement = judge_files_backup(application, catalogue.open_backup(DirectoryStore(backup.path.parent), NAME))
    assert any("leads out" in problem for problem in judgement.problems)


def _repack(backup: Backup, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes] | None]) -> None:
    with codec.reader(backup.path / ARCHIVE, 1 << 30) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        members = [(m, (tar.extractfile(m) or io.BytesIO()).read() if m.isfile() else b"") for m in tar]
    with tarfile.open(backup.path / ARCHIVE, "w:gz") as tar:
        for member, content in members:
            if changed := change(member, content):
                changed[0].size = len(changed[1])
                tar.addfile(changed[0], io.BytesIO(changed[1]))
    seal(backup.path, entries.ArchivedFiles.model_validate(backup.manifest.content))


SABOTAGE = {
    "content": (lambda m, c: (m, c.replace(b"hello", b"hacks")), "backend/main.py was altered: its SHA-256 differs"),
    "length": (lambda m, c: (m, c + b"#" if m.name == "backend/main.py" else c), "has 16 bytes instead of 15"),
    "missing": (lambda m, c: None if m.name == "backend/main.py" else (m, c), "backend/main.py is missing"),
}


@pytest.mark.parametrize(("change", "sentence"), SABOTAGE.values(), ids=SABOTAGE.keys())
def test_an_altered_archive_with_valid_checksums_is_found_and_never_swapped_in(
    application: Application,
    tmp_path: Path,
    change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes] | None],
    sentence: str,
) -> None:
    backup = backup_of(application, tmp_path / "store")
    _repack(backup, change)
    altered = catalogue.open_backup(DirectoryStore(backup.path.parent), NAME)
    assert archive.compare_members(altered.path / ARCHIVE, entries.entries_of(altered.manifest)) != []

    copy = build_files_copy.work(application, altered)

    assert any(sentence in difference for difference in copy.differences), copy.differences
    with pytest.raises(VerificationFailed, match="the copy differs"):
        swap_files.work(application, copy)
    assert directory_of(application).exists()


def test_the_wrong_mode_owner_or_link_on_disk_is_a_difference(application: Application, tmp_path: Path) -> None:
    live = directory_of(application)
    archived = archive.write(live, tmp_path / "x.tar.zst")
    assert entries.compare(live, archived.entries) == []
    (live / "backend" / ".env").chmod(0o644)
    (live / "current").unlink()
    (live / "current").symlink_to("uploads")
    (live / "new").write_text("x")
    if IS_ROOT:
        os.chown(live / "backend" / "main.py", 0, 0)
    found = entries.compare(live, archived.entries)
    assert "backend/.env has mode 0644 instead of 0600" in found
    assert "current leads to uploads instead of backend" in found
    assert "new is not in the manifest" in found
    assert any("main.py belongs to root" in sentence for sentence in found) is IS_ROOT


def test_a_truncated_archive_is_found_by_its_checksum_and_without_it(application: Application, tmp_path: Path) -> None:
    backup = backup_of(application, tmp_path / "store")
    path = backup.path / ARCHIVE
    path.write_bytes(path.read_bytes()[:-5000])
    assert any(
        "bytes instead of" in problem
        for problem in judge_files_backup(application, backup, fetched_files.verify_files(backup)).problems
    )
    seal(backup.path, entries.ArchivedFiles.model_validate(backup.manifest.content))
    with pytest.raises(VerificationFailed, match="cannot be read to its end"):
        build_files_copy.work(application, backup)


def test_no_space_is_said_before_anything_is_written(
    application: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = backup_of(application, tmp_path / "store")
    monkeypatch.setattr(staged_files, "disk_of", lambda _: Disk("", 0, 1000, 0))
    assert any("1000 are free" in problem for problem in judge_files_backup(application, backup).problems)
    with pytest.raises(OpsError, match="1000 are free"):
        build_files_copy.work(application, backup)
    assert not directory_of(application).with_name("grc.restoring").exists()


SWAP = """
import sys
from pathlib import Path
from blocks.places import Application
from tasks.backups import catalogue
from tasks.stores.directory import DirectoryStore
from tasks.application.staged_files import build_files_copy, swap_files
application = Application(directory=sys.argv[1])
backup = catalogue.open_backup(DirectoryStore(Path(sys.argv[2])), sys.argv[3])
swap_files.work(application, build_files_copy.work(application, backup))
"""


@pytest.mark.parametrize("point", ["before first rename", "between renames", "after second rename"])
def test_killed_at_any_rename_the_next_run_ends_well(application: Application, tmp_path: Path, point: str) -> None:
    backup = backup_of(application, tmp_path / "store")
    live = directory_of(application)
    before = listing(live)
    (live / "backend" / "main.py").write_text("broken")
    argv = ["-c", SWAP, application.directory, str(backup.path.parent), NAME]
    environment = {**os.environ, "OPS_FAILPOINT": f"files: {point}"}

    killed = forked.run(argv, environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert live.exists() is (point != "between renames")
    copy = build_files_copy.work(application, backup)
    swap_files.work(application, copy)

    assert listing(live) == before
    assert not copy.path.exists()
    assert any((kept / "backend" / "main.py").read_text() == "broken" for kept in superseded_files(application))
