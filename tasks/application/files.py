"""The application's files: where they are, how much there is, and one archive of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import action, probe
from tasks.backups import archive
from tasks.backups import entries as listing
from tasks.backups.entries import Archived, Entry
from tasks.host.disk import disk_of

ARCHIVE = "files.tar.gz"


@dataclass(frozen=True)
class FilesSize:
    """How much there is to archive, and how much space the store has."""

    files: int
    bytes: int
    free_bytes: int


def directory_of(application: Application) -> Path:
    """The application's directory itself, where the configured path is a symbolic link to it (`current` → a release):
    what is backed up, replaced and kept aside. The link is never touched.

    Raises:
        OpsError: the environment names none, or its links lead in a circle.
    """
    if not application.directory:
        raise OpsError("the environment names no directory of the application", "add [application] directory")
    directory = Path(os.path.realpath(application.directory))
    if directory.is_symlink():
        raise OpsError(f"{application.directory} is a link that leads to itself", "correct the link")
    return directory


@probe
def measure_files(application: Application, store: Path) -> FilesSize:
    """Count what a backup would read, and the store's free space.

    Raises:
        OpsError: the directory is not there, or the store lies in it.
    """
    directory = directory_of(application)
    if not directory.is_dir():
        raise OpsError(f"{directory} is not there", "correct [application] directory, or restore the files first")
    if store.resolve().is_relative_to(directory.resolve()):
        raise OpsError(f"the store {store} lies inside {directory}", "move it: a backup must not contain backups")
    sizes = [path.lstat().st_size for path in listing.walk(directory) if path.is_file() and not path.is_symlink()]
    return FilesSize(len(sizes), sum(sizes), disk_of(store).free_bytes)


@action
def archive_files(application: Application, unfinished: Path) -> Archived:
    """Write `files.tar.gz` of the application's directory into an unfinished backup.

    Raises:
        OpsError: a file cannot be read, or the store is full.
    """
    return archive.write(directory_of(application), unfinished / ARCHIVE)


@probe
def read_archive_back(unfinished: Path, entries: tuple[Entry, ...]) -> tuple[str, ...]:
    """Read an archive as a restore will, and compare each member with its entry; returns differences as sentences."""
    return tuple(archive.compare_members(unfinished / ARCHIVE, entries))
