"""Files in a directory that another account may own: opened without following a link that this account planted.

A worker often runs as root, and the data directories belong to the accounts of PostgreSQL and Redis. Such an account
can replace any file or directory of its own by a link to a file that only root can read or write. So every component
of a path is opened relative to the descriptor of the one before it. A link is followed only where root or this process
made it, or where it leads to a file or directory of the account that made it: a data directory on another disk, or a
postgresql.conf in /etc. A new file never goes through a link in the last component. Against hard links the kernel
protects: https://docs.kernel.org/admin-guide/sysctl/fs.html (protected_hardlinks).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

Owner = tuple[int, int]
"""A user's and a group's number. Only root can give a file away: for others, none is set."""
NOT_FOLLOWED = "a symbolic link to a file of another account is not followed"
NOT_REGULAR = "it is not a regular file"
_MOST_LINKS = 40
_PIECE_BYTES = 1 << 20
_DESCRIPTORS = "/proc/self/fd/"


@contextlib.contextmanager
def directory(path: Path) -> Iterator[int]:
    """Open a directory while the block runs; yields its descriptor, to which names are relative.

    Raises:
        OSError: it cannot be opened, or a link of another account leads elsewhere.
    """
    with _node(path) as node, about(path):
        opened = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=node)
    try:
        yield opened
    finally:
        os.close(opened)


def reading(path: Path) -> io.BufferedReader:
    """Open a regular file to read it.

    Raises:
        OSError: it cannot be read, or is no regular file, or a link of another account leads elsewhere.
    """
    return open(_opened(path, os.O_RDONLY), "rb")


def changing(path: Path) -> io.BufferedRandom:
    """Open an existing regular file to read and write it; see `reading`."""
    return open(_opened(path, os.O_RDWR), "r+b")


def read(path: Path) -> bytes:
    """Return a file's content; see `reading`."""
    with reading(path) as file:
        return file.read()


def read_text(path: Path, errors: str = "strict") -> str:
    """Return a file's text in UTF-8; see `reading`."""
    with io.TextIOWrapper(reading(path), encoding="utf-8", errors=errors) as file:
        return file.read()


def creating(path: Path, mode: int | None = 0o600, owner: Owner | None = None) -> io.BufferedWriter:
    """Create a file and open it to write it.

    Raises:
        OSError: the name is taken, or the file cannot be created.
    """
    with directory(path.parent) as at, about(path):
        return open(_created(at, path.name, mode, owner), "wb")


def write(path: Path, content: bytes, mode: int | None = 0o600, owner: Owner | None = None) -> None:
    """Write a file; it replaces one of that name. `mode` None: by the umask. Unlike `durable.write` it does not
    wait for the disk.

    Raises:
        OSError: it cannot be written.
    """
    remove(path)
    with creating(path, mode, owner) as file:
        file.write(content)


def copy(source: Path, target: Path) -> None:
    """Copy a regular file with its mode and its time; it replaces one of that name. Its owner can read and write it.

    Raises:
        OSError: one of them cannot be opened, or the disk fails.
    """
    with reading(source) as file, about(source):
        found = os.fstat(file.fileno())
        remove(target)
        with creating(target, found.st_mode & 0o777 | 0o600) as out:
            shutil.copyfileobj(file, out, _PIECE_BYTES)
            out.flush()
            os.utime(out.fileno(), ns=(found.st_atime_ns, found.st_mtime_ns))


def link(source: Path, target: Path) -> None:
    """Give a regular file a second name.

    Raises:
        OSError: the name is taken, or the source is no regular file.
    """
    with _node(source) as node, directory(target.parent) as at, about(target):
        _require_regular(node, source)
        os.link(f"{_DESCRIPTORS}{node}", target.name, dst_dir_fd=at)  # follows only this link


def symlink(path: Path, target: str, owner: Owner | None = None) -> None:
    """Make a symbolic link to `target`; it replaces a file of that name.

    Raises:
        OSError: it cannot be made.
    """
    remove(path)
    with directory(path.parent) as at, about(path):
        os.symlink(target, path.name, dir_fd=at)
        if owner and os.geteuid() == 0:
            os.chown(path.name, *owner, dir_fd=at, follow_symlinks=False)


