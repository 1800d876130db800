"""The data directory, and the WAL receiver's, that a swap of the cluster kept: found, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from blocks.postgres.server import Postgres
from runbook.failpoint import failpoint
from runbook.files.durable import sync
from runbook.files.marker import Marker
from runbook.kinds import action, probe
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.swap import SUPERSEDED, replacement, superseded_clusters
from tasks.stores.directory import told
from tasks.wal.format.names import Timeline
from tasks.wal.reading.local import find_segments


@dataclass(frozen=True)
class KeptCluster(PrivateInstance):
    """A data directory that a swap kept: `root` is the directory itself."""

    @property
    def data(self) -> Path:
        return self.root


@dataclass(frozen=True, kw_only=True)
class UndoMarker(Marker):
    """An undo that has begun: `kept` becomes the data directory, and `wal` the receiver's ("" for none); `left` is the
    timeline that was in use."""

    FILE: ClassVar[str] = "undo-full-restore.json"
    HINT: ClassVar[str] = "run undo-full-restore with kept=…, the name of the directory that it puts back"

    kept: str
    wal: str
    left: int


@probe
def find_kept_clusters(postgres: Postgres) -> tuple[Path, ...]:
    """Find the data directories that swaps kept, newest first."""
    return tuple(path for path in reversed(superseded_clusters(postgres)) if (path / "PG_VERSION").is_file())


@probe
def find_kept_wal(directory: Path, system: int, history: Timeline, end: int) -> Path | None:
    """Find the kept directory of the receiver from which it can go on: its WAL is of this history only, and reaches the
    segment of `end`, the last checkpoint of the server that it follows."""

    def follows(path: Path) -> bool:
        found = find_segments(path)
        own = all(one.system == system and history.left_at(one.timeline) for one in found)
        return own and any(one.timeline == history.number and one.start + one.bytes > end for one in found)

    kept = sorted(directory.parent.glob(f"{directory.name}{SUPERSEDED}*"), reverse=True)
    return next((path for path in kept if path.is_dir() and follows(path)), None)


@probe
def is_followed(directory: Path, history: Timeline) -> bool:
    """Return True if the receiver can go on in its directory: it has no WAL of another branch."""
    return not directory.is_dir() or all(history.left_at(one.timeline) for one in find_segments(directory))


@action(of=replacement)
def put_wal_back(postgres: Postgres, kept: Path, directory: Path) -> Path:
    """Rename the kept directory of the receiver to its name, where an empty one is, or none.

    Raises:
        OpsError: the directory is not empty, or the disk fails.
    """
    with told(directory):
        kept.rename(directory)
        sync(directory.parent)
    failpoint("undo: receiver's directory back")
    return directory


def named(found: Sequence[Path], wanted: str) -> Path | None:
    """Return the directory of that name, given with or without its path."""
    return next((path for path in found if wanted in (path.name, str(path))), None)
