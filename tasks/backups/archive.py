"""A directory as one `.tar.zst` with an entry per file, hashed over the very bytes that went in; and back again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from runbook.errors import OTHER_BACKUPS, OpsError, VerificationFailed
from runbook.files import inside
from tasks.backups import codec
from tasks.backups.entries import (
    ArchivedFiles,
    ArchiveEntry,
    entry_of,
    hostile,
    ids_of,
    require_inside,
    root_problems,
    shown,
    special_name,
    walk,
)
from tasks.backups.manifest import CHUNK_BYTES

IN_MEMORY_BYTES = 8 << 20
ATTEMPTS = 3


def write(directory: Path, target: Path) -> ArchivedFiles:
    """Archive a directory. A file that changes meanwhile is kept as it was read, and named.

    Raises:
        OpsError: the directory is a link, a file cannot be read (a backup without it would be none), or the archive
            cannot be written.
    """
    if directory.is_symlink():
        raise OpsError(f"{directory} is a link, not a directory", "configure the directory that it points to")
    writing = _Writing(directory)
    try:
        with (
            codec.writer(target) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar,
        ):
            writing.add(tar, directory)
            for path in walk(directory):
                writing.add(tar, path)
    except OSError as error:
        raise OpsError(
            f"{directory} cannot be archived: {error}", "fix that, then run it again: no backup was taken"
        ) from None
    return ArchivedFiles(
        directory=str(directory),
        entries=tuple(writing.entries),
        skipped=tuple(writing.skipped),
        changed=tuple(writing.changed),
    )


class _Writing:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: list[ArchiveEntry] = []
        self.skipped: list[str] = []
        self.changed: list[str] = []

    def add(self, tar: tarfile.TarFile, path: Path) -> None:
        name = path.relative_to(self.directory).as_posix()
        try:
            found = path.lstat()
            entry = entry_of(shown(name), found, path)
            if entry is None:
                self.skipped.append(f"{shown(name)} ({special_name(found.st_mode)})")
            elif entry.kind == "file":
                self._file(tar, path, name, entry)
            else:
                target = str(path.readlink()) if entry.kind == "symlink" else ""
                tar.addfile(_member(name, entry, found.st_mtime, target=target))
                self.entries.append(entry)
        except FileNotFoundError:
            self.changed.append(f"{shown(name)} vanished while the archive was made")

    def _file(self, tar: tarfile.TarFile, path: Path, name: str, entry: ArchiveEntry) -> None:
        """The header tells the size before the content: a small file is read first, a large one to its size then."""
        with inside.reading(path) as file:
            found = os.fstat(file.fileno())
            if found.st_size <= IN_MEMORY_BYTES:
                content, whole = self._settled(file)
                source, size = _Hashing(io.BytesIO(content)), len(content)
            else:
                source, size, whole = _Hashing(file, found.st_size), found.st_size, True
            tar.addfile(_member(name, entry, found.st_mtime, size=size), source)  # type: ignore[arg-type]
            after = os.fstat(file.fileno())
        if not whole or source.padded or (after.st_size, after.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
            self.changed.append(f"{entry.path} changed while it was read")
        self.entries.append(entry.model_copy(update={"size": size, "sha256": source.digest.hexdigest()}))

    @staticmethod
    def _settled(file: IO[bytes]) -> tuple[bytes, bool]:
        """A small file's content, read again while it changes; false when it never stood still."""
        for _ in range(ATTEMPTS):
            before = os.fstat(file.fileno()).st_mtime_ns
            file.seek(0)
            content = file.read()
            if os.fstat(file.fileno()).st_mtime_ns == before:
                return content, True
        return content, False


class _Hashing:
    """Reads for tarfile and hashes what it hands over; a file that shrank is filled with zeros to its given size."""

    def __init__(self, file: IO[bytes], size: int = -1) -> None:
        self.digest = hashlib.sha256()
        self.padded = False
        self._file = file
        self._left = size

    def read(self, size: int) -> bytes:
        chunk = self._file.read(size)
        if self._left >= 0:
            wanted = min(size, self._left)
            if len(chunk) < wanted:
                chunk, self.padded = chunk + bytes(wanted - len(chunk)), True
            self._left -= len(chunk)
        self.digest.update(chunk)
        return chunk


def unpack(source: Path, target: Path, entries: Sequence[ArchiveEntry]) -> None:
    """Unpack an archive into a directory that does not exist yet, taking nothing but what the entries name.

    Raises:
        VerificationFailed: a member is hostile or not named, or the archive is not whole.
        OSError: a file cannot be written.
    """
    named = {entry.path: entry for entry in entries}
    made: set[str] = set()
    directories: list[tuple[Path, ArchiveEntry]] = []
    inside.make_directory(target)
    with _opened(source, entries) as tar:
        for member in tar:
            entry = _require_named(member, named, made)
            path = target / member.name
            if entry.kind == "directory":
                if entry.path != ".":
                    inside.make_directory(path)
                directories.append((path, entry))
            elif entry.kind == "symlink":
                inside.symlink(path, member.linkname, ids_of(entry))
            else:
                _unpack_file(tar, member, path, entry)
    for path, entry in reversed(directories):  # the innermost first: a mode may forbid what is still to come
        inside.change_mode(path, entry.mode, ids_of(entry))
    os.sync()  # before anything is renamed; a file at a time costs milliseconds each


