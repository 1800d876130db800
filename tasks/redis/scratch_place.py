"""Private directories of a run beside its data: sockets, logs, what is read of a backup. What a killed run left of them
is removed when the next one makes its own."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runbook.guard.process import is_abandoned, this_process

PREFIX = "ops-redis-"
OWNER = ".of-run"
SOCKETS = "/tmp"  # noqa: S108 (mkdtemp makes what is private below it)
"""A socket's path has 107 characters at most: the system's own temporary directory is always short enough."""


@contextlib.contextmanager
def scratch_place(parent: str = "") -> Iterator[Path]:
    """A directory in `parent` (the system's own for temporary files) that is gone when the block is left."""
    where = Path(parent or tempfile.gettempdir())
    _sweep(where)
    place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
    try:
        (place / OWNER).write_text(this_process().text)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _sweep(where: Path) -> None:
    """Remove those of dead processes; one without an owner's name, or that is not ours to read, stays."""
    for note in where.glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError):
            if is_abandoned(note.read_text(errors="replace"), note.parent):
                shutil.rmtree(note.parent, ignore_errors=True)
