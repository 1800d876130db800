"""A data directory built from a base backup and those that it depends on."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, cast

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import OTHER_BACKUPS, CommandFailed, OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.submitted import require_wanted
from tasks.backups import codec
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import FileSum
from tasks.backups.read_ahead import read_ahead
from tasks.cluster.postgres_manifest import CONTROL, MANIFEST, WAL_FOLDER, FileComparison, PostgresManifest
from tasks.stores.directory import told
from tasks.wal.format.names import MOST_SEGMENT_BYTES, lsn_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BASE = "base.tar.zst"
"""All files of a base backup, its WAL included."""
GZIP_BASE, GZIP_WAL = "base.tar.gz", "pg_wal.tar.gz"
"""What earlier versions wrote instead."""
CHUNK_BYTES = 1 << 20
_ADDED_BYTES = 16 << 20
"""Of a file that PostgreSQL's manifest does not list, such as postgresql.auto.conf."""
_HEADERS_BYTES = 2 * tarfile.BLOCKSIZE
"""Of a member: its header, and what fills its last block."""
_REFUSED_HERE = re.compile(
    "Permission denied|Operation not permitted|Cannot allocate memory|out of memory|Read-only file system|quota"
    "|Cannot exec|Too many open files"
)


def require_health(error: CommandFailed, what: str, directory: Path) -> None:
    """Check that a program failed because of the backup, not because of this host: PostgreSQL's programs exit with the
    same code for both.

    Raises:
        OpsError: the cause is this host: disk space, permissions or memory, or the program was killed.
    """
    if "No space left" in error.stderr:
        raise OpsError(f"the disk is full at {directory}", f"free disk space there; {directory} is deleted") from None
    if error.exit_code < 0:
        ended = f"{Path(error.argv[0]).name} was killed by signal {-error.exit_code}"
        hint = "check this host's memory (the kernel log names killed processes), then run it again"
        raise OpsError(f"{what}: {ended}", hint) from None
    if _REFUSED_HERE.search(error.stderr):
        hint = "correct the permissions there, or this host's limits, then run it again"
        raise OpsError(f"{what}: {error.message}", hint) from None


@contextmanager
def members(
    archive: Path, most: int, source: IO[bytes] | None = None
) -> Iterator[Iterator[tuple[tarfile.TarInfo, IO[bytes]]]]:
    """The directories and files of a compressed tar, from front to end, each with its content. `most`: the bytes of the
    tar at most; `source`: the archive's bytes, if they are read from somewhere else.

    Raises:
        VerificationFailed: it is missing or damaged, or has a member that no base backup has.
    """
    try:
        with (
            codec.reader(source or archive, most) as content,
            read_ahead(content) as plain,
        ):
            yield _checked(plain)
            while plain.read(CHUNK_BYTES):  # to the end: the checksum of the last frame is there
                pass
    except (tarfile.TarError, FileNotFoundError, *codec.UNREADABLE) as error:
        raise VerificationFailed(f"{archive.name} cannot be unpacked: {error}", OTHER_BACKUPS) from None