def unpack_some(
    source: Path, target: Path, entries: Sequence[ArchiveEntry], wanted: Callable[[ArchiveEntry], bool]
) -> None:
    """Unpack the regular files that are wanted, for this process to read: no owner, no link, mode 0600.

    Raises:
        VerificationFailed: a member is hostile or not named, or the archive is not whole.
        OSError: a file cannot be written.
    """
    named = {entry.path: entry for entry in entries}
    made: set[str] = set()
    target.mkdir(mode=0o700, parents=True)
    with _opened(source, entries) as tar:
        for member in tar:
            entry = _require_named(member, named, made)
            content = tar.extractfile(member) if entry.kind == "file" and wanted(entry) else None
            if content:
                path = target / entry.path
                inside.make_directories(path.parent)
                inside.write(path, content.read())


def _unpack_file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, entry: ArchiveEntry) -> None:
    content = tar.extractfile(member)
    assert content is not None
    with inside.creating(path) as file:
        while chunk := content.read(CHUNK_BYTES):
            file.write(chunk)
        file.flush()  # a later write would change the time again
        if os.geteuid() == 0:
            os.fchown(file.fileno(), *ids_of(entry))  # this clears the set-user-id bits of the mode
        os.fchmod(file.fileno(), entry.mode)
        os.utime(file.fileno(), (member.mtime, member.mtime))


def compare_members(source: Path, entries: Sequence[ArchiveEntry]) -> list[str]:
    """How an archive differs from its entries, as sentences, read as a restore reads it but not unpacked."""
    named, seen, problems = {entry.path: entry for entry in entries}, set[str](), root_problems(entries)
    try:
        with _opened(source, entries) as tar:
            for member in tar:
                entry = _require_named(member, named, seen)
                if entry.kind == "file" and not _is_same(tar, member, entry):
                    problems.append(f"{entry.path} has another content in the archive")
    except VerificationFailed as error:
        return [*problems, error.message]
    return problems + [f"{path} is not in the archive" for path in named if path not in seen]


def _is_same(tar: tarfile.TarFile, member: tarfile.TarInfo, entry: ArchiveEntry) -> bool:
    digest, content = hashlib.sha256(), tar.extractfile(member)
    while content and (chunk := content.read(CHUNK_BYTES)):
        digest.update(chunk)
    return (member.size, digest.hexdigest()) == (entry.size, entry.sha256)


HEADERS_BYTES = 16 << 10
"""The most that a member of a tar has besides its content: paths and link targets have 4,096 bytes at most."""


@contextlib.contextmanager
def _opened(source: Path, entries: Sequence[ArchiveEntry]) -> Iterator[tarfile.TarFile]:
    """An archive, read from front to end, and no further than its entries reach."""
    most = sum(entry.size for entry in entries) + (len(entries) + 2) * HEADERS_BYTES
    try:
        with codec.reader(source, most) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
            yield tar
    except (tarfile.TarError, *codec.UNREADABLE, FileNotFoundError) as error:
        raise VerificationFailed(f"{source.name} cannot be read to its end: {error}", OTHER_BACKUPS) from None


def _require_named(member: tarfile.TarInfo, named: Mapping[str, ArchiveEntry], made: set[str]) -> ArchiveEntry:
    """The entry of a member; nothing else may be unpacked, and nothing outside of directories that were."""
    path = shown(member.name)
    require_inside(path)
    entry = named.get(path)
    if entry is None:
        raise hostile(path, "is not in the manifest")
    if path in made:
        raise hostile(path, "is there twice")
    parent = str(PurePosixPath(path).parent)
    if path != "." and parent != "." and (parent not in made or named[parent].kind != "directory"):
        raise hostile(path, "does not lie in a directory of the archive")
    kind = {tarfile.REGTYPE: "file", tarfile.DIRTYPE: "directory", tarfile.SYMTYPE: "symlink"}.get(member.type)
    if kind != entry.kind:
        raise hostile(path, f"is a {kind or 'device or hard link'} instead of a {entry.kind}")
    if kind == "symlink" and shown(member.linkname) != entry.target:
        raise hostile(path, f"leads to {shown(member.linkname)} instead of {entry.target}")
    made.add(path)
    return entry


def _member(name: str, entry: ArchiveEntry, mtime: float, *, size: int = 0, target: str = "") -> tarfile.TarInfo:
    kinds = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE}
    member = tarfile.TarInfo(name)
    member.type, member.size, member.mtime, member.linkname = kinds[entry.kind], size, mtime, target
    member.mode, member.uid, member.gid = entry.mode, entry.uid, entry.gid
    member.uname, member.gname = entry.user, entry.group
    return member
