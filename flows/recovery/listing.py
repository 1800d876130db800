"""The options of full-restore, by listings alone: for overviews that must not read all of the WAL (§8.4).

The plan of full-restore judges the same options, and reads the WAL too: only there a statement is found that destroyed
data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from blocks.environment import Environment, Stores
from blocks.services.service import DockerServices
from flows.redis.restore import sources
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report
from tasks.host.disk import is_here
from tasks.recovery_points.point import Point, best_of


@dataclass(frozen=True)
class ListedOption:
    """One option for the database: `method` of full-restore, and the point that it reaches."""

    method: Literal["cluster", "dump"]
    point: Point

    @property
    def kind(self) -> str:
        """For people."""
        return "base backup and WAL" if self.method == "cluster" else "a dump"


def cluster_obstacle(env: Environment) -> str:
    """Why full-restore can restore no cluster in this environment; "" if it can."""
    if not env.has("wal"):
        return "its TOML has no [wal]"
    if not is_here(env.postgres.host) or isinstance(env.services, DockerServices):
        return "its data directory is not on this host"
    return ""


def list_options(env: Environment, points: Iterable[Point], which: Stores) -> list[ListedOption]:
    """The database's options in the stores `which`, the least loss first."""
    own = [one for one in points if (one.resource, one.place) == ("database", which)]
    cluster = None if cluster_obstacle(env) else best_of(one for one in own if one.means == "point in time")
    dump = best_of(one for one in own if one.means == "backup")
    found = [ListedOption("cluster", cluster)] if cluster else []
    found += [ListedOption("dump", dump)] if dump else []
    return sorted(found, key=lambda one: one.point.at or datetime.min.replace(tzinfo=UTC), reverse=True)


def report_redis(report: Report, env: Environment) -> None:
    """Report the sources of Redis's data with their losses, and the one that full-restore would take."""
    if not env.has("redis"):
        return
    try:
        sources.compare(report, env, "auto")
    except RunbookFailed:
        pass  # its finding is in the report
    except OpsError as error:
        hint = error.hint or "the plan of full-restore judges them again"
        report.warn("sources of Redis's data", hint, value=f"not compared: {error.message}")
