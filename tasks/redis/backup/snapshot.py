"""A snapshot of the live server: a proven BGSAVE, and a copy of its RDB (§2.3)."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.files import inside
from runbook.kinds import action, probe
from tasks.redis.content.manifest import EXPIRING, RedisContent
from tasks.redis.content.reading import read_content
from tasks.redis.persistence.saving import bgsave
from tasks.redis.persistence.state import ask
from tasks.redis.scratch import scratch_server
from tasks.redis.server import connected, key_counts, setting, version_of
from tasks.redis.settings.file import masked, read_configuration

RDB = "dump.rdb"
CLOCK_SLACK_SECONDS = 2.0


@dataclass(frozen=True)
class SnapshotSource:
    """The live server before a backup."""

    version: str
    role: str
    keys: int
    dataset_bytes: int
    directory: Path
    rdb: str
    save_status: str


@dataclass(frozen=True)
class Snapshot:
    """A copied RDB. `taken`: a time before its fork; every write acknowledged by then is in it."""

    path: Path
    taken: datetime
    seconds: float
    not_copied: tuple[str, ...]


@probe
def read_source(block: Redis) -> SnapshotSource:
    """Version, role, size, and the directory to which it saves.

    Raises:
        Unreachable: it is down.
        OpsError: it refuses the password or a command.
    """
    with connected(block) as client:
        persistence = client.info("persistence")
        if persistence["loading"]:
            raise OpsError("Redis is still loading its data", "run it again when it has loaded them")
        return SnapshotSource(
            version=version_of(client),
            role=str(client.info("replication")["role"]),
            keys=sum(keys for keys, _ in key_counts(client).values()),
            dataset_bytes=int(client.info("memory")["used_memory_dataset"]),
            directory=Path(setting(client, "dir")),
            rdb=setting(client, "dbfilename"),
            save_status=str(persistence["rdb_last_bgsave_status"]),
        )


@action
def snapshot(block: Redis, source: SnapshotSource, directory: Path) -> Snapshot:
    """Save in the background, wait until it is proven, and copy the RDB to `directory`, with the configuration and ACL
    files without their secrets.

    Raises:
        OpsError: the save failed (with the reason from INFO and the disk), or its file is not on this host.
    """
    started = time.monotonic()
    taken = bgsave(block, ask(block)).taken
    path = directory / RDB
    _copy(source.directory / source.rdb, path, taken)
    return Snapshot(path, taken, time.monotonic() - started, tuple(copy_settings(block, directory)))


@action(idempotent=True)
def read_manifest(block: Redis, directory: Path) -> RedisContent:
    """Load the copied RDB into a scratch server and read its content there, because the live server has changed since.
    It also writes the list of expiring keys.

    Raises:
        VerificationFailed: it cannot be loaded, or has a type that cannot be compared.
    """
    return manifest_of(block, directory)


def manifest_of(block: Redis, directory: Path) -> RedisContent:
    """See `read_manifest`."""
    with scratch_server(block, directory, rdb=RDB) as client:
        found = read_content(client, directory / EXPIRING)
    with (directory / RDB).open("rb") as file:
        return found.model_copy(update={"rdb_version": file.read(9).decode(errors="replace")})


def _copy(source: Path, target: Path, taken: datetime) -> None:
    hint = "run this on the server's host, or correct its dir"
    try:
        with readable(source), inside.reading(source) as file, target.open("wb") as out:
            # Opened once: another save replaces the name, not this file.
            if os.fstat(file.fileno()).st_mtime < taken.timestamp() - CLOCK_SLACK_SECONDS:
                raise OpsError(f"{source} on this host is older than the snapshot", hint)
            shutil.copyfileobj(file, out, 1 << 20)
    except FileNotFoundError:
        raise OpsError(f"the server saved to {source}, which is not on this host", hint) from None
    target.chmod(0o600)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Report a file of the server that this user cannot read, or may not: see `inside`.

    Raises:
        OpsError: instead of a PermissionError.
    """
    try:
        yield
    except PermissionError as error:
        hint = "run as root or as the server's user; delete a link that is not yours"
        raise OpsError(f"{path} cannot be read: {error.strerror}", hint) from None


def copy_settings(block: Redis, directory: Path) -> list[str]:
    """Copy files without secrets; returns sentences about files that could not be copied."""
    try:
        configuration = read_configuration(Path(block.config_file))
    except OpsError as error:
        return [error.message]
    named = [(path, f"configuration-{number}-{path.name}") for number, path in enumerate(configuration.files)]
    if acl := configuration.get("aclfile"):
        named.append((Path(acl), "users.acl"))
    missed = []
    for path, name in named:
        try:
            (directory / name).write_text(masked(path), encoding="utf-8", errors="surrogateescape")
        except OpsError as error:
            missed.append(error.message)
    return missed
