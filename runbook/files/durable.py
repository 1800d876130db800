"""Files that outlive a kill and a power cut: what has a name is the old content or the new, never half of one."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PRIVATE = 0o640
"""The mode of reports: whoever is to read them is in the group of their directory."""


def write(
    path: Path, text: str, *, errors: str = "strict", mode: int | None = None, owner: tuple[int, int] | None = None
) -> None:
    """Write a file in UTF-8 and return when it is on disk; see `replacing`.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    with replacing(path, mode=mode, owner=owner) as file:
        file.write(text.encode(errors=errors))


@contextlib.contextmanager
def replacing(path: Path, *, mode: int | None = None, owner: tuple[int, int] | None = None) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends well. It keeps the mode and the owner of the one
    that it replaces, unless they are given (the owner only by root).

    Safe for root in a directory that somebody else can write: nothing that is there is opened, and a link is replaced.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    _sweep(path)
    was = _regular(path)
    kept = mode if mode is not None else stat.S_IMODE(was.st_mode) if was else None
    owner = owner or ((was.st_uid, was.st_gid) if was else None)
    # Its mode is narrow before a word of it is there: it may be secret.
    beside, opened = _created(path, 0o666 if kept is None else 0o600)
    try:
        with os.fdopen(opened, "wb") as file:
            if owner and os.geteuid() == 0:
                os.fchown(opened, *owner)
            if kept is not None:
                os.fchmod(opened, kept)
            yield file
            file.flush()
            os.fsync(opened)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path) -> IO[bytes]:
    """A log that is written on, which no link leads away from its place.

    Raises:
        OSError: it is a link, or cannot be written.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o640), "ab")


def open_lock(path: Path) -> IO[str]:
    """Open a file for `flock`, without following a link. Nobody else can open it: whoever can open a file can lock it.

    Raises:
        OSError: it is a link, or belongs to another account.
    """
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    found = os.fstat(opened)
    if found.st_uid == os.geteuid() and found.st_mode & 0o077:  # of a version that made it readable
        os.fchmod(opened, 0o600)
    return os.fdopen(opened, "r+", encoding="utf-8")


def _created(path: Path, mode: int) -> tuple[Path, int]:
    """A new file alongside, locked for as long as it is written: `_sweep` leaves it alone."""
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        opened = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        fcntl.flock(opened, fcntl.LOCK_EX)
        if os.fstat(opened).st_nlink:
            return beside, opened
        os.close(opened)  # swept before it was locked


def _sweep(path: Path) -> None:
    """Remove what a killed process left of it: it may be secret."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.new"):
        with contextlib.suppress(OSError):
            opened = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(opened)


def _regular(path: Path) -> os.stat_result | None:
    """What is replaced; what a link leads to only where root or this user has made the link."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) and found.st_uid in (0, os.geteuid()):
            found = path.stat()
        return found if stat.S_ISREG(found.st_mode) else None
    return None


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
