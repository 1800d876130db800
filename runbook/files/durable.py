"""Files that outlive a kill and a power cut: what has a name is the old content or the new, never half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from runbook.files import inside

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
    with inside.directory(path.parent) as at, inside.about(path):
        _sweep(at, path.name)
        was = _regular(at, path)
        kept = mode if mode is not None else stat.S_IMODE(was.st_mode) if was else None
        owner = owner or ((was.st_uid, was.st_gid) if was else None)
        # Its mode is narrow before a word of it is there: it may be secret.
        beside, opened = _created(at, path.name, 0o666 if kept is None else 0o600)
        try:
            with os.fdopen(opened, "wb") as file:
                if owner and os.geteuid() == 0:
                    os.fchown(opened, *owner)
                if kept is not None:
                    os.fchmod(opened, kept)
                yield file
                file.flush()
                os.fsync(opened)
            os.replace(beside, path.name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=at)
            raise
        os.fsync(at)


def append(path: Path) -> IO[bytes]:
    """A log that is written on, which no link leads away from its place.

    Raises:
        OSError: it is a link or no regular file, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with inside.directory(path.parent) as at, inside.about(path):
        opened = os.open(path.name, flags, 0o640, dir_fd=at)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, inside.NOT_REGULAR, str(path))
    return os.fdopen(opened, "ab")


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


def _created(at: int, name: str, mode: int) -> tuple[str, int]:
    """A new file alongside, locked for as long as it is written: `_sweep` leaves it alone."""
    while True:
        beside = f".{name}.{secrets.token_hex(4)}.new"
        opened = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=at)
        fcntl.flock(opened, fcntl.LOCK_EX)
        if os.fstat(opened).st_nlink:
            return beside, opened
        os.close(opened)  # swept before it was locked


def _sweep(at: int, name: str) -> None:
    """Remove what a killed process left of it: it may be secret."""
    for left in fnmatch.filter(os.listdir(at), f".{glob.escape(name)}.????????.new"):
        with contextlib.suppress(OSError):
            opened = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(left, dir_fd=at)
            finally:
                os.close(opened)


def _regular(at: int, path: Path) -> os.stat_result | None:
    """What is replaced; what a link leads to only where root or this user has made the link."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path.name, dir_fd=at, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode) and found.st_uid in (0, os.geteuid()):
            found = path.stat()
        return found if stat.S_ISREG(found.st_mode) else None
    return None


def sync(path: Path) -> None:
    """A file's content, or the names in a directory (what was renamed in it too), are on disk when this returns.

    Raises:
        OSError: the disk fails.
    """
    if path.is_dir():
        with inside.directory(path) as descriptor:
            os.fsync(descriptor)
    else:
        with inside.reading(path) as file:
            os.fsync(file.fileno())


def sync_tree(directory: Path) -> None:
    """`sync` of a directory and everything in it; not of what symbolic links lead to.

    Raises:
        OSError: the disk fails.
    """
    with inside.directory(directory) as top:
        for _, _, files, at in os.fwalk(".", dir_fd=top):
            for name in files:
                if stat.S_ISREG(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
                    opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
                    try:
                        os.fsync(opened)
                    finally:
                        os.close(opened)
            os.fsync(at)
