"""The application's files: their directory, their size, and the archive of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import action, probe
from tasks.backups import archive, codec
from tasks.backups import entries as listing
from tasks.backups.entries import ArchivedFiles, ArchiveEntry
from tasks.host.disk import disk_of

ARCHIVE = f"files.tar{codec.ENDING}"
OLD_ARCHIVE = "files.tar.gz"
"""Of versions before zstd."""


@dataclass(frozen=True)
class FilesSize:
    """The files to archive, and the free disk space of the store."""

    files: int
    bytes: int
    free_bytes: int


def directory_of(application: Application) -> Path:
    """The application's real directory; the configured path may be a symbolic link to it (`current` → a release).
    Backups and restores use this directory; the link is never changed.

    Raises:
        OpsError: the environment names none, or the link is circular.
    """
    if not application.directory:
        raise OpsError("the environment names no directory of the application", "add [application] directory")
    directory = Path(os.path.realpath(application.directory))
    if directory.is_symlink():
        raise OpsError(f"{application.directory} is a circular link", "correct the link")
    return directory


@probe
def measure_files(application: Application, store: Path) -> FilesSize:
    """Count the files of a backup, and read the store's free disk space.

    Raises:
        OpsError: the directory does not exist, or the store is inside it.
    """
    directory = directory_of(application)
    if not directory.is_dir():
        raise OpsError(f"{directory} does not exist", "correct [application] directory, or restore the files first")
    if store.resolve().is_relative_to(directory.resolve()):
        raise OpsError(f"the store {store} is inside {directory}", "move the store: a backup must not contain backups")
    sizes = [path.lstat().st_size for path in listing.walk(directory) if path.is_file() and not path.is_symlink()]
    return FilesSize(len(sizes), sum(sizes), disk_of(store).free_bytes)


def archive_in(backup: Path) -> Path:
    """The archive in a backup's directory."""
    old = backup / OLD_ARCHIVE
    return old if old.exists() else backup / ARCHIVE


@action
def archive_files(application: Application, unfinished: Path) -> ArchivedFiles:
    """Write the application's directory to `files.tar.zst` of an unfinished backup.

    Raises:
        OpsError: a file cannot be read, or the store is full.
    """
    return archive.write(directory_of(application), unfinished / ARCHIVE)


@probe
def read_archive_back(unfinished: Path, entries: tuple[ArchiveEntry, ...]) -> tuple[str, ...]:
    """Read an archive like a restore does, and compare each member with its entry; returns the differences."""
    return tuple(archive.compare_members(archive_in(unfinished), entries))
