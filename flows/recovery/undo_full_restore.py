"""undo-full-restore (§8.2): the cluster that a recovery replaced as a whole is live again."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from blocks.environment import Environment
from flows.branch import record_branch
from flows.database.restore_steps import judge_requirements
from flows.loss import require_confirmed
from flows.pinned import pin_database
from flows.recovery import gate
from flows.recovery.point import swap
from flows.recovery.point.server_state import judge_slots
from flows.recovery.point.start import ClusterStart
from flows.recovery.stopped_services import ClusterServices, plan_stop, read_cluster_services
from runbook import clock
from runbook.change import Carrier, Change, Check, Line, State, carrying_out
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.cluster.catalog import has_database
from tasks.cluster.fence import FencedServer
from tasks.cluster.kept import (
    KeptCluster,
    UndoMarker,
    find_kept_clusters,
    find_kept_wal,
    is_followed,
    named,
    put_wal_back,
)
from tasks.cluster.stopped import read_stopped
from tasks.cluster.swap import set_wal_aside, swap_cluster
from tasks.failover.member import MemberControl, read_control
from tasks.host.disk import is_here
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.server.server import presence
from tasks.wal.branch import number_in_use, read_history, timeline_of
from tasks.wal.discarded import read_discarded
from tasks.wal.format.names import Timeline

NEWEST = "newest"
FLOW = "undo-full-restore"


@dataclass(frozen=True)
class KeptState:
    """What is put back. `path`: the kept data directory, or the live one where a killed run has put it back already;
    `wal`: the receiver's kept directory (None: it begins with an empty one); `left`: the timeline that is in use;
    `begun`: by a killed run. `lacks`: the application's database, which it does not have."""

    path: Path
    control: MemberControl
    history: Timeline
    wal: Path | None
    left: int
    begun: bool
    lacks: str = ""

    @property
    def lost_databases(self) -> tuple[Loss, ...]:
        """The loss of a database that the kept cluster lacks."""
        return (Loss.not_known(self.lacks, "the kept cluster does not have it"),) if self.lacks else ()


