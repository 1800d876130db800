"""The compression of dumps in directory format: zstd. pg_dump does it where it was built with zstd; otherwise it writes
plain files, and this process compresses them behind it. The stored form is the same, and pg_restore reads it where it
was built with zstd; otherwise its plain form is made first.

https://github.com/postgres/postgres/blob/master/src/bin/pg_dump/pg_backup_directory.c
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import OTHER_BACKUPS, CommandFailed, OpsError
from tasks.backups import codec
from tasks.backups.manifest import FileSum

ZSTD = f"zstd:{codec.LEVEL}"
CONTENTS = "toc.dat"
PLAIN_BYTES = 4096
"""A smaller file stays plain: compressed, it would use the same block of the disk."""
GROWTH = 12
"""The most that rows of an archive grow when they are unpacked, if their size is unknown."""
PUNCH_BYTES = 8 << 20
UNPACK_BYTES = 128 << 10
"""A larger buffer is new memory for each read: a third more processor time."""
_POLL_SECONDS, _PAUSES = 0.03, 5  # a scan of a directory with many files takes long: it pauses for a multiple of that
_DATA = re.compile(r"(?:\d+|blob_\d+)\.dat")
_NONE, _ZSTD, _FIRST_WITH_METHOD, _METHOD_AT = b"\0", b"\3", b"\x01\x0f", 11
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


def compression_of(names: Iterable[str]) -> str:
    """The compression of a dump, by its file names."""
    endings = {name.rsplit(".", 1)[-1] for name in names}
    return next((method for ending, method in (("zst", "zstd"), ("lz4", "lz4")) if ending in endings), "gzip")


def knows_compression(postgres: Postgres, wanted: str) -> bool:
    """Whether the programs were built with `zstd`, `lz4` or `gzip`."""
    method, _, level = wanted.partition(":")
    # pg_dump 15 has gzip only, and takes only the level.
    argv = [postgres.program("pg_dump"), f"--compress={(level or '1') if method == 'gzip' else wanted}"]
    try:
        shell.run(
            [*argv, "--format=plain", "--no-password"],
            environment={"PGHOST": "127.0.0.1", "PGPORT": "1", "LC_MESSAGES": "C"},
        )
    except CommandFailed as error:
        # 15 prints “invalid value”; otherwise it failed later, at the connection to port 1.
        return not any(word in error.stderr for word in ("compression", "invalid value"))
    return True


@dataclass
class Compressing:
    """The compression behind one pg_dump: the size of the rows as text, and the most disk space that text used at any
    moment, in bytes. `ended`: pg_dump ended, so every file is complete; `given_up`: it failed."""

    directory: Path
    text_bytes: int = 0
    peak_bytes: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)

    def watch(self, pool: ThreadPoolExecutor) -> dict[str, Future[int]]:
        """Start to compress each file in the order of appearance, until pg_dump ended."""
        found = dict[str, Future[int]]()
        while True:
            ended, started, text = self.ended.is_set(), time.monotonic(), 0
            for entry in os.scandir(self.directory) if self.directory.is_dir() else ():
                if (entry.name in found and found[entry.name].done()) or not _DATA.fullmatch(entry.name):
                    continue
                with suppress(FileNotFoundError):
                    seen = entry.stat()
                    text += seen.st_blocks * 512
                    if entry.name not in found and seen.st_size > PLAIN_BYTES:
                        found[entry.name] = pool.submit(self.follow, Path(entry.path))
            self.peak_bytes = max(self.peak_bytes, text)
            if ended:
                return found
            self.ended.wait(max(_POLL_SECONDS, _PAUSES * (time.monotonic() - started)))

    def follow(self, path: Path) -> int:
        """Compress a file up to its end, which may not be written yet; returns the size of its text."""
        read = removed = 0
        with path.open("rb", buffering=0) as source, codec.writer(_packed(path), threads=0) as target:
            while not self.given_up.is_set():
                complete = self.ended.is_set() or _is_complete(source.fileno())
                while chunk := source.read(codec.CHUNK_BYTES):
                    target.write(chunk)
                    read += len(chunk)
                    if read - removed >= PUNCH_BYTES:
                        _remove(path, removed, read - removed)
                        removed = read
                    if len(chunk) < codec.CHUNK_BYTES:
                        break
                if complete:
                    break
                self.ended.wait(_POLL_SECONDS)
        path.unlink()
        return read


@contextmanager
def compressing(directory: Path, jobs: int, nice: int) -> Iterator[Compressing]:
    """While the block runs pg_dump with `--compress=0` into this directory, compress its files as they grow.

    Text that is compressed is removed from the disk at once, also from the beginning of a file that still grows: a big
    table needs no space for its text.

    Raises:
        OpsError: the disk is full.
    """
    done = Compressing(directory)
    with (
        ThreadPoolExecutor(jobs, initializer=_be_nice, initargs=(nice,)) as pool,
        ThreadPoolExecutor(1, initializer=_be_nice, initargs=(nice,)) as watcher,
    ):
        watching = watcher.submit(done.watch, pool)
        try:
            yield done
        except BaseException:
            done.given_up.set()
            raise
        finally:
            done.ended.set()
        try:
            texts = [file.result() for file in watching.result().values()]
        except OSError as error:
            hint = f"free disk space at {directory.parents[1]}; nothing was published"
            raise OpsError(f"the dump cannot be compressed: {error.strerror or error}", hint) from None
    done.text_bytes = sum(texts)
    if texts:  # a dump of small files is plain, and every pg_restore reads it
        _set_method(directory / CONTENTS, _ZSTD)


def _be_nice(nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)  # of this thread only


def _packed(path: Path) -> Path:
    return path.with_name(path.name + codec.ENDING)


def _is_complete(descriptor: int) -> bool:
    """Whether no process has a file open for writing: only then the kernel grants a lease for reading.

    Where the file system has no leases, a file is complete when pg_dump ended.
    https://man7.org/linux/man-pages/man2/F_GETLEASE.2const.html
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _remove(path: Path, offset: int, length: int) -> None:
    """Free a part of a file, where the file system can. Its size stays: pg_dump continues at its end."""
    descriptor = os.open(path, os.O_WRONLY)  # for a moment: see `_is_complete`
    try:
        arguments = (ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE), ctypes.c_int64(offset), ctypes.c_int64(length))
        ctypes.CDLL(None).fallocate64(ctypes.c_int(descriptor), *arguments)
    finally:
        os.close(descriptor)


