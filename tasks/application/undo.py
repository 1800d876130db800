"""Undo a restore of the application's files: swap back the replaced directory.

The swap is recorded before the first rename. So a run after a killed one finishes that swap, and never confuses the
directory that the killed run replaced with the one to return to.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.places import Application
from runbook.errors import OpsError
from runbook.files import record
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.application.files import directory_of
from tasks.application.live_files import read_written
from tasks.application.staged_files import SUPERSEDED, FilesSwapped, exchange, free_name, superseded_files
from tasks.backups import entries as listing

UNDO = "put files back"
RECORD = "files-undo.json"
LATEST = "latest"


@dataclass(frozen=True)
class FilesUndo:
    """A planned swap: `aside` becomes `live`, the live directory becomes `kept` (None: nothing is live)."""

    live: Path
    aside: Path
    kept: Path | None

    @property
    def is_done(self) -> bool:
        """Whether both renames are done."""
        return not self.aside.exists() and self.live.exists() and (self.kept is None or self.kept.exists())


@dataclass(frozen=True)
class FilesAside:
    """A directory that a restore replaced. `written`: files of the live directory that are newer than that restore; an
    undo moves them aside. `since`: None if the directory's name has no time."""

    path: Path
    files: int
    bytes: int
    since: datetime | None
    written: tuple[str, ...]


def find_undo(application: Application, reports: Path) -> FilesUndo | None:
    """The swap of a killed undo; None if there is none, or a later restore replaced it.

    Raises:
        OpsError: the record cannot be read.
    """
    found = record.read(reports / RECORD, FilesUndo, "delete it, and enter the directory to return to in `kept`")
    if found is None or found.live != directory_of(application):
        return None
    newest = max((path.name for path in superseded_files(application)), default="")
    current = newest <= (found.kept or found.aside).name and (found.aside.exists() or found.is_done)
    return found if current else None


def choose_aside(application: Application, kept: str, reports: Path) -> Path:
    """The directory to return to: of a killed undo, the newest replaced one, or one by its name.

    Raises:
        OpsError: there is none.
    """
    undo = find_undo(application, reports)
    if undo and kept in (LATEST, undo.aside.name):
        return undo.aside
    found = [path for path in superseded_files(application) if path.is_dir() and not path.is_symlink()]
    chosen = found[-1:] if kept == LATEST else [path for path in found if path.name == kept]
    if not chosen:
        what = "no restore has replaced application files" if kept == LATEST else f"there is no {kept[:80]}"
        raise OpsError(what, f"choose one of: {', '.join(path.name for path in found) or 'none'}")
    return chosen[0]


def replaced_files(application: Application, aside: Path, reports: Path) -> Path:
    """The directory whose files an undo replaces: the live one, or the one that a killed undo has renamed already.

    Raises:
        OpsError: the record of a killed undo cannot be read.
    """
    undo, live = find_undo(application, reports), directory_of(application)
    has_renamed = undo and undo.aside == aside and undo.kept and (undo.is_done or not live.exists())
    return undo.kept if undo and undo.kept and has_renamed else live


@probe
def read_aside(application: Application, aside: Path) -> FilesAside:
    """Count the files of a replaced directory, and list the live files that were written since.

    Raises:
        OpsError: a directory cannot be read.
    """
    live, since = directory_of(application), restored_at(aside)
    try:
        sizes = [path.lstat().st_size for path in listing.walk(aside) if path.is_file() and not path.is_symlink()]
        written = read_written.work(live, since) if since and live.is_dir() else ()
        return FilesAside(aside, len(sizes), sum(sizes), since, tuple(sorted(written)))
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> OpsError:
    return OpsError(f"{error.filename} cannot be read: {error.strerror}", "run this as the files' owner")


@probe
def has_files(aside: Path) -> bool:
    """Return True if a replaced directory has at least one file.

    Raises:
        OpsError: it cannot be read.
    """
    try:
        return any(path.is_file() and not path.is_symlink() for path in listing.walk(aside))
    except OSError as error:
        raise _unreadable(error) from None


@action(of=lambda aside: Act(UNDO, str(aside)))
def swap_files_back(application: Application, aside: Path, reports: Path) -> FilesSwapped:
    """Make a replaced directory live again; the live one is kept alongside. A rename of a killed run is not repeated.

    Raises:
        OpsError: a rename is refused (then the current files stay live), or the record cannot be written.
    """
    undo = _recorded(application, aside, reports)
    if undo.is_done:
        return FilesSwapped(undo.live, undo.kept)
    return exchange(undo.live, aside, undo.kept if undo.live.exists() else None)


def end_undo(reports: Path) -> None:
    """Delete the record: the swap is complete."""
    (reports / RECORD).unlink(missing_ok=True)


def _recorded(application: Application, aside: Path, reports: Path) -> FilesUndo:
    found, live = find_undo(application, reports), directory_of(application)
    if found and found.aside == aside and (found.is_done or not live.exists()):
        return found
    undo = FilesUndo(live, aside, free_name(live) if live.exists() else None)
    record.write(reports / RECORD, undo)
    return undo


def restored_at(aside: Path) -> datetime | None:
    """The second in which a restore replaced a directory, by its name; None: the name has no time."""
    try:
        return datetime.strptime(aside.name.rpartition(SUPERSEDED)[2], "%Y%m%d_%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None
