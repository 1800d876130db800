"""Files without a manifest: the manual's `dump_20260215.rdb` or `appendonly_20260215.aof`, or an `appendonlydir`
(§2.3).

Their expected content is unknown, so a restore of them is never proven. For one run such a file becomes a backup with
the time in its header, so that the restore treats it like any other.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blocks.redis.server import Redis
from runbook.errors import OTHER_BACKUPS, OpsError, VerificationFailed
from runbook.kinds import action, probe
from tasks.backups.catalogue import Backup, hand_of
from tasks.backups.manifest import MANIFEST, Manifest, damage, sums_of
from tasks.backups.manifest import read as read_manifest
from tasks.redis.backup.aof import FOLDER, Aof, copy_aof, cut_bytes, loaded_aof, read_aof
from tasks.redis.backup.rdb import RdbFile, read_rdb
from tasks.redis.backup.snapshot import RDB, manifest_of
from tasks.redis.content.manifest import RedisContent
from tasks.redis.scratch import scratch_server
from tasks.stores.store import Store

ENDINGS = (".rdb", ".aof")
SUPPORTED = "an RDB (.rdb), a single AOF (.aof), or an appendonlydir with its manifest"


@dataclass(frozen=True)
class Foreign:
    """A file or a directory without a manifest. `rdb`: the header of the file, or of an AOF's base; `aof`: its parts,
    None for an RDB."""

    path: Path
    bytes: int
    written: datetime
    rdb: RdbFile | None
    aof: Aof | None

    @property
    def form(self) -> str:
        """Its kind, for people."""
        return f"AOF of {len(self.aof.parts)} files" if self.aof else "RDB"


@dataclass(frozen=True)
class Adopted:
    """A foreign file as a backup of this run. `cut_bytes` of an incomplete command or transaction were left out at the
    end of an AOF. `has_more`: bytes after the end of an RDB were left out."""

    backup: Backup
    cut_bytes: int
    has_more: bool = False


def is_foreign(wanted: str) -> bool:
    """Whether `wanted` is a file or a directory, not a backup's name."""
    return wanted.startswith("/") or wanted.endswith(ENDINGS) or wanted.rstrip("/").endswith(FOLDER)


@probe
def read_foreign(directory: Path, wanted: str) -> Foreign:
    """Read a file's header; `wanted` is a path, or a name in the store's directory.

    Raises:
        OpsError: it does not exist, or belongs to a backup.
        VerificationFailed: it is neither an RDB nor an AOF, or incomplete.
    """
    path = directory / wanted
    _require_not_ours(path)
    try:
        is_rdb = path.is_file() and (path.suffix == ".rdb" or (path.suffix != ".aof" and _begins_as_rdb(path)))
        if is_rdb:
            found = read_rdb(path)
            return Foreign(path, found.bytes, found.written, found, None)
        if not path.exists():
            raise OpsError(f"{path} does not exist", f"choose one of: {SUPPORTED}")
        aof = read_aof(path)
        if not aof.bytes:
            raise VerificationFailed(f"{path.name} is empty", "choose another")
        base = aof.base
        rdb = read_rdb(base.path) if base and _begins_as_rdb(base.path) else None
        return Foreign(path, aof.bytes, aof.written, rdb, aof)
    except OSError as error:
        raise OpsError(f"{path} cannot be read: {error.strerror}", "correct the path, or its rights") from None


def _require_not_ours(path: Path) -> None:
    """Refuse a backup's files by path, because they would not be compared with their manifest. Only a backup's AOF is
    permitted, and its checksums are compared.

    Raises:
        OpsError: it is a backup, or another part of one.
        VerificationFailed: its AOF was altered.
    """
    for backup in (path, path.parent):
        if not (backup / MANIFEST).exists():
            continue
        if path.name != FOLDER:
            raise OpsError(f"{path} belongs to the backup {backup.name}", f"run it with backup={backup.name}")
        files, within = read_manifest(backup).files, f"{FOLDER}/"
        stored = {name.removeprefix(within): sums for name, sums in files.items() if name.startswith(within)}
        if problems := damage(path, stored):
            raise VerificationFailed(problems[0], OTHER_BACKUPS)


def _begins_as_rdb(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"REDIS", b"VALKEY"))


@action(idempotent=True)
def adopt(block: Redis, store: Store, environment: str, found: Foreign) -> Adopted:
    """Load a foreign file into a scratch server, read its content, and make it a backup of this run.

    Raises:
        VerificationFailed: it cannot be loaded (with the server's reason), or has types that cannot be compared.
    """
    hand = hand_of(store, environment)
    hand.mkdir(parents=True, mode=0o700, exist_ok=True)
    directory = hand / found.path.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    cut, has_more = 0, bool(found.rdb and not found.aof and not found.rdb.complete)
    try:
        if found.aof:
            cut = _convert(block, found.aof, directory)
        elif has_more:
            _save_again(block, found.path, directory)
        else:
            (directory / RDB).symlink_to(found.path.resolve())
        content = manifest_of(block, directory)
    except VerificationFailed as error:
        raise VerificationFailed(f"{found.path.name}: {error.message}", "choose another file") from None
    return Adopted(Backup(directory, _manifest(environment, found, directory, content), store), cut, has_more)


def _save_again(block: Redis, path: Path, directory: Path) -> None:
    """Cut an RDB at its end. A server ignores later bytes, but would read them if the file is the base of an AOF, as in
    a restore.

    Raises:
        VerificationFailed: the server cannot load it: it is truncated.
    """
    with tempfile.TemporaryDirectory(prefix=".rdb-", dir=directory) as name:
        place = Path(name)
        (place / RDB).symlink_to(path.resolve())
        with scratch_server(block, place) as client:
            client.save()
        (place / RDB).rename(directory / RDB)


def _convert(block: Redis, aof: Aof, directory: Path) -> int:
    """Save an AOF's content as an RDB."""
    with tempfile.TemporaryDirectory(prefix=".aof-", dir=directory) as name:
        place = Path(name)
        copy_aof(aof, place)
        with loaded_aof(block, place, RDB) as client:
            cut = cut_bytes(client, aof)
            client.save()
        (place / RDB).rename(directory / RDB)
    return cut


def _manifest(environment: str, found: Foreign, directory: Path, content: RedisContent) -> Manifest:
    return Manifest(
        kind="redis",
        name=found.path.name,
        environment=environment,
        taken=found.written,
        seconds=0.0,
        host=socket.gethostname(),
        tool=found.rdb.tool if found.rdb else "",
        files=sums_of(directory),
        content=content.model_dump(mode="json") | {"not_copied": []},
    )
