"""The file systems that an environment's data is on: how full they are, called with the open report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.render import size
from runbook.report import Report, Status
from tasks.host import disk_of, is_here

METRIC = "host.disk.used_ratio"
LIMITS = (0.85, 0.95)  # the manual's alarm is 85 % (appendix B)


@dataclass(frozen=True)
class FileSystem:
    """One of them, and which of the environment's paths are on it."""

    device: int
    total_bytes: int
    free_bytes: int
    paths: tuple[str, ...]

    @property
    def used_ratio(self) -> float:
        """As df shows it to this user."""
        return 1 - self.free_bytes / self.total_bytes if self.total_bytes else 0.0

    def is_over(self, report: Report) -> bool:
        """Whether it is fuller than the environment's threshold."""
        return self.used_ratio > report.limits.get(METRIC, LIMITS)[0]


def paths_of(env: Environment) -> Iterator[tuple[str, Path]]:
    """Everything of the environment on this host that grows."""
    yield "reports", env.reports_directory
    yield "temporary files", Path(tempfile.gettempdir())
    if env.has("postgres"):
        for node in env.nodes():
            if is_here(node.host):
                yield f"{node.service}", Path(node.data_directory)
    if env.has("redis") and is_here(env.redis.host):
        yield "redis", Path(env.redis.data_directory)
    if env.has("backups"):
        places = env.backups
        named = [(name, str(getattr(places, name))) for name in ("postgres", "redis", "files", "cluster", "wal")]
        yield from ((f"backups: {name}", Path(place)) for name, place in named if place.startswith("/"))
        yield "spool", Path(places.spool)
    if env.has("wal"):
        yield "received WAL", Path(env.wal.directory)
    if env.has("logs"):
        yield "logs", Path(env.logs.app).parent
    if env.has("application") and env.application.directory:
        yield "application", Path(env.application.directory)


def read_systems(report: Report, env: Environment) -> list[FileSystem]:
    """The fullest first. A path that cannot be measured is told, not left out."""
    found: dict[int, FileSystem] = {}
    for name, path in paths_of(env):
        try:
            disk = disk_of(path)
        except OpsError as error:
            report.warn(f"not measured: {name}", error.hint, value=error.message)
            continue
        known = found[disk.device].paths if disk.device in found else ()
        found[disk.device] = FileSystem(disk.device, disk.total_bytes, disk.free_bytes, (*known, f"{name} {path}"))
    return sorted(found.values(), key=lambda one: -one.used_ratio)


def judge_systems(report: Report, systems: Sequence[FileSystem], *, otherwise: Status, when: str = "") -> None:
    """A full disk is this run's reason, not its obstacle: before something was removed it is no more than a warning."""
    warn, critical = report.limits.get(METRIC, LIMITS)
    for one in systems:
        where = one.paths[0].rpartition(" ")[2]
        status = otherwise if one.used_ratio > critical else Status.WARN
        report.expect(" ".join(filter(None, (METRIC, when, f"({where})"))), not one.is_over(report),
                      "what holds it is in the table below, the biggest first",
                      value=f"{one.used_ratio:.1%}, {size(one.free_bytes)} of {size(one.total_bytes)} free",
                      expected=f"≤ {warn:.0%} (critical above {critical:.0%})", otherwise=status)  # fmt: skip
    if not when:
        rows = [(f"{one.used_ratio:.1%}", size(one.free_bytes), size(one.total_bytes), "; ".join(one.paths))
                for one in systems]  # fmt: skip
        report.table("File systems", ("used", "free", "size", "what of the environment is on it"), rows)
