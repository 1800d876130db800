"""The place of an archive: a directory of this host or a bucket. A file is never overwritten."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blocks.environment import Environment, Stores
from blocks.s3 import Bucket
from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.files.durable import sync
from runbook.guard.process import is_abandoned, this_process
from tasks.s3 import objects
from tasks.stores.directory import told

WRITING = ".writing-"
_LISTINGS = 100


class ArchivePlace(Protocol):
    """Files of one cluster in the archive."""

    @property
    def where(self) -> str:
        """A path, or `s3://bucket/prefix`."""

    def names(self) -> dict[str, int]:
        """Every file and its stored bytes."""

    def put(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        """Write a file atomically; it is on disk when this returns. An existing file of that name stays.

        Raises:
            OpsError, Unreachable: it cannot be written.
        """

    def get(self, name: str) -> bytes:
        """A file's content.

        Raises:
            VerificationFailed: it is missing or altered.
            OpsError, Unreachable: it cannot be read.
        """

    def remove(self, names: Sequence[str]) -> None:
        """Delete files; a missing one is no error."""


@dataclass(frozen=True)
class DirectoryPlace:
    """A directory."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def names(self) -> dict[str, int]:
        if not self.path.is_dir():
            return {}
        with told(self.path):
            for _ in range(_LISTINGS):
                with contextlib.suppress(FileNotFoundError):  # a longer partial one replaced it: list again
                    return self._sizes()
            return self._sizes()

    def _sizes(self) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if not entry.name.startswith(".")}

    def put(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        target, unfinished = self.path / name, self.path / f"{WRITING}{this_process().text}.{name}"
        with told(target):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            inside.write(unfinished, content, None)
            sync(unfinished)
            failpoint("wal: written unfinished")
            with contextlib.suppress(FileExistsError):  # a link, not a rename, which would overwrite it
                inside.link(unfinished, target)
            unfinished.unlink()
            sync(self.path)

    def get(self, name: str) -> bytes:
        try:
            return inside.read(self.path / name)
        except FileNotFoundError:
            raise VerificationFailed(f"{name} is not in {self.path}", "find another copy of it") from None
        except OSError as error:
            raise OpsError(f"{name} cannot be read: {error.strerror}", f"check the disk of {self.path}") from None

    def remove(self, names: Sequence[str]) -> None:
        with told(self.path):
            for name in names:
                (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed writers left."""
        for path in self.path.glob(f"{WRITING}*"):
            with contextlib.suppress(FileNotFoundError):
                if is_abandoned(path.name.removeprefix(WRITING).partition(".")[0], path):
                    path.unlink()


@dataclass(frozen=True)
class BucketPlace:
    """A bucket, and the prefix of every name in it."""

    bucket: Bucket
    folder: str

    @property
    def where(self) -> str:
        return f"{self.bucket.where}/{self.folder}"

    def names(self) -> dict[str, int]:
        found = objects.list_objects(self.bucket, self.folder)
        return {key.removeprefix(f"{self.folder}/"): size for key, size in found.items()}

    def put(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        objects.write_small(self.bucket, f"{self.folder}/{name}", content, lock=lasting)

    def get(self, name: str) -> bytes:
        content = objects.read_small(self.bucket, f"{self.folder}/{name}")
        if content is None:
            raise VerificationFailed(f"{name} is not in {self.where}", "find another copy of it")
        return content

    def remove(self, names: Sequence[str]) -> None:
        objects.delete(self.bucket, [f"{self.folder}/{name}" for name in names])


def place_of(
    env: Environment, which: Stores, of: str, system: int, *, patience_seconds: float = math.inf
) -> ArchivePlace:
    """The archive of the cluster `system` of the environment `of` (another one where this one restores it).

    Raises:
        OpsError: these stores are not configured, or their address is wrong.
    """
    backups = env.stores(which)
    if not backups.wal.startswith("s3://"):
        return DirectoryPlace(Path(backups.wal) / of / str(system))
    bucket = backups.bucket(backups.wal)
    patience = min(bucket.patience_seconds, patience_seconds)
    return BucketPlace(dataclasses.replace(bucket, patience_seconds=patience), f"{of}/{system}")