def make_directory(path: Path, mode: int = 0o700, owner: Owner | None = None) -> None:
    """Make a directory with that mode, whatever the umask.

    Raises:
        OSError: the name is taken, or it cannot be made.
    """
    with directory(path.parent) as at, about(path):
        os.mkdir(path.name, 0o700, dir_fd=at)
        opened = os.open(path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        try:
            _set(opened, mode, owner)
        finally:
            os.close(opened)


def make_directories(path: Path, mode: int = 0o700) -> None:
    """Make a directory, and those above it, where they are missing.

    Raises:
        OSError: one of them cannot be made.
    """
    if not path.is_dir():
        make_directories(path.parent, mode)
        with contextlib.suppress(FileExistsError):
            make_directory(path, mode)


def change_mode(path: Path, mode: int, owner: Owner | None = None) -> None:
    """Change the mode of a file or directory, and its owner before that: a new owner clears the set-user-id bit.

    Raises:
        OSError: it cannot be opened, or belongs to another account.
    """
    with _node(path) as node, about(path):
        if owner and os.geteuid() == 0:
            os.chown(f"{_DESCRIPTORS}{node}", *owner)
        Path(f"{_DESCRIPTORS}{node}").chmod(mode)


def remove(path: Path) -> None:
    """Delete a file or a link, where it is there.

    Raises:
        OSError: it cannot be deleted.
    """
    with directory(path.parent) as at, about(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path.name, dir_fd=at)


def give(path: Path, owner: Owner) -> None:
    """Give a file, or a directory with everything below it, to an account, if this process is root. What links lead to
    keeps its owner.

    Raises:
        OSError: one of them was deleted meanwhile, or the file system refuses.
    """
    if os.geteuid() != 0:
        return
    with directory(path.parent) as at, about(path):
        os.chown(path.name, *owner, dir_fd=at, follow_symlinks=False)
        for _, folders, files, inner in os.fwalk(path.name, dir_fd=at):  # nothing where it is a file
            for name in (*folders, *files):
                os.chown(name, *owner, dir_fd=inner, follow_symlinks=False)


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Let an error name the whole path, not a name relative to a descriptor."""
    try:
        yield
    except OSError as error:
        if "/" not in str(error.filename) or str(error.filename).startswith(_DESCRIPTORS):
            error.filename = str(path)
        raise


def _created(at: int, name: str, mode: int | None, owner: Owner | None) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(name, flags, 0o666 if mode is None else 0o600, dir_fd=at)
    try:
        _set(opened, mode, owner)
    except OSError:
        os.close(opened)
        raise
    return opened


def _set(opened: int, mode: int | None, owner: Owner | None) -> None:
    if owner and os.geteuid() == 0:
        os.fchown(opened, *owner)
    if mode is not None:
        os.fchmod(opened, mode)


@contextlib.contextmanager
def _node(path: Path) -> Iterator[int]:
    """Yield a descriptor of what a path leads to, by links that may be followed."""
    with contextlib.suppress(OSError):
        (path / "..").stat()  # mounts what is mounted on demand, which O_PATH does not
    with about(path):
        node = _walk(None, path.absolute(), path, _MOST_LINKS)
    try:
        yield node
    finally:
        os.close(node)


def _walk(start: int | None, way: Path, path: Path, links: int) -> int:
    """Open what `way` leads to from `start`, which an absolute one does not need. `path` is for errors; so many more
    `links` are followed."""
    at = start
    for part in way.parts:
        before = at
        try:
            at = _step(before, part, path, links)
        finally:
            if before not in (None, start):
                os.close(before)
    assert at is not None
    return at


def _step(at: int | None, name: str, path: Path, links: int) -> int:
    node = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    found = os.fstat(node)
    if not stat.S_ISLNK(found.st_mode):
        return node
    try:
        target = Path(os.readlink("", dir_fd=node))  # of the very link whose owner is known
    finally:
        os.close(node)
    if not links:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    led = _walk(at, target, path, links - 1)
    if found.st_uid not in (0, os.geteuid(), os.fstat(led).st_uid):
        os.close(led)
        above = Path(f"{_DESCRIPTORS}{at}").readlink() if at is not None else Path("/")
        raise PermissionError(errno.EACCES, NOT_FOLLOWED, str(above / name))
    return led


def _opened(path: Path, flags: int) -> int:
    with _node(path) as node, about(path):
        _require_regular(node, path)
        return os.open(f"{_DESCRIPTORS}{node}", flags | os.O_CLOEXEC)  # that very file, whatever has its name now


def _require_regular(node: int, path: Path) -> None:
    mode = os.fstat(node).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):  # reading a FIFO would wait for a writer
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
