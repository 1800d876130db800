"""The file systems that hold an environment's data, and how full they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.environment import Environment
from runbook import metrics
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.host.disk import Disk, disk_of, is_here
from tasks.host.space import temporary_directory


@dataclass(frozen=True)
class FileSystem:
    """One file system, and the environment's paths on it."""

    disk: Disk
    paths: tuple[str, ...]

    @property
    def device(self) -> int:
        """The device number, which identifies the file system."""
        return self.disk.device

    def is_over(self, report: Report) -> bool:
        """Whether it is fuller than the environment's threshold."""
        return self.disk.used_ratio > report.limit(metrics.DISK)[0]


def paths_of(env: Environment) -> Iterator[tuple[str, Path]]:
    """The environment's directories on this host that grow."""
    yield "reports", env.reports_directory
    yield "temporary files", temporary_directory()
    if env.has("postgres"):
        for node in env.nodes():
            if is_here(node.host):
                yield from _of_server(node.service, Path(node.data_directory))
    if env.has("redis") and is_here(env.redis.host):
        yield "redis", Path(env.redis.data_directory)
    if env.has("backups"):
        places = env.backups
        named = [(name, str(getattr(places, name))) for name in ("postgres", "redis", "files", "cluster", "wal")]
        yield from ((f"backups: {name}", Path(place)) for name, place in named if place.startswith("/"))
        yield "spool", Path(places.spool)
    if env.has("wal"):
        yield "received WAL", Path(env.wal.directory)
    if env.has("logs") and env.logs.app:
        yield "logs", Path(env.logs.app).parent
    if env.has("application") and env.application.directory:
        yield "application", Path(env.application.directory)


def _of_server(service: str, data: Path) -> Iterator[tuple[str, Path]]:
    """WAL and tablespaces may be on other file systems."""
    yield service, data
    with contextlib.suppress(OSError):  # this user cannot read it: reported once, by read_systems
        for link in (data / "pg_wal", *sorted((data / "pg_tblspc").glob("*"))):
            if link.is_symlink():
                yield f"{service}: {link.name}", link.resolve()


def read_systems(report: Report, env: Environment) -> list[FileSystem]:
    """The fullest first. A path that cannot be measured is a WARN."""
    found: dict[int, FileSystem] = {}
    for name, path in paths_of(env):
        try:
            disk = disk_of(path)
        except OpsError as error:
            report.warn(f"not measured: {name}", error.hint, value=error.message)
            continue
        known = found[disk.device].paths if disk.device in found else ()
        found[disk.device] = FileSystem(disk, (*known, f"{name} {path}"))
    return sorted(found.values(), key=lambda one: -one.disk.used_ratio)


def judge_systems(report: Report, systems: Sequence[FileSystem], *, afterwards: bool = False) -> None:
    """Judge how full they are. Before anything is deleted, a full disk is at most a WARN: it is the run's reason."""
    for one in systems:
        where = one.paths[0].rpartition(" ")[2] + (", afterwards" if afterwards else "")
        report.judge(
            metrics.DISK,
            one.disk.used_ratio,
            "check the table “What uses the space”, largest first",
            of=f"{where}: {one.disk.told}",
            worst=Status.CRITICAL if afterwards else Status.WARN,
        )
    if not afterwards:
        rows = [(metrics.DISK.show(one.disk.used_ratio), one.disk.told, "; ".join(one.paths)) for one in systems]
        report.table("File systems", ("used", "free", "paths of the environment on it"), rows)
