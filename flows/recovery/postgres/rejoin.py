"""Rejoin of a server as the standby of the primary (§8.3)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from flows.loss import loss_of, require_confirmed
from flows.recovery.postgres.promotion import AGAIN, judge_receiver
from runbook.errors import CommandFailed, OpsError, Unreachable
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, CarriesOut, Permit
from runbook.kinds import permitted_by
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import first_of, size
from tasks.cluster.tablespaces import map_occupied
from tasks.failover.fencing import FENCE, SIGNAL, allow_start, mark_standby, remove_signal
from tasks.failover.member import ClusterMember, MemberControl, read_control, read_member
from tasks.failover.promotion import (
    ATTACH_SECONDS,
    commits_return,
    make_slots,
    start_receiver,
    streams,
    wait_for_stream,
)
from tasks.failover.rejoin import (
    REJOIN,
    Rejoined,
    configure,
    copy_anew,
    parted_from,
    read_diverged,
    rewind,
    save_diverged,
    was_interrupted,
)
from tasks.failover.segments import Beyond, read_commits
from tasks.host.disk import disk_of, is_here
from tasks.host.services import StoppedServicesList, start_services, stop_services
from tasks.postgres.replication.synchronous import ALONE, address, commit_alone, commit_together
from tasks.postgres.tables.filenodes import read_database_names
from tasks.wal.format.names import lsn_text

Method = Literal["auto", "rewind", "base_backup"]
STREAM_SECONDS = 60.0
START_SECONDS = 45.0
"""A standby that cannot follow fails within seconds. A busy host is no reason for a base backup."""


@dataclass(frozen=True)
class Joining:
    """The server that is to follow `primary`. `parted_at`: where its history left the primary's; 0 where the primary
    is still on its timeline. `diverged`: what its own WAL has after that; None where it cannot be read (`problem`)."""

    primary: Postgres
    node: Postgres
    state: ClusterMember
    control: MemberControl | None
    parted_at: int = 0
    diverged: Beyond | None = None
    problem: OpsError | None = None

    @property
    def method(self) -> str:
        """The method to try first."""
        if self.control is None or was_interrupted(self.node):
            return "base_backup"
        standby = "in recovery" in self.control.state or "archive recovery" in self.control.state
        # After a point-in-time restore, or where an old primary was started as a standby meanwhile.
        diverged = self.diverged is not None and self.diverged.bytes > 0
        ahead = self.parted_at and (self.control.reached > self.parted_at or diverged)
        return "start" if standby and not ahead else "rewind"


def read_joining(primary: Postgres, node: Postgres) -> Joining:
    """Read the state of the server.

    Raises:
        Unreachable: the primary is down.
    """
    control = read_control(node)
    joining = Joining(primary, node, read_member(node), control)
    if control is None:
        return joining
    try:
        parted = parted_from(primary, node, control)
        joining = replace(joining, parted_at=parted)
        return replace(joining, diverged=read_diverged(node, control.timeline, parted)) if parted else joining
    except Unreachable:
        raise
    except OpsError as error:
        return replace(joining, problem=error)


def diverged_loss(joining: Joining) -> Loss:
    """The commits that only the joining server has. They are saved as WAL first."""
    node, control, problem = joining.node, joining.control, joining.problem
    if control is None or problem:
        why = problem.message if problem else f"{node.data_directory} is missing or cannot be read"
        why = "a rewind of it was killed" if was_interrupted(node) else why
        return Loss.not_known(address(node), why)
    if not (joining.diverged and joining.diverged.commits):
        return Loss(address(node))
    pg_wal = Path(node.data_directory, "pg_wal")
    lost, _ = read_commits(node, pg_wal, control.timeline, joining.parted_at)
    return loss_of(address(node), lost, read_database_names(joining.primary))


def is_joined(joining: Joining) -> bool:
    """Whether it already streams from the primary."""
    return joining.state.follows and streams(joining.primary, joining.node.name)


def judge_joining(report: Report, env: Environment, joining: Joining, method: Method) -> None:
    """Judge whether it can rejoin.

    Raises:
        RunbookFailed: it cannot; nothing was touched.
    """
    node, state = joining.node, joining.state
    main = read_member(joining.primary)
    report.require(
        f"the primary {main.address}",
        main.is_primary,
        "run postgres-failover first: no server takes writes",
        value=main.problem or ("takes writes" if main.is_primary else "it is in recovery"),
    )
    report.require(
        f"{state.address} takes no writes",
        not state.is_primary,
        f"stop its service {node.service} now: two servers take writes, and its writes are lost",
        value=state.problem or ("in recovery" if state.in_recovery else "it takes writes"),
    )
    report.require("its files on this host", is_here(node.host), join_there(env, node), value=node.host)
    report.prefer(
        "its application_name and slot",
        bool(node.name and node.slot),
        "set name and slot in its table of the environment's TOML",
        value=f"{node.name or 'no name'}, {node.slot or 'no slot'}",
    )
    _judge_files(report, joining, method, main.system)
    report.fail_if_critical()
    _judge_space(report, joining, method)
    if method == "base_backup" or joining.method == "base_backup":
        _judge_tablespaces(report, joining)
    _report_diverged(report, joining)
    report.fail_if_critical()


def _judge_files(report: Report, joining: Joining, method: Method, system: int) -> None:
    """Judge whether the method fits its data directory. `system`: the primary's system identifier."""
    node, control = joining.node, joining.control
    other = control and control.system != system and joining.method != "base_backup" and method != "base_backup"
    report.require(
        "system identifier",
        not other,
        "run it with method=base_backup, which keeps the old files: this server belongs to another cluster",
        value=control.system if control else "no files",
        expected=system,
    )
    if method == "rewind":
        report.require(
            "rewind possible",
            joining.method != "base_backup",
            "run it with method=base_backup",
            value="its files are missing, or a rewind was killed"
            if joining.method == "base_backup"
            else control.state
            if control
            else "",
        )
    mounted = os.path.ismount(node.data_directory)
    report.require(
        "data directory can be renamed",
        not mounted,
        "mount that file system on the parent directory, and set data_directory to a directory in it",
        value=f"{node.data_directory} is a mount point" if mounted else node.data_directory,
    )


