"""The swap of the whole cluster: stop the services, then put the copy into the live directory. (The start after it:
start.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.branch import record_branch
from flows.recovery import gate
from flows.recovery.point import server_state
from flows.recovery.point.choice import PointOrigin
from flows.recovery.stopped_services import APPLICATION, ClusterServices, plan_stop, replication_roles
from runbook.change import Carrier, Change, Check, Line, State
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, PlannedStep
from runbook.kinds import Bound
from runbook.next import Next
from runbook.report import Report
from tasks.cluster.fence import FencedServer
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.recovery import promote_instance
from tasks.cluster.swap import (
    ClusterSwapped,
    replacement,
    set_wal_aside,
    superseded_clusters,
    swap_cluster,
)
from tasks.postgres.replication.synchronous import ALONE, address

SYNC = PlannedStep("sync the copy", "every file is on disk before the swap: it is recovered without fsync", seconds=1)
COMPARE = PlannedStep(
    "compare with the live server",
    "the copy lacks no commit of the stopped server beyond the planned loss",
    seconds=1,
)


def acts(env: Environment) -> list[Act]:
    """The acts that need a permit, of the lines of a restore that replaces the cluster."""
    return [replacement(env.postgres), Act(ALONE, address(env.postgres))]


def stopped_roles(env: Environment) -> list[str]:
    """Return the services that are stopped for a swap, in order."""
    return [*env.services_in(APPLICATION), *replication_roles(env), env.postgres.service]


def _swap_step(env: Environment) -> PlannedStep:
    live = env.postgres.data_directory
    return PlannedStep("swap", f"the copy becomes {live}; the replaced one is kept as {live}.superseded_…", seconds=0.1)


def _receiver_step(env: Environment) -> PlannedStep:
    aside = f"{env.wal.directory} is archived first, then kept under another name"
    return PlannedStep("restart the WAL receiver", aside)


def promote(env: Environment, instance: PrivateInstance) -> int:
    """Promote the copy. It has the WAL receiver's slot before it takes writes, so the receiver misses no WAL."""
    slots = {env.wal.slot: True} if env.has("wal") and env.wal.method == "receivewal" else {}
    return promote_instance(instance, slots)


