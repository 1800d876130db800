"""What a place for backups can do, whatever it is; and which place an environment's backups of a kind are in."""

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
    """A place for backups. A backup in it is a name with files below; small texts may stand beside."""

    @property
    def where(self) -> str:
        """For people: a path, or `s3://bucket/prefix`."""

    @property
    def spool(self) -> Path:
        """The directory of this host in which backups are made."""

    @property
    def hands(self) -> Path:
        """The directory of this host into which backups are brought to be read, in clear."""

    @property
    def key(self) -> Key:
        """Who may read what is put here."""

    def names(self) -> list[str]:
        """What is offered, in no order. In a bucket a name may also be a directory without a manifest that nobody is
        sending: reading it tells."""

    def stamps(self, folder: str) -> dict[str, str]:
        """The small texts directly in a folder: name → what changes whenever one is written."""

    def read(self, path: str) -> str | None:
        """A small text below the store; None where there is none.

        Raises:
            Unreachable: the store does not answer.
        """

    def identity(self, path: str) -> str | None:
        """What changes whenever a file below the store is replaced or written, without reading it; None where there is
        none, or it is too young to be told from its next version.

        Raises:
            Unreachable: the store does not answer.
        """

    def write(self, path: str, text: str) -> None:
        """Put a small text there, whole or not at all.

        Raises:
            OpsError: the store cannot be written to.
        """

    def claim(self, environment: str, name: str) -> bool:
        """Take a name for a backup that is being made; false where another environment has it, or takes it now."""

    def forget(self, path: str) -> None:
        """Take a small text away again."""

    def offer(self, directory: Path, name: str, files: Mapping[str, FileSum]) -> None:
        """Make a sealed directory of the spool a backup of this store: last of all it gets its name.

        Raises:
            OpsError, Unreachable: the store cannot be written to. What is in the spool stays, and can be offered again.
        """

    def receive(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> None:
        """Bring a copy of another store's backup here, from a sealed directory of this host, which stays. It has no
        name yet: `accept` gives it that. Interrupted and called again, a bucket goes on where it was.

        Raises:
            VerificationFailed: a file there is not what its SHA-256 says, or another backup has the name.
            OpsError, Unreachable: the store cannot be written to.
        """

    def accept(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> list[str]:
        """Read back to its end what was received from `source`, and give it its name; where something is wrong, remove
        it, and return that as sentences. One that has its name already was read back then.

        Raises:
            as `receive`.
        """

    def local(self, name: str) -> Path | None:
        """The directory of a backup's files where they are on this host already."""

    def fetch(self, name: str, files: Mapping[str, FileSum], target: Path) -> None:
        """Bring a backup's files to this host, each compared with its SHA-256.

        Raises:
            VerificationFailed: a file is missing or altered.
            Unreachable: the store does not answer.
        """

    def damage(self, name: str, files: Mapping[str, FileSum]) -> list[str]:
        """Read every file of a backup where it is; returns what is wrong, as sentences."""

    def remove(self, environment: str, name: str) -> None:
        """Take a backup away: it loses its name first. None there: nothing to do."""

    def keeps_deleted(self) -> bool | None:
        """Whether what is removed goes on taking space, as versions; None: the store does not let that be asked."""

    def unfinished(self, environment: str) -> list[str]:
        """Backups of an environment that were begun here and never offered, and those that wait in its spool."""

    def clean(self, environment: str, name: str) -> bool:
        """Remove what an unfinished one left; false where it turns out to be whole and offered: that stays."""


def has_place(environment: Environment, kind: Kind, which: Stores = "backups") -> bool:
    """Whether such a store is named: that of Prefect's own database need not be."""
    return environment.has(which) and bool(getattr(environment.stores(which), RESOURCE[kind]))


def store_of(
    environment: Environment, kind: Kind, which: Stores = "backups", *, patience_seconds: float = math.inf
) -> Store:
    """An environment's first or second store for one kind. Each has a spool of its own: what waits there for the one
    must not be sent to the other. A bucket is waited for no longer than `patience_seconds`.

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
