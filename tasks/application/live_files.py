"""The application's live files, compared with a backup of them: whether they are intact, and what was written since."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

from blocks.places import Application
from runbook import metrics
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.units import first_of
from tasks.application.files import directory_of
from tasks.backups import entries as listing
from tasks.backups.catalogue import Backup
from tasks.backups.entries import ArchiveEntry


@dataclass(frozen=True)
class LiveFiles:
    """`problems`: entries of the backup that changed without being written, or that the directory is missing, as
    sentences. `written`: the paths that are new or were written since the backup; a restore of it would lose them.
    `missing`: entries that are not there, of `entries` in the backup. `emptied`: directories that lost all of several
    entries: users delete files, accidents delete directories."""

    problems: tuple[str, ...]
    written: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    entries: int = 0
    emptied: tuple[str, ...] = ()


@probe
def read_live_files(application: Application, backup: Backup) -> LiveFiles:
    """Compare every live file with the backup's manifest.

    Raises:
        VerificationFailed: the manifest lists no files.
        OSError: the directory cannot be read.
    """
    directory, entries = directory_of(application), listing.entries_of(backup.manifest)
    if not directory.is_dir():
        return LiveFiles((f"{directory} is missing",))
    named = {entry.path: entry for entry in entries}
    live = {listing.shown(path.relative_to(directory).as_posix()): path for path in listing.walk(directory)}
    missing, problems = [path for path in named if path not in live and path != "."], list[str]()
    written = [path for path in live if path not in named]
    both = [(live[path], entry) for path, entry in named.items() if path in live]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (path, entry), differs in zip(both, pool.map(_differs, both), strict=True):
            if not differs:
                continue
            if _changed_at(path.lstat()) > backup.manifest.taken:
                written.append(entry.path)
            else:
                problems.append(f"{entry.path} was altered without being written: {differs[0]}")
    emptied = _emptied(named, missing)
    return LiveFiles(tuple(problems), tuple(sorted(written)), tuple(missing), len({*named} - {"."}), emptied)


def _emptied(entries: Collection[str], missing: Collection[str]) -> tuple[str, ...]:
    """The directories of a backup that lost all of several entries."""
    before, lost = (
        Counter(PurePosixPath(path).parent for path in paths if path != ".") for paths in (entries, missing)
    )
    return tuple(str(directory) for directory, count in lost.items() if count > 1 and count == before[directory])


@probe
def read_changes(directory: Path, backup: Backup) -> Mapping[str, datetime]:
    """The files of a live directory that a restore of `backup` would set back, and when each was changed last: new
    ones, and those that were written since and differ from the backup.

    Raises:
        VerificationFailed: the manifest lists no files.
        OpsError: files were deleted by the directory: nobody knows which changes were among them.
        OSError: the directory cannot be read.
    """
    named = {entry.path: entry for entry in listing.entries_of(backup.manifest)}
    files = {name: (path, found) for name, path, found in _files(directory)}
    missing = [name for name in named if name not in files and not (directory / name).exists()]
    if _emptied(named, missing) or len(missing) > metrics.BACKUP_SHRUNK.warn * len({*named} - {"."}):
        raise OpsError(f"{first_of(missing)} are missing, and what was changed among the deleted files is not known")
    changed = {name: _changed_at(found) for name, (_, found) in files.items()}
    both = [name for name, at in changed.items() if name in named and at > backup.manifest.taken]
    with ThreadPoolExecutor(max_workers=2) as pool:
        differing = zip(both, pool.map(_differs, [(files[name][0], named[name]) for name in both]), strict=True)
        differs = {name for name, differences in differing if differences}
    return {name: at for name, at in changed.items() if name not in named or name in differs}


@probe
def read_written(directory: Path, since: datetime | None) -> Mapping[str, datetime]:
    """The files of a live directory that were written after it was restored, and when each was changed last. `since`:
    the second in which it was swapped in. The copy's files and links were created before the swap, perhaps in that
    second; but its files have the times of their contents.

    Raises:
        OpsError: nobody knows when it was swapped in.
        OSError: the directory cannot be read.
    """
    if since is None:
        raise OpsError("the name of the replaced directory does not say when it was replaced")
    return {
        name: _changed_at(found)
        for name, _, found in _files(directory)
        if _changed_at(found) >= since + timedelta(seconds=1)
        or (stat.S_ISREG(found.st_mode) and found.st_mtime > since.timestamp())
    }


def _files(directory: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """The files and links below a directory, without those that vanish meanwhile."""
    for path in listing.walk(directory):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
                yield listing.shown(path.relative_to(directory).as_posix()), path, found


def _differs(pair: tuple[Path, ArchiveEntry]) -> Sequence[str]:
    return list(listing.differences(*pair))


def _changed_at(found: os.stat_result) -> datetime:
    """When the content, the mode or the owner was changed last."""
    return datetime.fromtimestamp(max(found.st_mtime, found.st_ctime), UTC)
