"""Private directories of a run for sockets, logs and files of a backup. The next run deletes those of killed runs."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runbook.files import inside
from runbook.guard.process import is_abandoned, this_process

PREFIX = "ops-redis-"
OWNER = ".of-run"
SOCKETS = "/tmp"  # noqa: S108 (mkdtemp makes what is private below it)
"""A socket's path has at most 107 characters; the system's temporary directory is short enough."""


@contextlib.contextmanager
def scratch_place(parent: str = "") -> Iterator[Path]:
    """A directory in `parent` (by default the system's temporary directory), deleted at the end of the block."""
    where = Path(parent or tempfile.gettempdir())
    _sweep(where)
    place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
    try:
        (place / OWNER).write_text(this_process().text)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _sweep(where: Path) -> None:
    """Delete the directories of dead processes, except unreadable ones and those without an owner's name."""
    for note in where.glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError):
            if is_abandoned(inside.read_text(note, "replace"), note.parent):
                shutil.rmtree(note.parent, ignore_errors=True)
