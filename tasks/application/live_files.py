"""The application's live files, compared with a backup of them: whether they are intact, and what was written since."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.places import Application
from runbook.kinds import probe
from tasks.application.files import directory_of
from tasks.backups import entries as listing
from tasks.backups.catalogue import Backup
from tasks.backups.entries import ArchiveEntry


@dataclass(frozen=True)
class LiveFiles:
    """`problems`: entries of the backup that are missing, or that changed without being written: as sentences.
    `written`: the paths that are new or were written since the backup; a restore of it would lose them."""

    problems: tuple[str, ...]
    written: tuple[str, ...]


@probe
def read_live_files(application: Application, backup: Backup) -> LiveFiles:
    """Compare every live file with the backup's manifest.

    Raises:
        VerificationFailed: the manifest lists no files.
        OSError: the directory cannot be read.
    """
    directory, entries = directory_of(application), listing.entries_of(backup.manifest)
    if not directory.is_dir():
        return LiveFiles((f"{directory} is missing",), ())
    named = {entry.path: entry for entry in entries}
    live = {listing.shown(path.relative_to(directory).as_posix()): path for path in listing.walk(directory)}
    problems = [f"{path} is missing" for path in named if path not in live and path != "."]
    written = [path for path in live if path not in named]
    both = [(live[path], entry) for path, entry in named.items() if path in live]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (path, entry), differs in zip(both, pool.map(_differs, both), strict=True):
            if not differs:
                continue
            if _written_at(path) > backup.manifest.taken:
                written.append(entry.path)
            else:
                problems.append(f"{entry.path} was altered without being written: {differs[0]}")
    return LiveFiles(tuple(problems), tuple(sorted(written)))


def _differs(pair: tuple[Path, ArchiveEntry]) -> Sequence[str]:
    return list(listing.differences(*pair))


def _written_at(path: Path) -> datetime:
    """When its content, its mode or its owner was changed last."""
    found = path.lstat()
    return datetime.fromtimestamp(max(found.st_mtime, found.st_ctime), UTC)
