"""A copy of the live server's AOF, with rewrites off, proven by a scratch server that loads it (§2.3).

The copied file can end within a command. The scratch server finds the last complete command, and the copy ends there.
Every write acknowledged before the copy is included.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.redis.server import Redis
from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import inside, record
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.redis.backup.aof import FOLDER, MANIFEST_ENDING, STEM, Aof, copy_aof, cut_bytes, loaded_aof, read_parts
from tasks.redis.backup.snapshot import RDB, Snapshot, SnapshotSource, copy_settings, manifest_of
from tasks.redis.content.manifest import EXPIRING, RedisContent, compare
from tasks.redis.content.reading import read_content
from tasks.redis.persistence.saving import SAVE_SECONDS
from tasks.redis.server import connected, setting

RECORD = "redis-aof-rewrites.json"
REWRITES = "auto-aof-rewrite-percentage"
POSTPONED_SECONDS = 3.0
"""A server writes acknowledged data after at most two seconds (`appendfsync everysec`, a slow disk)."""
ATTEMPTS = 3


@dataclass(frozen=True)
class AofCopy(Snapshot):
    """`path`: the RDB with the AOF's content; `content`: that content; `parts`, `aof_bytes`: of the AOF; `cut`: bytes
    of an incomplete command that were left out."""

    content: RedisContent
    parts: int = 0
    aof_bytes: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Rewrites:
    """A server's auto-aof-rewrite-percentage before a backup set it to 0."""

    server: str
    percentage: str


@action(idempotent=True)
def put_rewrites_back(block: Redis, reports: Path) -> str:
    """Switch AOF rewrites on if a killed run left them off; returns what was done, "": nothing.

    Raises:
        Unreachable, OpsError: the server does not answer, or refuses.
    """
    return _put_back(block, reports)


def _put_back(block: Redis, reports: Path) -> str:
    left = record.read(reports / RECORD, Rewrites, f"CONFIG SET {REWRITES} 100, then remove it")
    if left is None:
        return ""
    with connected(block.at(left.server)) as client:
        off = setting(client, REWRITES) == "0"
        if off:
            client.config_set(REWRITES, left.percentage)
    (reports / RECORD).unlink()
    return f"{REWRITES} {left.percentage} on {left.server}, restored; a killed backup had left it at 0" if off else ""


@probe
def read_aof_bytes(block: Redis) -> int:
    """The size of the live server's AOF in bytes; 0: it is off."""
    with connected(block) as client:
        return int(client.info("persistence").get("aof_current_size", 0))


@contextmanager
def rewrites_off(block: Redis, reports: Path) -> Iterator[None]:
    """No rewrite runs or starts automatically within the block. The setting is recorded before."""
    with connected(block) as client:
        percentage = setting(client, REWRITES)
        if percentage != "0":
            record.write(reports / RECORD, Rewrites(block.address, percentage))
            failpoint("redis: aof rewrites recorded")
            client.config_set(REWRITES, 0)
    failpoint("redis: aof rewrites off")
    try:
        until(lambda: not _rewriting(block), what="the end of a rewrite of the AOF", seconds=SAVE_SECONDS)
        yield
    finally:
        _put_back(block, reports)


@action
def snapshot_aof(block: Redis, source: SnapshotSource, directory: Path, reports: Path) -> AofCopy:
    """Copy the AOF's parts to `directory/appendonlydir`, prove them, and save their content as an RDB, which a restore
    uses.

    Raises:
        OpsError: the AOF is off, cannot be written, or its files are not on this host.
        VerificationFailed: the copy cannot be loaded, or its RDB differs.
    """
    started = time.monotonic()
    with connected(block) as client:
        folder, stem = setting(client, "appenddirname"), setting(client, "appendfilename")
        if not client.info("persistence")["aof_enabled"]:
            raise OpsError("the AOF is off", "CONFIG SET appendonly yes (§2.3), or take the backup with kind=rdb")
    manifest = source.directory / folder / f"{stem}{MANIFEST_ENDING}"
    with tempfile.TemporaryDirectory(prefix=".aof-", dir=directory) as place:
        with rewrites_off(block, reports):
            aof, taken = _copy(block, manifest, Path(place))
        cut, content = _prove(block, aof, Path(place), directory)
    missed = tuple(copy_settings(block, directory))
    seconds = time.monotonic() - started
    return AofCopy(directory / RDB, taken, seconds, missed, content, len(aof.parts), aof.bytes - cut, cut)


