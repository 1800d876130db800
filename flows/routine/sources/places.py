"""The directories of an environment that must not fill up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import OpsError
from tasks.host.disk import Disk, disk_of, is_here


@dataclass(frozen=True)
class MeasuredPlace:
    """A directory, what it contains, and its host ("": this one)."""

    what: str
    path: str
    host: str = ""


@dataclass(frozen=True)
class Filled:
    """A file system and the places on it."""

    disk: Disk
    what: tuple[str, ...]

    @property
    def used_ratio(self) -> float:
        """The used share, as df shows it."""
        return self.disk.bytes_ratio if self.disk.total_bytes else 1.0


def places_of(env: Environment) -> Iterator[MeasuredPlace]:
    """The manual's `/` and `/var`, and the directories of data, logs, backups, reports and the application."""
    yield MeasuredPlace("/", "/")
    yield MeasuredPlace("/var", "/var")
    yield MeasuredPlace("reports", str(env.reports_directory))
    if env.has("postgres"):
        yield from (MeasuredPlace(f"PostgreSQL {node.port}", node.data_directory, node.host) for node in env.nodes())
    if env.has("redis"):
        yield MeasuredPlace("Redis", env.redis.data_directory, env.redis.host)
    if env.has("logs") and env.logs.app:
        yield MeasuredPlace("logs", str(Path(env.logs.app).parent))
    if env.has("application"):
        yield MeasuredPlace("application", env.application.directory)
    if env.has("wal"):
        yield MeasuredPlace("WAL", env.wal.directory, env.postgres.host)
    for which in ("backups", "copies"):
        if env.has(which):
            stores = env.stores(which)
            yield from (MeasuredPlace(f"{which} of {kind}", str(getattr(stores, kind))) for kind in _KINDS)
            yield MeasuredPlace(f"spool of {which}", stores.spool)


_KINDS = ("postgres", "redis", "files", "cluster", "wal")


def read_places(env: Environment) -> tuple[list[Filled], list[tuple[MeasuredPlace, str]]]:
    """Every file system once, the fullest first; and the places that cannot be measured from here, with the reason.
    Buckets are left out: they have no limit."""
    found, unknown = dict[int, tuple[Disk, list[str]]](), list[tuple[MeasuredPlace, str]]()
    for place in places_of(env):
        if not place.path or place.path.startswith("s3://"):
            continue
        if not is_here(place.host):
            unknown.append((place, f"it is on {place.host}"))
            continue
        try:
            disk = disk_of(Path(place.path))
        except OpsError as error:
            unknown.append((place, error.message))
            continue
        found.setdefault(disk.device, (disk, []))[1].append(place.what)
    filled = [Filled(disk, tuple(what)) for disk, what in found.values()]
    return sorted(filled, key=lambda one: -one.used_ratio), unknown