def _set_method(contents: Path, method: bytes) -> None:
    """Write a dump's compression into its header, as pg_dump 16 and later do (`WriteHead`). pg_restore then sorts
    tables by the size of their files, and names the reason if it cannot read them."""
    with contents.open("r+b") as file:
        head = file.read(_METHOD_AT)
        if head.startswith(b"PGDMP") and head[5:7] >= _FIRST_WITH_METHOD:
            file.write(method)


def must_be_unpacked(postgres: Postgres, names: Iterable[str]) -> bool:
    """Whether a dump with these files must be unpacked for this pg_restore."""
    return any(name.endswith(codec.ENDING) for name in names) and not knows_compression(postgres, ZSTD)


def unpacked_bytes(postgres: Postgres, files: Mapping[str, FileSum], text_bytes: int, *, some: bool = False) -> int:
    """Disk space for the unpacked form of a backup's dump; 0 if pg_restore reads the dump as it is.

    `text_bytes`: the size of all its rows that the backup recorded; 0: unknown. `some`: these are some of its files.
    """
    packed = {name: file.bytes for name, file in files.items() if name.endswith(f".dat{codec.ENDING}")}
    if not must_be_unpacked(postgres, packed):
        return 0
    estimate = GROWTH * sum(packed.values())
    return min(text_bytes, estimate) if some and text_bytes else text_bytes or estimate


@contextmanager
def readable(
    postgres: Postgres,
    dump: Path,
    place: Path | None,
    jobs: int,
    text_bytes: int,
    numbers: Collection[str] | None = None,
) -> Iterator[Path]:
    """A dump as this pg_restore can read it: the directory itself, or its plain form in `place`, which is deleted at
    the end. `place`: None if it is not a backup's; `text_bytes`: as in `unpacked_bytes`; `numbers`: of the entries
    whose rows are needed; None: all.

    Raises:
        OpsError: there is not enough free disk space.
        VerificationFailed: a file is damaged.
    """
    if place is None or not dump.is_dir() or not must_be_unpacked(postgres, (path.name for path in dump.iterdir())):
        yield dump
        return
    try:
        place.mkdir(parents=True, mode=0o700)
        largest_first = sorted(dump.iterdir(), key=lambda path: -path.stat().st_size)
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(lambda path: _unpack(path, place, text_bytes, numbers), largest_first):
                pass
        yield place
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OpsError(f"the dump cannot be unpacked: {error.strerror}", f"free disk space at {place}") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # fetched files are still there
            place.parent.rmdir()


def _unpack(path: Path, place: Path, text_bytes: int, numbers: Collection[str] | None) -> None:
    number = path.name.partition(".")[0]
    if path.name == CONTENTS:
        shutil.copyfile(path, place / CONTENTS)
        _set_method(place / CONTENTS, _NONE)
    elif path.suffix != codec.ENDING:
        (place / path.name).symlink_to(path.absolute())
    elif numbers is None or number in numbers:
        with (
            codec.readable(path.name, OTHER_BACKUPS),
            codec.reader(path, text_bytes or codec.UNBOUNDED) as source,
            (place / path.stem).open("wb") as target,
        ):
            shutil.copyfileobj(source, target, UNPACK_BYTES)