@flow(name="undo-full-restore", flow_run_name=RunName("undo-full-restore {environment} {kept}"))
def undo_full_restore(environment: str, kept: str = NEWEST, plan: str = "", confirm: str = "") -> Report:
    """完全リストアの取り消し (§8.2)

    Makes the PostgreSQL cluster that full-restore or restore-to-point (mode=swap) replaced live again: its data
    directory and the WAL receiver's. The replaced directories are kept in turn, so the undo can be undone. Run it when
    such a recovery was a mistake. Where a recovery replaced one database only, undo-restore undoes it, and this run
    links it.

    The writes since that recovery are not in the old cluster: the plan counts them, and the run counts them again when
    every service is stopped. If more were written than since the plan, it ends there and starts the services again.
    The run records that the old timeline is in use again: no later recovery follows the one that it leaves.

    Services stop for seconds. The standby stays stopped: rejoin-standby attaches it again. Redis and the application's
    files have their own undo: undo-restore-redis, undo-restore-files. If it is killed, run it again. Evidence: both
    directories, the timelines, the lost commits.

    Args:
        environment: Environment (lab, staging, production …)
        kept: newest, or the name of a replaced data directory (….superseded_YYYYMMDD_HHMMSS)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook(
        "Undo full restore", env, confirm, plan, changes=True, without_confirm="stages", rank="recovery"
    ) as report:
        state = presence(env.postgres)
        found = _find(report, env, kept, up=state == "up")
        planned = _loss(env, found, clock.now() if state == "up" else None)
        services = read_cluster_services(report, env)
        if found.begun:  # nothing may be started before it is complete
            services.swapped.append("cluster")
        _judge(report, env, found)
        undo = ClusterUndo.plan(report, env, services, found, planned)

        def pin(report: Report) -> None:
            pin_database(report, env.postgres, replaced=True, up=state == "up")

        what = f"PostgreSQL is again the cluster of timeline {found.history.number} ({found.path.name})"
        effect = Effect(what, Next(FLOW), (planned, *found.lost_databases), undo.seconds_down)
        with carrying_out(report, *undo.lines, effect=effect, pins=[pin]) as carry:
            undo.carry_out(carry)
        _report_follow_up(report, env, services, found)
    return report


def _find(report: Report, env: Environment, wanted: str, *, up: bool) -> KeptState:
    """What is put back: what a killed run has begun, or the named or newest kept directory.

    Raises:
        OpsError: nothing is kept, or it cannot be read.
        RunbookFailed: another runbook is the undo, or the kept cluster would not start.
    """
    begun = UndoMarker.find(env.reports_directory)
    if begun:
        report.fact("continues", f"the undo that began {begun.started} ({begun.run}): {Path(begun.kept).name}")
        path = Path(begun.kept) if Path(begun.kept).exists() else Path(env.postgres.data_directory)
    else:
        path = _choose(report, env, wanted, up=up)
    report.pin("kept", Path(begun.kept).name if begun else path.name)
    there = env.postgres.model_copy(update={"data_directory": str(path)})
    control = read_control(there)
    if control is None:
        raise OpsError(
            f"the control file of {path} cannot be read", "let this user read it, or name another one (kept=…)"
        )
    if path != Path(env.postgres.data_directory):
        judge_requirements(report, read_stopped(there).requirements)
    number = timeline_of(path, control.system) or control.timeline
    left = begun.left if begun else number_in_use(env, "backups", control.system)
    history = read_history(env, "backups", control.system, number)
    wal = None
    if begun:
        wal = Path(begun.wal) if begun.wal else None
    elif env.has("wal"):
        wal = find_kept_wal(Path(env.wal.directory), control.system, history, control.checkpoint)
    report.fact("puts back", f"{path}, timeline {number}")
    report.fact("replaces", f"timeline {left}, which is in use")
    report.require(
        "timeline to put back",
        begun is not None or left != number or not (Path(env.postgres.data_directory) / "PG_VERSION").exists(),
        "name an older directory (kept=…): discard-superseded lists them",
        value=f"{number}",
        expected=f"another one than {left}, which is in use",
    )
    report.fail_if_critical()
    return KeptState(path, control, history, wal, left, begun is not None, _lacking(env, path))


def _lacking(env: Environment, path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, struct.error):  # then the start shows it
        return "" if has_database(path, env.postgres.database) else env.postgres.database
    return ""


def _choose(report: Report, env: Environment, wanted: str, *, up: bool) -> Path:
    if not is_here(env.postgres.host):
        raise OpsError(f"the data directories are on {env.postgres.host}", "run this on a worker of that host")
    found = find_kept_clusters(env.postgres)
    databases = find_superseded(env.postgres) if up else ()
    path = found[0] if found and wanted == NEWEST else named(found, wanted)
    if databases and (path is None or (wanted == NEWEST and databases[0].name[-15:] > path.name[-15:])):
        report.fail(
            "the last restore replaced one database",
            "undo that one",
            value=f"{databases[0].name} is the newest replaced data",
            follow=[Next("undo-restore", "make it live again", {"kept": databases[0].name})],
        )
        report.fail_if_critical()
    if path is None:
        names = ", ".join(one.name for one in found[:5])
        missing = f"no replaced data directory “{wanted[:80]}”" if wanted != NEWEST else "no replaced data directory"
        raise OpsError(
            f"there is {missing} next to {env.postgres.data_directory}",
            f"choose one of these, newest first: {names}" if names else "nothing is kept, so there is no undo",
        )
    return path


def _loss(env: Environment, found: KeptState, as_of: datetime | None, *, planned: Loss | None = None) -> Loss:
    """The commits since the recovery that is undone. `planned`: what the plan counted."""
    try:
        commits = read_discarded(env, found.control.system, found.left, found.history.number, found.control.checkpoint)
    except OpsError as error:
        return Loss.not_known("PostgreSQL", f"the WAL of timeline {found.left} cannot be read: {error.message}")
    times = sorted(commit.at for commit in commits)
    later = sum(1 for at in times if planned and planned.as_of and at > planned.as_of)
    first, last = (times[0], times[-1]) if times else (None, None)
    return Loss("PostgreSQL", len(commits), first=first, last=last, as_of=as_of, later=later)


def _judge(report: Report, env: Environment, found: KeptState) -> None:
    judge_slots(report, env, [slot.name for slot in (found.path / "pg_replslot").glob("*")])
    if found.lacks:
        hint = "the recovery that this undoes brought it back: full-restore does so again"
        report.warn("database in the kept cluster", hint, value=f"{found.lacks} is missing in it", expected=found.lacks)


@dataclass(frozen=True)
class ClusterUndo:
    """The lines of the undo. `rename`: empty where a killed run has put the data directory back; `receiver`, `record`:
    empty without WAL."""

    report: Report
    env: Environment
    stop: Change[..., FencedServer]
    counting: Check[[FencedServer], None]
    rename: Sequence[Change[[], None]]
    receiver: Sequence[Change[[], None]]
    record: Sequence[Change[[], None]]
    start: ClusterStart

    @classmethod
    def plan(
        cls, report: Report, env: Environment, services: ClusterServices, found: KeptState, planned: Loss
    ) -> ClusterUndo:
        """Plan the lines. `planned`: the loss that a person confirms."""
        begun = State(
            "services are stopped; the replaced cluster may not be back completely",
            f"run undo-full-restore again with confirm={env.name}: it continues",
        )
        fence = partial(gate.fence_cluster, report, env, services)
        unchanged = State("the live cluster is unchanged", "fix the findings above, then run this again")
        is_renamed = found.path == Path(env.postgres.data_directory)
        return cls(
            *(report, env),
            plan_stop(services, fence, swap.stopped_roles(env), begun=unchanged),
            _plan_counting(report, env, found, planned),
            [] if is_renamed else [_plan_rename(env, services, found, begun)],
            [_plan_receiver(env, services, found, begun)] if env.has("wal") else [],
            [_plan_record(report, env, services, found)] if env.has("wal") else [],
            ClusterStart.plan(report, env, services, "and its WAL receiver", has_statistics=True),
        )

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        return self.stop, self.counting, *self.rename, *self.receiver, *self.record, *self.start.lines

    @property
    def seconds_down(self) -> float:
        """Return how long the system is down, estimated."""
        return sum(step.seconds for one in self.lines for step in one.planned)

    def carry_out(self, carry: Carrier) -> None:
        """Put the kept cluster back, and start it.

        Raises:
            LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
            OpsError: a service does not stop or start, or a rename fails.
        """
        carry(self.counting, carry(self.stop, "backups"))
        for line in (*self.rename, *self.receiver, *self.record):
            carry(line)
        self.start.carry_out(carry)
        UndoMarker.remove(self.env.reports_directory)
        gate.forget_swap(self.env)


def _plan_counting(report: Report, env: Environment, found: KeptState, planned: Loss) -> Check[[FencedServer], None]:
    def count(fenced: FencedServer) -> None:
        loss = _loss(env, found, None, planned=planned)
        require_confirmed(report, loss)
        gate.require_fence(env, fenced)
        report.loses(loss, *found.lost_databases)

    detail = "the kept cluster lacks no commit of the stopped server beyond the planned loss"
    return Check(count, "compare with the live server", detail)


def _plan_rename(env: Environment, services: ClusterServices, found: KeptState, begun: State) -> Change[[], None]:
    live = env.postgres.data_directory
    action = swap_cluster.bind(env.postgres, KeptCluster(found.path, env.postgres))

    def rename() -> None:
        if not found.begun:
            UndoMarker(kept=str(found.path), wal=str(found.wal or ""), left=found.left).write(env.reports_directory)
        failpoint("undo: begun")
        services.last = done = action()
        services.kept += [str(done.kept)] if done.kept else []
        services.swapped.append("cluster")

    return Change(
        rename,
        "swap",
        f"{found.path} becomes {live}; the replaced one is kept as {live}.superseded_…",
        seconds=1,
        by=[action],
        begun=begun,
        done=None if env.has("wal") else lambda _: _live_again(env, services, found),
        is_final=True,
    )


def _plan_receiver(env: Environment, services: ClusterServices, found: KeptState, begun: State) -> Change[[], None]:
    """The receiver follows the branch by name: it cannot go on from WAL of another one, and commits wait for it."""
    directory, source = Path(env.wal.directory), str(found.wal) if found.wal else "an empty directory"
    aside, back = set_wal_aside.bind(env.postgres, directory), put_wal_back.bind(env.postgres)

    def put_back() -> None:
        kept = found.wal if found.wal and found.wal.exists() else None
        if kept or not is_followed(directory, found.history):
            services.last = former = aside()
            services.kept += [str(former)] if former else []
        if kept:
            services.last = back(kept, directory)

    detail = f"{source} becomes {env.wal.directory}; the replaced one is kept"
    return Change(put_back, "the receiver's directory", detail, by=[aside, back], begun=begun)


def _plan_record(report: Report, env: Environment, services: ClusterServices, found: KeptState) -> Change[[], None]:
    def record() -> None:
        record_branch(report, env, found.control.system, found.history.number, [found.left], after=services.last)
        failpoint("undo: recorded")

    return Change(
        record,
        "record the timeline in use",
        f"timeline {found.history.number}",
        done=lambda _: _live_again(env, services, found),
    )


def _live_again(env: Environment, services: ClusterServices, found: KeptState) -> State:
    return State(
        f"the cluster of timeline {found.history.number} is live again; services are stopped or starting; the replaced "
        f"data is kept: {', '.join(services.kept) or 'there was none'}",
        f"run undo-full-restore again with confirm={env.name}: it continues",
    )


def _report_follow_up(report: Report, env: Environment, services: ClusterServices, found: KeptState) -> None:
    report.fact("timeline", f"{found.history.number} (from timeline {found.left})")
    report.fact("replaced data kept", ", ".join(services.kept) or "none: there was no live data")
    if undo := swap.undo_of(env.postgres, services.kept):
        report.undo_is(undo)
    if env.has("standby"):
        report.warn(
            "standby",
            "rejoin it now: until then there is no server to fail over to",
            value=f"{env.standby.service} is stopped: it may have WAL of timeline {found.left}",
            follow=[Next("rejoin-standby", "rejoin the standby")],
        )
    report.outcome = f"the cluster of timeline {found.history.number} is live again"