def join_there(env: Environment, node: Postgres) -> str:
    """The command that rejoins a server whose files are on another host."""
    return f"on {node.host}, in the checkout of its worker: {Next('rejoin-standby').command(env.name)}"


def _judge_tablespaces(report: Report, joining: Joining) -> None:
    """Name the new directories: PostgreSQL wants the primary's paths on each server."""
    if occupied := map_occupied(joining.primary, Path(joining.node.data_directory)):
        report.warn(
            "tablespaces of the standby",
            "nothing to do: a base backup puts them into new directories next to the standby's data directory",
            value=f"in use on this host: {first_of([*occupied])}",
        )


def _judge_space(report: Report, joining: Joining, method: Method) -> None:
    with joining.primary.connect() as connection:
        needed = int(execute(connection, "SELECT sum(pg_database_size(oid))::bigint FROM pg_database")[0][0])
    free = disk_of(Path(joining.node.data_directory)).free_bytes
    must = method == "base_backup" or joining.method == "base_backup"
    if method != "rewind":
        report.require(
            "free disk space for a base backup",
            free > needed * 1.1,
            "free disk space there; a rewind needs none",
            value=size(free),
            expected=f"> {size(int(needed * 1.1))}",
            worst=Status.CRITICAL if must else Status.WARN,
        )


def _report_diverged(report: Report, joining: Joining) -> None:
    if joining.problem:
        report.warn("its WAL beyond the start of the new timeline", joining.problem.hint, value=joining.problem.message)
    if beyond := joining.diverged:
        only_there = f"{beyond.commits:,} transactions, {beyond.bytes:,} bytes after {lsn_text(joining.parted_at)}"
        report.fact("only in its own WAL", only_there if beyond.bytes else "nothing")


def rejoin_acts(joining: Joining) -> list[Act]:
    """The acts that need a permit."""
    node = address(joining.node)
    return [Act(FENCE, node), Act(REJOIN, node), Act(ALONE, address(joining.primary))]


def plan_joining(report: Report, joining: Joining, method: Method) -> None:
    """Plan every step."""
    node = joining.node
    report.plan("stop", f"{node.service}, if it runs", by=[mark_standby, stop_services])
    save = f"its WAL beyond the start of the new timeline, next to {node.data_directory}"
    report.plan("save", save, by=[save_diverged])
    first = joining.method if method == "auto" else method
    plans: dict[str, tuple[str, CarriesOut]] = {
        "start": ("set the primary in its configuration: it is already a standby", configure),
        "rewind": ("pg_rewind", rewind),
        "base_backup": ("pg_basebackup into a new directory; the old files are kept", copy_anew),
    }
    how, by = plans[first]
    if method == "auto" and first != "base_backup":
        how = f"{how}; if that fails, a base backup"
    report.plan("join", how, by=[by])
    report.plan("start", f"{node.service}, until it streams from {address(joining.primary)}", by=[start_services])


def join(report: Report, permit: Permit, env: Environment, joining: Joining, method: Method) -> None:
    """Rejoin it until it streams, and commits wait again as configured.

    Raises:
        OpsError: it does not stream.
    """
    node, primary = joining.node, joining.primary
    state = f"{address(primary)} takes writes; {address(node)} is stopped and is no standby yet"
    report.state_is(state, AGAIN)
    was_marked = Path(node.data_directory, SIGNAL).exists()
    signal = mark_standby(permit, node)  # first: its host may reboot at any time
    stopped = stop_services.after(signal)(env.services, [node.service])
    joining = _pass(report, env, joining, stopped, was_marked=was_marked)
    made = make_slots.after(stopped)(primary, [node.slot])
    _save(report, permit, joining)
    done = _try_first(report, permit, joining, joining.method if method == "auto" else method, method)
    if done is None:
        done = copy_anew.after(made)(permit, primary, node)
    if left := allow_start.after(done)(env.services, node.service):
        report.warn(f"{node.service} at boot", left, value="its service manager does not start it at boot")
    if not _starts(env, joining, done, last=method != "auto" or done.method == "base_backup"):
        done = _copy_after_failure(report, permit, env, joining, method)
    report.fact(
        "joined by", f"{done.method}, {done.seconds:.1f} s" + (f"; old files: {done.kept}" if done.kept else "")
    )
    report.passed("standby", value=f"{address(node)} streams from {address(primary)}")
    wait_for_all(report, permit, env, primary)


