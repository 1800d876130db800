"""The whole cluster as of a point in time: built and proven next to the live one, then swapped in and started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from blocks.environment import Environment, Stores
from flows.recovery import unlogged
from flows.recovery.gate import ClusterCopy, before_of
from flows.recovery.point import build, choice, server_state, swap
from flows.recovery.point import target as point_target
from flows.recovery.point.start import ClusterStart
from flows.recovery.point.target import FoundTarget
from flows.recovery.stopped_services import ClusterServices, read_cluster_services
from runbook.change import Carrier, Change, Line
from runbook.guard.effect import seconds_from
from runbook.report import Report
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.swap import sync_cluster
from tasks.cluster.target import RecoveryTarget
from tasks.postgres.tables.filenodes import read_database_names
from tasks.wal.archive.continuity import Link

AFTERWARDS = "and its WAL receiver; afterwards: rejoin-standby and backup-cluster"


@dataclass(frozen=True)
class ClusterReplacement:
    """The lines of a point-in-time recovery that replaces the cluster. `wanted`: with the newest point as the target,
    the services stop before the copy replays, so that it has what is written until then."""

    report: Report
    env: Environment
    instance: PrivateInstance
    copy: ClusterCopy
    found: FoundTarget
    wanted: RecoveryTarget
    source: Stores
    services: ClusterServices
    build: build.PointBuild
    sync: Change[[PrivateInstance], Path]
    swap: swap.ClusterSwap
    start: ClusterStart

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        instance: PrivateInstance,
        copy: ClusterCopy,
        found: FoundTarget,
        wanted: RecoveryTarget,
        source: Stores,
    ) -> ClusterReplacement:
        """Plan the lines, and judge what the server loses."""
        server_state.judge(report, env)
        unlogged.warn_emptied(report, env, stores=source)
        services, sync = read_cluster_services(report, env), swap.SYNC
        promote = partial(swap.promote, env, instance)
        return cls(
            *(report, env, instance, copy, found, wanted, source, services),
            build.PointBuild.plan(report, env, instance, copy, len(found.links), promote, build.UNCHANGED),
            Change(sync_cluster, sync.step, sync.detail, seconds=sync.seconds),
            swap.ClusterSwap.plan(report, env, services, instance, build.UNCHANGED),
            ClusterStart.plan(report, env, services, AFTERWARDS),
        )

    @property
    def is_to_the_end(self) -> bool:
        """Return True if the target is the newest point."""
        return self.wanted.by == "latest"

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        early: list[Line[..., Any]] = [self.swap.stop] if self.is_to_the_end else []
        late: list[Line[..., Any]] = [] if self.is_to_the_end else [self.swap.stop]
        first: tuple[Line[..., Any], ...] = (self.build.files, self.build.building, *early, *self.build.lines)
        return *first, self.sync, self.swap.rehearsal, *late, *self.swap.lines, *self.start.lines

    @property
    def seconds_down(self) -> float:
        """Return how long the system is down, estimated. The copy is built while the services stop."""
        first = self.build.building if self.is_to_the_end else self.swap.stop
        return seconds_from([step for one in self.lines for step in one.planned], first.step)

    def carry_out(self, carry: Carrier) -> None:
        """Build and prove the copy, replace the cluster by it, and start it.

        Raises:
            RunbookFailed, OpsError: the copy is not at the target, or a service does not stop or start.
        """
        report, env, fenced = self.report, self.env, None
        copy, links = self.copy, self.found.links
        settings = server_state.read_live_settings(env)
        building = self.build.begin(carry, copy.origin)
        if self.is_to_the_end:
            fenced = carry(self.swap.stop, self.source)
            copy, links = self._with_newest()
        with self.build.promoted(carry, building, copy, links) as timeline:
            build.compare(report, env, self.instance)
            server_state.judge_copy(report, settings, self.instance.postgres)
            copy = replace(copy, names=read_database_names(self.instance.postgres))
        carry(self.sync, self.instance)
        carry(self.swap.rehearsal)
        fenced = fenced or carry(self.swap.stop, "backups", before_of(copy.stop))
        self.swap.carry_out(carry, copy, timeline, fenced)
        self.start.carry_out(carry)
        swap.report_follow_up(report, env, copy.origin, self.services, timeline)
        content = copy.origin.content
        wal = len(copy.origin.chain.links) * content.segment_bytes
        report.measure("database point in time", content.bytes + wal)
        report.outcome = "the cluster is at the target, proven on both sides"

    def _with_newest(self) -> tuple[ClusterCopy, tuple[Link, ...]]:
        """Return the copy with what was written until the fence, and the segments of WAL that it needs."""
        copy, wal = self.copy, self.instance.root / "wal"
        if (origin := choice.with_newest(copy.origin)) is copy.origin:
            return copy, self.found.links
        found = point_target.find_in_wal(self.env, origin, self.wanted, wal)
        stop = point_target.judge_target(self.report, origin, self.wanted, found)
        return replace(copy, origin=origin, stop=stop, known=found.commits), found.links
