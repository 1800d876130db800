"""The protocol of a backup store, and the store of an environment's backups of a kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from blocks.environment import Environment, Stores
from runbook.errors import OpsError
from tasks.backups.encryption import Key
from tasks.backups.manifest import FileSum, Kind
from tasks.stores.bucket import BucketStore
from tasks.stores.directory import DirectoryStore

RESOURCE: dict[Kind, str] = {
    "postgres": "postgres",
    "schema": "postgres",
    "tables": "postgres",
    "sql": "postgres",
    "redis": "redis",
    "files": "files",
    "cluster": "cluster",
    "prefect": "prefect",
}


class Store(Protocol):
    """A backup store. A backup in it is a name with files below; a store also has small texts."""

    @property
    def where(self) -> str:
        """Its address as people read it: a path, or `s3://bucket/prefix`."""

    @property
    def spool(self) -> Path:
        """The directory of this host in which backups are made."""

    @property
    def hands(self) -> Path:
        """The directory of this host for fetched and decrypted backups."""

    @property
    def key(self) -> Key:
        """The keys that encrypt and decrypt its backups."""

    def names(self) -> list[str]:
        """The names of its backups, unordered. In a bucket, a name may also be a directory without a manifest:
        opening it shows that."""

    def stamps(self, folder: str) -> dict[str, str]:
        """The small texts directly in a folder: name → a value that changes with every write."""

    def read(self, path: str) -> str | None:
        """A small text of the store; None if there is none.

        Raises:
            Unreachable: the store does not answer.
        """

    def identity(self, path: str) -> str | None:
        """A value that changes when a file is replaced or written, without reading it; None if there is no such file,
        or it is too young to be distinguished from its next version.

        Raises:
            Unreachable: the store does not answer.
        """

    def write(self, path: str, text: str) -> None:
        """Write a small text atomically.

        Raises:
            OpsError: the store cannot be written to.
        """

    def claim(self, environment: str, name: str) -> bool:
        """Reserve the name of a backup that is being made; false if another environment has it."""

    def forget(self, path: str) -> None:
        """Delete a small text."""

    def offer(self, directory: Path, name: str, files: Mapping[str, FileSum]) -> None:
        """Make a sealed directory of the spool a backup of this store. It gets its name last.

        Raises:
            OpsError, Unreachable: the store cannot be written to. The spool keeps the backup for another attempt.
        """

    def receive(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> None:
        """Copy another store's backup here, from a sealed directory of this host, which is kept. `accept` gives it its
        name. After an interruption, a bucket continues where it stopped.

        Raises:
            VerificationFailed: the SHA-256 of a file differs, or another backup has the name.
            OpsError, Unreachable: the store cannot be written to.
        """

    def accept(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> list[str]:
        """Read back a received copy and give it its name. A damaged copy is deleted; its problems are returned as
        sentences. A copy that already has its name is not read again.

        Raises:
            as `receive`.
        """

    def local(self, name: str) -> Path | None:
        """The directory of a backup's files if they are on this host; else None."""

    def fetch(self, name: str, files: Mapping[str, FileSum], target: Path) -> None:
        """Copy a backup's files to this host and compare each with its SHA-256.

        Raises:
            VerificationFailed: a file is missing or altered.
            Unreachable: the store does not answer.
        """

    def damage(self, name: str, files: Mapping[str, FileSum]) -> list[str]:
        """Read every file of a backup in its store; returns the problems as sentences."""

    def remove(self, environment: str, name: str) -> None:
        """Delete a backup. It loses its name first. A missing backup is no error."""

    def keeps_deleted(self) -> bool | None:
        """Whether deleted objects still use space, as versions; None if the store does not answer that."""

    def unfinished(self, environment: str) -> list[str]:
        """An environment's unfinished backups, and those that wait in the spool."""

    def clean(self, environment: str, name: str) -> bool:
        """Delete the rest of an unfinished backup; false if it is complete after all, and kept."""


def has_place(environment: Environment, kind: Kind, which: Stores = "backups") -> bool:
    """Whether the environment names such a store; for Prefect's own database it is optional."""
    return environment.has(which) and bool(getattr(environment.stores(which), RESOURCE[kind]))


def store_of(
    environment: Environment, kind: Kind, which: Stores = "backups", *, patience_seconds: float = math.inf
) -> Store:
    """An environment's store or replica store for one kind. Each has its own spool: a backup that waits for one must
    not be sent to the other. Requests to a bucket are retried for at most `patience_seconds`.

    Raises:
        OpsError: the environment has no such store, or its address or a key is wrong.
    """
    backups, resource = environment.stores(which), RESOURCE[kind]
    place = str(getattr(backups, resource))
    if not place:
        raise OpsError(f"[{which}] names no place for backups of {resource}", f'add {resource} = "…" to [{which}]')
    key = Key.of(backups.recipients, backups.identity.get_secret_value())
    spool = Path(backups.spool) / environment.name / which / resource
    if not place.startswith("s3://"):
        return DirectoryStore(Path(place), key, spool)
    bucket = backups.bucket(place)
    patience = min(bucket.patience_seconds, patience_seconds)
    return BucketStore(dataclasses.replace(bucket, patience_seconds=patience), spool, key)