def _checked(tar: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """`tarfile` would copy each byte four times, which took a third of the time. PostgreSQL writes plain headers only:
    https://github.com/postgres/postgres/blob/master/src/port/tar.c"""
    while (header := tar.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isdir() or member.isreg()):
            raise tarfile.ReadError(f"{member.name} does not belong into a base backup")
        content = _Content(tar, member.size)
        yield member, cast(IO[bytes], content)
        while content.read(CHUNK_BYTES):
            pass
        tar.read(-member.size % tarfile.BLOCKSIZE)


class _Content:
    """The content of a member, read once."""

    def __init__(self, tar: IO[bytes], left: int) -> None:
        self._tar, self._left = tar, left

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes; by default all that are left.

        Raises:
            ReadError: the archive is cut off.
        """
        wanted = self._left if size < 0 else min(size, self._left)
        found = self._tar.read(wanted)
        if len(found) < wanted:
            raise tarfile.ReadError("unexpected end of data")
        self._left -= wanted
        return found


def tar_bytes(manifest: PostgresManifest) -> int:
    """The most that the tar of a base backup has: its files, the manifest itself and the WAL. Directories without files
    are few; of the WAL the whole first and last segment, whose size the manifest does not state."""
    wal = sum(lsn_of(one.end) - lsn_of(one.start) + 2 * MOST_SEGMENT_BYTES for one in manifest.wal)
    return manifest.bytes + wal + (2 * len(manifest.files) + 10_000) * _HEADERS_BYTES


def _require_size(manifest: PostgresManifest, name: str, bytes_: int) -> None:
    """Raises VerificationFailed before a file is written that is larger than PostgreSQL's manifest or a segment."""
    listed = manifest.files[name][0] if name in manifest.files else 0
    most = MOST_SEGMENT_BYTES if name.startswith(WAL_FOLDER) else max(listed, _ADDED_BYTES)
    if bytes_ > most:
        raise VerificationFailed(f"{name} has {bytes_:,} bytes, expected were at most {most:,}", OTHER_BACKUPS)


def archives_of(backup: Path) -> list[tuple[Path, str]]:
    """The tars of a base backup, each with the folder that it is unpacked into."""
    if (backup / BASE).exists():
        return [(backup / BASE, "")]
    return [(backup / GZIP_BASE, ""), (backup / GZIP_WAL, WAL_FOLDER)]


def extract(backup: Path, target: Path, wanted: Callable[[str], object]) -> None:
    """Extract the wanted files of a base backup, without its WAL.

    Raises:
        VerificationFailed: it is damaged.
        OpsError: the cause is this host.
    """
    archive, _ = archives_of(backup)[0]
    manifest = PostgresManifest.read(backup)
    with members(archive, tar_bytes(manifest)) as found:
        for member, content in found:
            if member.isreg() and wanted(member.name):
                _require_size(manifest, member.name, member.size)
                with told(target):
                    inside.make_directories((target / member.name).parent)
                write(target / member.name, 0o600, content)


def unpack(backup: Path, data: Path, *, wal: bool = True) -> None:
    """Extract a base backup into an empty directory. Every file is compared with PostgreSQL's manifest while it is
    written.

    Raises:
        VerificationFailed: it is damaged, or differs from the manifest.
        OpsError: the cause is this host.
    """
    manifest, files = PostgresManifest.read(backup), FileComparison()
    for archive, folder in archives_of(backup):
        with told(data):
            inside.make_directories(data / folder)
        if folder and not wal:
            continue
        with members(archive, tar_bytes(manifest)) as found:
            for member, content in found:
                name = folder + member.name
                if name == MANIFEST or (name.startswith(WAL_FOLDER) and not wal):
                    continue
                if member.isdir():
                    with told(data / name):
                        inside.make_directories(data / name, member.mode & 0o777)
                else:
                    _require_size(manifest, name, member.size)
                    files.add(name, *write(data / name, member.mode & 0o777, content))
    if CONTROL in files.found:
        files.control = inside.read(data / CONTROL)
    if why := files.problem(manifest):
        raise VerificationFailed(f"{backup.name} cannot be unpacked: {why}", OTHER_BACKUPS)


def digest_of(content: IO[bytes]) -> tuple[int, str]:
    """The bytes of a content and their SHA-256."""
    digest, size = hashlib.sha256(), 0
    while chunk := content.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


class HashedReader(io.RawIOBase):
    """A file whose bytes are hashed while they are read."""

    def __init__(self, file: io.RawIOBase | io.BufferedReader) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read and hash."""
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        self._size += count
        return count

    @property
    def sum(self) -> FileSum:
        """The bytes that were read, and their SHA-256."""
        return FileSum(bytes=self._size, sha256=self._digest.hexdigest())


def write(path: Path, mode: int, content: IO[bytes]) -> tuple[int, str]:
    """Write a new file. Returns its bytes and their SHA-256.

    Raises:
        OpsError: it cannot be written. Errors of reading are not translated.
    """
    digest, size, hashing = hashlib.sha256(), 0, None
    with told(path):
        file = inside.creating(path, mode)
    with file:
        while chunk := content.read(CHUNK_BYTES):
            require_wanted()
            if hashing:
                hashing.result()
            hashing = _hashing.submit(digest.update, chunk)
            size += len(chunk)
            with told(path):
                file.write(chunk)
        with told(path):
            file.flush()
    if hashing:
        hashing.result()
    return size, digest.hexdigest()


_hashing = ThreadPoolExecutor(1, "hash")
"""Hashes a chunk while it is written."""


def build_data(postgres: Postgres, lineage: Sequence[Backup], root: Path) -> Path:
    """Build the data directory of a fetched backup and those that it depends on as `root/data`, owned by the server's
    user.

    Raises:
        VerificationFailed: one is damaged, or they do not fit together.
        OpsError: the cause is this host.
    """
    data = root / "data"
    if len(lineage) == 1:
        unpack(lineage[0].path, data)
        give(data, postgres.os_user)
        return data
    parts = []
    for number, backup in enumerate(lineage):
        part = root / f"part-{number}"
        unpack(backup.path, part, wal=backup is lineage[-1])
        inside.copy(backup.path / MANIFEST, part / MANIFEST)
        give(part, postgres.os_user)
        parts.append(part)
    failpoint("cluster: parts unpacked")
    try:
        shell.run(
            [postgres.program("pg_combinebackup"), *parts, f"--output={data}", "--no-sync"],
            user=postgres.os_user,
            environment={"LC_ALL": "C"},
            directory=root,
        )
    except CommandFailed as error:
        require_health(error, f"{lineage[-1].name} cannot be combined in {data}", data)
        raise VerificationFailed(
            f"{', '.join(one.name for one in lineage)} do not fit together: {error.message}", OTHER_BACKUPS
        ) from None
    for part in parts:
        shutil.rmtree(part)
    return data


def give(path: Path, user: str) -> None:
    """Give everything below to the server's user, if this process may.

    Raises:
        OpsError: a file was deleted meanwhile, or the file system refuses.
    """
    if os.geteuid() == 0:
        with told(path):
            inside.give(path, shell.owner_of(user))
