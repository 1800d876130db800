"""The migrations inside a backup of the application's files, read for a plan."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.application.files import archive_in
from tasks.backups import archive
from tasks.backups import entries as listing
from tasks.backups.catalogue import Backup, hand_of
from tasks.backups.entries import ArchiveEntry
from tasks.migrations.scripts import INI, MigrationHeads, heads_of

SUFFIXES = (".py", ".ini", ".toml", ".cfg", ".mako")
INSTALLED = ("site-packages", "node_modules")
MOST_BYTES = 1 << 20


@probe
def read_packed_heads(application: Application, backup: Backup) -> MigrationHeads:
    """The migrations that a restore of this backup would run: its own scripts, not the live ones.

    Raises:
        OpsError: it has no Alembic environment, or its scripts are unreadable.
        VerificationFailed: the archive is damaged.
    """
    backend = backend_in(application) or PurePosixPath()
    place = hand_of(backup.store, backup.manifest.environment) / backup.name / "scripts"
    shutil.rmtree(place, ignore_errors=True)
    entries = listing.entries_of(backup.manifest)
    try:
        archive.unpack_some(archive_in(backup.path), place, entries, lambda entry: _is_script(entry, backend))
        return heads_of(application, place / backend)
    except OSError as error:
        message = f"the migrations in {backup.name} cannot be unpacked: {error.strerror}"
        raise OpsError(message, f"free disk space at {place.parent}") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def packs_alembic(application: Application, backup: Backup) -> bool:
    """Whether a backup of the application's files has an `alembic.ini` in the backend's directory."""
    backend = backend_in(application)
    wanted = str(backend / INI) if backend is not None else ""
    return bool(wanted) and any(entry.path == wanted for entry in listing.entries_of(backup.manifest))


def _is_script(entry: ArchiveEntry, backend: PurePosixPath) -> bool:
    path = PurePosixPath(entry.path)
    small = entry.size <= MOST_BYTES and path.suffix in SUFFIXES
    return small and path.is_relative_to(backend) and not set(path.parts) & set(INSTALLED)


def backend_in(application: Application) -> PurePosixPath | None:
    """The backend's directory relative to the application's; None if it is outside. Both can be links."""
    if not application.directory or not application.backend_directory:
        return None
    root, backend = Path(application.directory), Path(application.backend_directory)
    for directory, path in ((root, backend), (root.resolve(), backend.resolve())):
        if path.is_relative_to(directory):
            return PurePosixPath(path.relative_to(directory).as_posix())
    return None