@action
def snapshot_stopped_aof(block: Redis, manifest: Path, directory: Path) -> AofCopy:
    """As `snapshot_aof`, of a server that is stopped: its files do not change meanwhile.

    Raises:
        VerificationFailed: the AOF is incomplete, or cannot be loaded.
    """
    started, aof = time.monotonic(), read_parts(manifest)
    with tempfile.TemporaryDirectory(prefix=".aof-", dir=directory) as place:
        copy_aof(aof, Path(place))
        cut, content = _prove(block, aof, Path(place), directory)
    missed = tuple(copy_settings(block, directory))
    seconds = time.monotonic() - started
    return AofCopy(directory / RDB, aof.written, seconds, missed, content, len(aof.parts), aof.bytes - cut, cut)


def _copy(block: Redis, manifest: Path, place: Path) -> tuple[Aof, datetime]:
    """The parts at one moment; read again if the AOF is rewritten meanwhile."""
    for _ in range(ATTEMPTS):
        taken = datetime.now(UTC)
        _written(block)
        try:
            before = inside.read(manifest)
            aof = read_parts(manifest)
            copy_aof(aof, place)
            if inside.read(manifest) == before:
                return aof, taken
        except FileNotFoundError as error:
            if not manifest.exists():
                hint = "run this on the server's host, or take the backup with kind=rdb"
                raise OpsError(f"the AOF's files are not on this host: {error.filename}", hint) from None
        (place / FOLDER).rename(place / f"{FOLDER}.{time.monotonic_ns()}")
    raise OpsError("another client keeps rewriting the AOF", "stop these BGREWRITEAOF, then run it again")


def _written(block: Redis) -> None:
    """Wait until every write acknowledged so far is in the file."""
    end = time.monotonic() + POSTPONED_SECONDS

    def written() -> bool:
        with connected(block) as client:
            info = client.info("persistence")
        if info["aof_last_write_status"] != "ok":
            raise OpsError("the server cannot write its AOF", "check its log and the free disk space of its directory")
        return not info["aof_buffer_length"] or time.monotonic() > end

    until(written, what="the AOF's last write", seconds=POSTPONED_SECONDS * 2, every_seconds=0.01)


def _prove(block: Redis, aof: Aof, place: Path, directory: Path) -> tuple[int, RedisContent]:
    """Load the copy, save its content as an RDB, and compare the two; returns the bytes left out at the end, and the
    content."""
    with loaded_aof(block, place, RDB) as client:
        cut = cut_bytes(client, aof)
        held = read_content(client, place / EXPIRING)
        client.save()
    last = aof.parts[-1]
    # The scratch server appends its own expirations, which are not part of the copy.
    os.truncate(_copied(place, last.number), last.bytes - cut)
    (place / RDB).rename(directory / RDB)
    (directory / RDB).chmod(0o600)
    (place / FOLDER).rename(directory / FOLDER)
    failpoint("redis: aof copied")
    saved = manifest_of(block, directory)
    found = compare(held, place / EXPIRING, saved, directory / EXPIRING)
    if not found.is_equal:
        raise VerificationFailed(
            f"the RDB differs from the AOF that it was made from: {found.differences[0]}", "run it again"
        )
    return cut, saved


def _copied(place: Path, number: int) -> Path:
    found = [path for path in (place / FOLDER).iterdir() if path.name.startswith(f"{STEM}.{number}.")]
    return max(found, key=lambda path: path.name.endswith(".incr.aof"))


def _rewriting(block: Redis) -> bool:
    with connected(block) as client:
        info = client.info("persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])