def _pass(
    report: Report, env: Environment, joining: Joining, stopped: StoppedServicesList, *, was_marked: bool
) -> Joining:
    """The gate: the server is stopped, and is read again, for it may have run since the plan. Returns what was read.

    Raises:
        LossExceeded: it has more commits than were confirmed. Nothing was replaced, and its service is as before.
    """
    node = joining.node
    try:
        found = read_joining(joining.primary, node)
        loss = diverged_loss(found)
        require_confirmed(report, loss)
    except OpsError:
        if stopped.were_running and was_marked:
            start_services(env.services, [node.service])
        elif not stopped.were_running and not was_marked:
            remove_signal(node)  # one that ran as a second primary stays stopped
        kept = f"{address(joining.primary)} takes writes; nothing of {address(node)} was replaced"
        report.state_is(kept, "check the commits that only it has, then run this again for a new plan")
        raise
    report.loses(loss)
    return found


def _starts(env: Environment, joining: Joining, done: Rejoined, *, last: bool) -> bool:
    """Whether it starts and streams. With `last` there is no other method, and an error is raised."""
    try:
        start_services.after(done)(env.services, [joining.node.service])
    except OpsError:
        if last:
            raise
        return False
    return wait_for_stream(joining.primary, joining.node.name, STREAM_SECONDS if last else START_SECONDS)


def _try_first(report: Report, permit: Permit, joining: Joining, first: str, method: Method) -> Rejoined | None:
    """Rejoin by the method `first`; None where it needs a base backup."""
    if first == "start":
        return configure(permit, joining.primary, joining.node)
    if first == "base_backup":
        return None
    try:
        return rewind(permit, joining.primary, joining.node)
    except CommandFailed as error:
        if method == "rewind":
            raise
        report.warn("pg_rewind", "nothing to do: the run took a base backup instead", value=error.message)
        return None


def _copy_after_failure(report: Report, permit: Permit, env: Environment, joining: Joining, method: Method) -> Rejoined:
    """It does not stream: with `auto` take a base backup, otherwise fail."""
    node, failure = joining.node, f"{address(joining.node)} does not stream from {address(joining.primary)}"
    if method != "auto" or joining.method == "base_backup":
        raise OpsError(failure, f"check the log of {node.service}, then run it again with method=base_backup")
    report.warn("first method", "nothing to do: the run took a base backup instead", value=failure)
    stopped = stop_services(env.services, [node.service])
    done = copy_anew.after(stopped)(permit, joining.primary, node)
    start_services.after(done)(env.services, [node.service])
    if not wait_for_stream(joining.primary, node.name, STREAM_SECONDS):
        raise OpsError(failure, f"check the log of {node.service}, then run it again")
    return done


def _save(report: Report, permit: Permit, joining: Joining) -> None:
    if not (joining.control and joining.parted_at):
        return
    try:
        saved = save_diverged(permit, joining.node, joining.control.timeline, joining.parted_at)
    except OpsError as error:
        report.warn("diverged WAL", error.hint, value=f"not saved: {error.message}")
        return
    if saved.kept:
        report.fact("diverged WAL", f"{saved.files} files with {saved.beyond.commits:,} transactions in {saved.kept}")


def wait_for_all(report: Report, permit: Permit, env: Environment, primary: Postgres) -> None:
    """Start the WAL receiver and the archiver, and let commits wait again for the connected standbys of the
    configuration."""
    if env.has("wal") and env.wal.service in env.services.names and not streams(primary, env.wal.name):
        make_slots(primary, [env.wal.slot])
        start_receiver(env.services, env.wal.service)
        judge_receiver(report, primary, env.wal)
    if env.has("wal") and env.wal.archiver in env.services.names:  # after a full restore it is stopped
        start_services(env.services, [env.wal.archiver])
    with primary.connect() as connection:
        overridden = bool(execute(connection, _OVERRIDDEN))
    if overridden:
        commit_together(primary)
    if not commits_return(primary, ATTACH_SECONDS):
        with permitted_by(permit):
            found = commit_alone.bind(primary)()
        report.warn(
            "commits wait for no standby",
            "connect the missing standbys of synchronous_standby_names, then run this again",
            value=found.names or "overridden",
            follow=[Next("check-replication", "see which standby is missing")],
        )


_OVERRIDDEN = """
SELECT 1 FROM pg_settings
WHERE name = 'synchronous_standby_names' AND setting = '' AND sourcefile LIKE '%postgresql.auto.conf'
"""
