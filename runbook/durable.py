"""Files that outlive a kill and a power cut: what has a name is the old content or the new, never half of one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a file in UTF-8 and return when it is on disk. It keeps the mode and the owner of the one it replaces.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8", errors=errors) as file:
        if path.exists():  # before a word of it is there: it may be secret
            shutil.copystat(path, beside)
            if os.geteuid() == 0:
                os.chown(beside, path.stat().st_uid, path.stat().st_gid)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's content, or the names in a directory (what was renamed in it too), are on disk when this returns.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """`sync` of a directory and everything in it; not of what symbolic links lead to.

    Raises:
        OSError: the disk fails.
    """
    for path in (*directory.rglob("*"), directory):
        if not path.is_symlink():
            sync(path)