@dataclass(frozen=True)
class ClusterSwap:
    """The lines that put a proven copy of the cluster into the live directory. `receiver`, `record`: empty without
    WAL."""

    report: Report
    rehearsal: Change[[], None]
    stop: Change[..., FencedServer]
    comparison: Check[..., Loss]
    rename: Change[[Loss, int], int]
    receiver: Sequence[Change[[], None]]
    record: Sequence[Change[[PointOrigin, int], None]]

    @classmethod
    def plan(
        cls, report: Report, env: Environment, services: ClusterServices, instance: PrivateInstance, begun: State
    ) -> ClusterSwap:
        """Plan the lines. `begun`: the state of the system while the services stop."""
        rehearse = server_state.REHEARSE
        fence = partial(gate.fence_cluster, report, env, services)
        return cls(
            report,
            Change(
                lambda: server_state.rehearse(report, env, instance),
                rehearse.step,
                rehearse.detail,
                seconds=rehearse.seconds,
            ),
            plan_stop(services, fence, stopped_roles(env), begun=begun),
            Check(
                partial(gate.pass_cluster, report, env, services),
                COMPARE.step,
                COMPARE.detail,
                seconds=COMPARE.seconds,
            ),
            _plan_rename(report, env, services, instance),
            [_plan_receiver(env, services)] if env.has("wal") else [],
            [_plan_record(report, env, services)] if env.has("wal") else [],
        )

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order, without the rehearsal and the stop."""
        return self.comparison, self.rename, *self.receiver, *self.record

    def carry_out(
        self, carry: Carrier, copy: gate.ClusterCopy, timeline: int, fenced: FencedServer, measured: Loss | None = None
    ) -> None:
        """Pass the gate, rename, and record the new timeline. `measured`: see `pass_cluster`.

        Raises:
            LossExceeded: more than was confirmed. Nothing live was replaced.
        """
        carry(self.rename, carry(self.comparison, copy, fenced, measured), timeline)
        for aside in self.receiver:
            carry(aside)
        for record in self.record:
            carry(record, copy.origin, timeline)


def _plan_rename(
    report: Report, env: Environment, services: ClusterServices, instance: PrivateInstance
) -> Change[[Loss, int], int]:
    primary, step = env.postgres, _swap_step(env)  # the server is down when it is carried out
    action = swap_cluster.bind(primary, instance)

    def rename(loss: Loss, timeline: int) -> int:
        _note_swapped(report, env, services, action())
        report.loses(loss)
        return timeline

    return Change(
        rename,
        step.step,
        step.detail,
        seconds=step.seconds,
        by=[action],
        begun=State(
            f"services are stopped; if {primary.data_directory} is missing, the live data is in ….superseded_… next to "
            "it",
            f"run it again with confirm={env.name}: it restores everything from the start. To go back instead, run "
            "undo-full-restore",
        ),
        done=lambda timeline: State(
            f"the cluster is at the target, on timeline {timeline}, and is live; services are stopped or starting; "
            f"the replaced data is kept: {', '.join(services.kept) or 'there was none'}",
            "do not restore again: that loses what was written since. Start the services in the order postgres, WAL "
            "receiver, backend, frontend, then run backup-cluster",
        ),
        is_final=True,
    )


def _note_swapped(report: Report, env: Environment, services: ClusterServices, done: ClusterSwapped) -> None:
    services.swapped.append("cluster")
    services.last = done
    services.kept += [str(done.kept)] if done.kept else []
    gate.forget_swap(env)
    if done.tablespaces:
        report.warn(
            "tablespaces of the restored cluster",
            f"their former directories belong to {done.kept or 'the lost data'}: delete them together with it",
            value=", ".join(f"OID {oid} in {path}" for oid, path in done.tablespaces.items()),
        )


def _plan_receiver(env: Environment, services: ClusterServices) -> Change[[], None]:
    step = _receiver_step(env)
    action: Bound[[], Path | None] = set_wal_aside.bind(env.postgres, Path(env.wal.directory))

    def set_aside() -> None:
        services.last = aside = action()
        services.kept += [str(aside)] if aside else []

    return Change(set_aside, step.step, step.detail, by=[action])


def _plan_record(report: Report, env: Environment, services: ClusterServices) -> Change[[PointOrigin, int], None]:
    def record(origin: PointOrigin, timeline: int) -> None:
        left = [origin.chain.timeline.number]
        record_branch(report, env, origin.content.system, timeline, left, after=services.last)

    return Change(record, "record the timeline in use", "the copy's new one")


def undo_of(primary: Postgres, kept: Sequence[str]) -> Next | None:
    """The undo of a swap, by the directory that it kept; None where there was no data directory."""
    names = [
        Path(one).name for one in kept if Path(one).name.startswith(f"{Path(primary.data_directory).resolve().name}.")
    ]
    return Next("undo-full-restore", "", {"kept": names[0]}) if names else None


def report_follow_up(
    report: Report,
    env: Environment,
    origin: PointOrigin,
    services: ClusterServices,
    timeline: int,
    *,
    redis_is_newer: bool = True,
) -> None:
    """Report what is left to do after a swap. Until then the run is not OK. `redis_is_newer`: it was not restored."""
    primary = env.postgres
    report.fact("timeline", f"{timeline} (from timeline {origin.chain.timeline.number})")
    report.fact("replaced data kept", ", ".join(services.kept) or "none: there was no live data")
    if not report.undo and (undo := undo_of(primary, services.kept)):
        report.undo_is(undo)
    report.warn(
        "no base backup of the new timeline",
        f"take one now: until then a recovery starts from {origin.backup.name}",
        value=f"timeline {timeline}",
        follow=[Next("backup-cluster", "take a base backup", {"kind": "full"})],
    )
    if env.has("standby"):
        report.warn(
            "standby",
            "rebuild it now: until then there is no server to fail over to",
            value=f"{env.standby.service} is stopped: it has WAL beyond the new timeline's start",
            follow=[Next("rejoin-standby", "rebuild the standby")],
        )
    if redis_is_newer and env.has("redis"):
        report.warn(
            "Redis is newer than the database",
            "restore Redis to the same time, or clear it if it is only a cache: its keys may refer to rows that no "
            "longer exist",
            value="Redis was not changed",
            follow=[Next("restore-redis", "restore Redis"), Next("clear-cache", "clear the cache")],
        )
    old = superseded_clusters(primary)
    if len(old) > 1:
        report.warn("replaced data directories", "delete those that are not needed", value=", ".join(map(str, old)))
