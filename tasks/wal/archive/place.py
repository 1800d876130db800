"""Where archived WAL is: a directory of this host or a bucket. What is there is never written over."""

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
from runbook.files.durable import sync
from runbook.guard.process import is_abandoned, this_process
from tasks.s3 import objects
from tasks.stores.directory import told

WRITING = ".writing-"
_LISTINGS = 100


class Place(Protocol):
    """Files of one cluster in the archive."""

    @property
    def where(self) -> str:
        """For people: a path, or `s3://bucket/prefix`."""

    def names(self) -> dict[str, int]:
        """Every file and its bytes as they are stored."""

    def put(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        """Write a file, whole or not at all, on disk when this returns. One of that name stays as it is.

        Raises:
            OpsError, Unreachable: it cannot be written.
        """

    def get(self, name: str) -> bytes:
        """A file's content.

        Raises:
            VerificationFailed: it is not there, or not what was written.
            OpsError, Unreachable: it cannot be read.
        """

    def remove(self, names: Sequence[str]) -> None:
        """Take files away; one that is not there is no error."""


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
                with contextlib.suppress(FileNotFoundError):  # a longer partial one has taken its place: list again
                    return self._sizes()
            return self._sizes()

    def _sizes(self) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if not entry.name.startswith(".")}

    def put(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        target, beside = self.path / name, self.path / f"{WRITING}{this_process().text}.{name}"
        with told(target):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside.write_bytes(content)
            sync(beside)
            failpoint("wal: written beside")
            with contextlib.suppress(FileExistsError):  # a link, not a rename: that would write over it
                target.hardlink_to(beside)
            beside.unlink()
            sync(self.path)

    def get(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise VerificationFailed(f"{name} is not in {self.path}", "look for another copy of it") from None
        except OSError as error:
            raise OpsError(f"{name} cannot be read: {error.strerror}", f"look at the disk of {self.path}") from None

    def remove(self, names: Sequence[str]) -> None:
        with told(self.path):
            for name in names:
                (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed writers left."""
        for path in self.path.glob(f"{WRITING}*"):
            with contextlib.suppress(FileNotFoundError):
                if is_abandoned(path.name.removeprefix(WRITING).partition(".")[0], path):
                    path.unlink()


@dataclass(frozen=True)
class BucketPlace:
    """A bucket, and what stands before every name in it."""

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
            raise VerificationFailed(f"{name} is not in {self.where}", "look for another copy of it")
        return content

    def remove(self, names: Sequence[str]) -> None:
        objects.delete(self.bucket, [f"{self.folder}/{name}" for name in names])


def place_of(env: Environment, which: Stores, of: str, system: int, *, patience_seconds: float = math.inf) -> Place:
    """The archive of the cluster `system` of the environment `of` (another's, where this one restores it).

    Raises:
        OpsError: the environment has no such set of stores, or the address is wrong.
    """
    backups = env.stores(which)
    if not backups.wal.startswith("s3://"):
        return DirectoryPlace(Path(backups.wal) / of / str(system))
    bucket = backups.bucket(backups.wal)
    patience = min(bucket.patience_seconds, patience_seconds)
    return BucketPlace(dataclasses.replace(bucket, patience_seconds=patience), f"{of}/{system}")
