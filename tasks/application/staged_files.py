"""A staged copy of the application's files: unpacked from a backup, compared, and swapped in.

It compares path, kind, mode, owner, size, content and link target. Hard links (each name becomes a separate file),
extended attributes and ACLs are not restored.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.places import Application
from runbook.current import leaves, removed
from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import durable
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.application.files import archive_in, directory_of
from tasks.backups import archive
from tasks.backups import entries as listing
from tasks.backups.catalogue import Backup, hand_of
from tasks.backups.entries import ArchiveEntry
from tasks.host.disk import disk_of
from tasks.stores.directory import told

REPLACE_FILES = "replace files"
RESTORING = ".restoring"
SUPERSEDED = ".superseded_"
BLOCK_BYTES = 4096


@dataclass(frozen=True)
class FilesJudgement:
    """Problems that prevent a restore, and the space that it needs."""

    problems: tuple[str, ...]
    entries: int
    bytes_needed: int
    bytes_free: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FilesCopy:
    """A staged copy alongside the live directory. `differences`: from the manifest; `notes`: other remarks."""

    path: Path
    backup: str
    entries: int
    bytes: int
    differences: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FilesSwapped:
    """The copy is live; the old directory is at `kept` (None: nothing was live)."""

    live: Path
    kept: Path | None


@probe
def judge_files_backup(application: Application, backup: Backup, damage: Sequence[str] = ()) -> FilesJudgement:
    """Whether a backup can be restored here: its files' `damage`, its manifest, free disk space, its directory."""
    directory = directory_of(application)
    problems = list(damage)
    entries: tuple[ArchiveEntry, ...] = ()
    try:
        entries = listing.entries_of(backup.manifest)
    except VerificationFailed as error:
        problems.append(error.message)
    if directory.is_mount():
        problems.append(f"{directory} is a mount point and cannot be renamed")
    if not directory.parent.is_dir():
        problems.append(f"{directory.parent} does not exist")
    needed = sum(entry.size + BLOCK_BYTES for entry in entries)
    free = disk_of(directory.parent).free_bytes
    if needed > free:
        problems.append(f"{needed} bytes are needed alongside {directory}, {free} are free")
    return FilesJudgement(tuple(problems), len(entries), needed, free, _notes(entries))


@action(of=lambda application: Act(REPLACE_FILES, application.directory), staged=True)
def build_files_copy(application: Application, backup: Backup) -> FilesCopy:
    """Unpack a backup alongside the live directory (`<dir>.restoring`) and compare it with the manifest.

    The copy of a killed run is deleted first. The live directory is not changed.

    Raises:
        VerificationFailed: the archive has a member that no backup has (a path outside the directory, a device, a file
            behind a link), or that is not in the manifest.
        OpsError: the disk is full, or a file cannot be written.
    """
    return _unpack(backup, _staged_path(directory_of(application)))


@action(idempotent=True)
def try_files(backup: Backup) -> FilesCopy:
    """Unpack a fetched backup into a directory of this run and compare it like a restore; then delete it.

    Raises:
        as `build_files_copy`.
    """
    place = hand_of(backup.store, backup.manifest.environment) / backup.name / "tried"
    try:
        with told(place):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        tried = _unpack(backup, place)
        failpoint("files: unpacked")
        return tried
    finally:
        if place.exists():
            _remove(place)


def _unpack(backup: Backup, copy: Path) -> FilesCopy:
    entries = listing.entries_of(backup.manifest)
    try:
        if copy.exists() or copy.is_symlink():
            _remove(copy)
        needed, free = sum(entry.size + BLOCK_BYTES for entry in entries), disk_of(copy.parent).free_bytes
        if needed > free:
            raise OpsError(f"{needed} bytes are needed in {copy.parent}, {free} are free", "free disk space there")
        leaves(f"directory {copy}", "the next restore-files deletes it")
        archive.unpack(archive_in(backup.path), copy, entries)
        differences = listing.compare(copy, entries)
    except OSError as error:
        raise OpsError(
            f"{copy} cannot be built: {error}", "fix this error, then run this again; the live files are unchanged"
        ) from None
    size = sum(entry.size for entry in entries)
    return FilesCopy(copy, backup.name, len(entries), size, tuple(differences), _notes(entries))


@action(of=lambda application: Act(REPLACE_FILES, application.directory))
def swap_files(application: Application, copy: FilesCopy) -> FilesSwapped:
    """Rename the live directory to `<dir>.superseded_<stamp>`, and the copy to its name.

    The services that use the live directory must be stopped: they would continue in the old one. After a kill between
    the renames no directory is live; building and swapping again fixes that.

    Raises:
        VerificationFailed: the copy differs from its backup, or the directory's link has another target now.
        OpsError: a rename is refused.
    """
    if copy.differences:
        raise VerificationFailed(f"the copy differs from {copy.backup}: {copy.differences[0]}", "take another backup")
    live = directory_of(application)
    if copy.path != _staged_path(live):
        raise VerificationFailed(f"{application.directory} now links to another directory, {live}", "run this again")
    swapped = exchange(live, copy.path, free_name(live) if live.exists() or live.is_symlink() else None)
    removed(f"directory {copy.path}")
    return swapped


def exchange(live: Path, incoming: Path, kept: Path | None) -> FilesSwapped:
    """Two renames: `live` becomes `kept` (None: nothing is live), `incoming` becomes `live`. If the second fails, the
    first is undone.

    Raises:
        OpsError: a rename is refused.
    """
    renamed = False
    try:
        failpoint("files: before first rename")
        if kept:
            live.rename(kept)
            renamed = True
        failpoint("files: between renames")
        incoming.rename(live)
        durable.sync(live.parent)
        failpoint("files: after second rename")
    except OSError as error:
        if kept and renamed and not live.exists():
            with contextlib.suppress(OSError):  # the first error is the one to report
                kept.rename(live)
        raise OpsError(
            f"{live} cannot be replaced: {error}", f"check the permissions of {live.parent}, then run this again"
        ) from None
    return FilesSwapped(live, kept)


def superseded_files(application: Application) -> list[Path]:
    """The directories that earlier swaps replaced, oldest first."""
    directory = directory_of(application)
    siblings = directory.parent.iterdir() if directory.parent.is_dir() else iter(())
    return sorted(path for path in siblings if path.name.startswith(directory.name + SUPERSEDED))


def _staged_path(live: Path) -> Path:
    return live.with_name(live.name + RESTORING)


def _notes(entries: Sequence[ArchiveEntry]) -> tuple[str, ...]:
    return (*listing.unknown_owners(entries), *listing.leads_out(entries))


def free_name(live: Path) -> Path:
    """A free name alongside the live directory: `<dir>.superseded_<UTC time>`."""

    def free() -> Path | None:
        path = live.with_name(f"{live.name}{SUPERSEDED}{datetime.now(UTC):%Y%m%d_%H%M%S}")
        return None if path.exists() else path

    found = until(free, what="a free name for the old files", seconds=5)
    assert found is not None
    return found


def _remove(path: Path) -> None:
    _delete(path)
    removed(f"directory {path}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inner in _directories(path):
            inner.chmod(0o700)  # a restored mode can forbid even its owner to empty it
        shutil.rmtree(path)
    else:
        path.unlink()


def _directories(path: Path) -> Iterator[Path]:
    yield path
    for root, names, _ in os.walk(path):
        for name in names:
            inner = Path(root) / name
            if not inner.is_symlink():
                inner.chmod(0o700)
                yield inner
