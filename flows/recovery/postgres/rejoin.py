"""A server joined again as the standby of the primary (§8.3), called with an open report."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from flows.recovery.postgres.steps import AGAIN, tell_receiver
from runbook.errors import CommandFailed, OpsError
from runbook.guard.permit import Act, Permit
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import size
from tasks.failover.fencing import FENCE, allow_start, mark_standby
from tasks.failover.member import Control, Member, read_control, read_member
from tasks.failover.promotion import (
    ATTACH_SECONDS,
    commits_return,
    make_slots,
    start_receiver,
    streams,
    switched_at,
    wait_for_stream,
)
from tasks.failover.rejoin import (
    REJOIN,
    Rejoined,
    configure,
    copy_anew,
    read_diverged,
    rewind,
    save_diverged,
    was_interrupted,
)
from tasks.failover.segments import Beyond
from tasks.host.disk import disk_of, is_here
from tasks.host.services import start_services, stop_services
from tasks.postgres.replication.synchronous import ALONE, address, commit_alone, commit_together
from tasks.wal.format.names import lsn_text

Method = Literal["auto", "rewind", "base_backup"]
STREAM_SECONDS = 60.0
START_SECONDS = 45.0
"""A standby that cannot follow says so within seconds; that the host is busy is no reason to copy all of it."""


@dataclass(frozen=True)
class Joining:
    """The server that is to follow `primary`. `parted_at`: where its timeline ended, 0 where the primary is on the
    same one still. `diverged`: what its own WAL has after that; None where that cannot be read; `problem` says why."""

    primary: Postgres
    node: Postgres
    says: Member
    control: Control | None
    parted_at: int
    diverged: Beyond | None = None
    problem: OpsError | None = None

    @property
    def way(self) -> str:
        """What is tried first."""
        if self.control is None or was_interrupted(self.node):
            return "base_backup"
        standby = "in recovery" in self.control.state or "archive recovery" in self.control.state
        # After a restore to a point in time; or an old primary that was started as a standby meanwhile.
        diverged = self.diverged is not None and self.diverged.bytes > 0
        ahead = self.parted_at and (self.control.reached > self.parted_at or diverged)
        return "start" if standby and not ahead else "rewind"


def read_joining(primary: Postgres, node: Postgres) -> Joining:
    """How it stands.

    Raises:
        Unreachable: the primary is down.
    """
    control = read_control(node)
    parted = switched_at(primary, control.timeline) if control else 0
    joining = Joining(primary, node, read_member(node), control, parted)
    if not (control and parted):
        return joining
    try:
        return replace(joining, diverged=read_diverged(node, control.timeline, parted))
    except OpsError as error:
        return replace(joining, problem=error)


def is_joined(joining: Joining) -> bool:
    """Whether it streams from the primary already."""
    return joining.says.follows and streams(joining.primary, joining.node.name)


def judge_joining(report: Report, env: Environment, joining: Joining, method: Method) -> None:
    """What speaks against it.

    Raises:
        RunbookFailed: something does; nothing was touched.
    """
    node, says, control = joining.node, joining.says, joining.control
    main = read_member(joining.primary)
    report.require(
        f"the primary {main.address}",
        main.is_primary,
        "launch postgres-failover first: nobody takes writes",
        value=main.problem or ("takes writes" if main.is_primary else "it is in recovery"),
    )
    report.require(
        f"{says.address} takes no writes",
        not says.is_primary,
        f"stop its service {node.service} now: two servers take writes, and what it takes is lost",
        value=says.problem or ("in recovery" if says.in_recovery else "it takes writes"),
    )
    report.require("its files are on this host", is_here(node.host), join_there(env, node), value=node.host)
    report.prefer(
        "its application_name and slot are named",
        bool(node.name and node.slot),
        "add name and slot to its table in the environment's TOML",
        value=f"{node.name or 'no name'}, {node.slot or 'no slot'}",
    )
    other = control and control.system != main.system and joining.way != "base_backup" and method != "base_backup"
    report.require(
        "system identifier",
        not other,
        "it is of another cluster: method=base_backup replaces it, and keeps its files aside",
        value=control.system if control else "no files",
        expected=main.system,
    )
    if method == "rewind":
        report.require(
            "a rewind is possible",
            joining.way != "base_backup",
            "method=base_backup",
            value="its files are gone, or a rewind of them was killed"
            if joining.way == "base_backup"
            else control.state
            if control
            else "",
        )
    mounted = os.path.ismount(node.data_directory)
    report.require(
        "its data directory can be renamed",
        not mounted,
        "mount that file system on the parent directory, "
        "and have data_directory name a directory in it: a mount point cannot be renamed",
        value=f"{node.data_directory} is a mount point" if mounted else node.data_directory,
    )
    report.fail_if_critical()
    _judge_room(report, joining, method)
    _tell_diverged(report, joining)
    report.fail_if_critical()


def join_there(env: Environment, node: Postgres) -> str:
    """How a server is joined whose files are on another host than this one."""
    return f"on {node.host}, in the checkout of its worker: {Next('rejoin-standby').command(env.name)}"


def _judge_room(report: Report, joining: Joining, method: Method) -> None:
    with joining.primary.connect() as connection:
        needed = int(execute(connection, "SELECT sum(pg_database_size(oid))::bigint FROM pg_database")[0][0])
    free = disk_of(Path(joining.node.data_directory)).free_bytes
    must = method == "base_backup" or joining.way == "base_backup"
    if method != "rewind":
        report.require(
            "room for a base backup",
            free > needed * 1.1,
            "free space there; a rewind needs none",
            value=f"{size(free)} free",
            expected=f"more than {size(int(needed * 1.1))}",
            worst=Status.CRITICAL if must else Status.WARN,
        )


def _tell_diverged(report: Report, joining: Joining) -> None:
    if joining.problem:
        report.warn("its WAL beyond the new timeline's beginning", joining.problem.hint, value=joining.problem.message)
    if beyond := joining.diverged:
        told = f"{beyond.commits:,} transactions, {beyond.bytes:,} bytes after {lsn_text(joining.parted_at)}"
        report.fact("only in its own WAL", told if beyond.bytes else "nothing")


def rejoin_acts(joining: Joining) -> list[Act]:
    """What a permit is needed for."""
    node = address(joining.node)
    return [Act(FENCE, node), Act(REJOIN, node), Act(ALONE, address(joining.primary))]


def plan_joining(report: Report, joining: Joining, method: Method) -> None:
    """Every step."""
    node = joining.node
    report.plan("stop", f"{node.service}, where it runs")
    report.plan("save", f"its WAL beyond the new timeline's beginning, beside {node.data_directory}")
    way = joining.way if method == "auto" else method
    told = {
        "start": "it is a standby already: it is told whom to follow",
        "rewind": "pg_rewind",
        "base_backup": "pg_basebackup beside; its old files are kept aside",
    }[way]
    more = ", and a base backup where that fails" if method == "auto" and way != "base_backup" else ""
    report.plan("join", f"{told}{more}")
    report.plan("start", f"{node.service}, until it streams from {address(joining.primary)}")


def join(report: Report, permit: Permit, env: Environment, joining: Joining, method: Method) -> None:
    """Until it streams, and commits wait for whom they should again.

    Raises:
        OpsError: it does not stream; what to do.
    """
    node, primary = joining.node, joining.primary
    state = f"{address(primary)} takes writes; {address(node)} is stopped and is no standby yet"
    report.state_is(state, AGAIN)
    signal = mark_standby(permit, node)  # first: its host may reboot at any time from now on
    stopped = stop_services.after(signal)(env.services, [node.service])
    made = make_slots.after(stopped)(primary, [node.slot])
    _save(report, permit, joining)
    way = joining.way if method == "auto" else method
    done = _first_way(report, permit, joining, way, method)
    if done is None:
        done = copy_anew.after(made)(permit, primary, node)
    if left := allow_start.after(done)(env.services, node.service):
        report.warn(f"{node.service} at boot", left, value="its manager does not start it with its host")
    if not _starts(env, joining, done, last=method != "auto" or done.way == "base_backup"):
        done = _copy_after_all(report, permit, env, joining, method)
    report.fact("joined by", f"{done.way}, {done.seconds:.1f} s" + (f"; old files: {done.kept}" if done.kept else ""))
    report.passed("standby", value=f"{address(node)} streams from {address(primary)}")
    wait_for_all(report, permit, env, primary)


def _starts(env: Environment, joining: Joining, done: Rejoined, *, last: bool) -> bool:
    """Whether it starts and streams; where there is no other way, it is said why it does not start."""
    try:
        start_services.after(done)(env.services, [joining.node.service])
    except OpsError:
        if last:
            raise
        return False
    return wait_for_stream(joining.primary, joining.node.name, STREAM_SECONDS if last else START_SECONDS)


def _first_way(report: Report, permit: Permit, joining: Joining, way: str, method: Method) -> Rejoined | None:
    """By `way`; None where it takes a base backup."""
    if way == "start":
        return configure(permit, joining.primary, joining.node)
    if way == "base_backup":
        return None
    try:
        return rewind(permit, joining.primary, joining.node)
    except CommandFailed as error:
        if method == "rewind":
            raise
        report.warn("pg_rewind", "nothing to do: a base backup was taken instead", value=error.message)
        return None


def _copy_after_all(report: Report, permit: Permit, env: Environment, joining: Joining, method: Method) -> Rejoined:
    """It started and does not stream: in `auto` a base backup, else the end."""
    node, told = joining.node, f"{address(joining.node)} does not stream from {address(joining.primary)}"
    if method != "auto" or joining.way == "base_backup":
        raise OpsError(told, f"look at the log of {node.service}, then launch it again with method=base_backup")
    report.warn("first way", "nothing to do: a base backup was taken instead", value=told)
    stopped = stop_services(env.services, [node.service])
    done = copy_anew.after(stopped)(permit, joining.primary, node)
    start_services.after(done)(env.services, [node.service])
    if not wait_for_stream(joining.primary, node.name, STREAM_SECONDS):
        raise OpsError(told, f"look at the log of {node.service}, then launch it again")
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
    """WAL is received and shipped, and commits wait again for whom the configuration names, where they are there."""
    if env.has("wal") and env.wal.service in env.services.names and not streams(primary, env.wal.name):
        make_slots(primary, [env.wal.slot])
        start_receiver(env.services, env.wal.service)
        tell_receiver(report, primary, env.wal)
    if env.has("wal") and env.wal.archiver in env.services.names:  # after a dump nobody has started it
        start_services(env.services, [env.wal.archiver])
    with primary.connect() as connection:
        overridden = bool(execute(connection, _OVERRIDDEN))
    if overridden:
        commit_together(primary)
    if not commits_return(primary, ATTACH_SECONDS):
        found = commit_alone(permit, primary)
        report.warn(
            "commits wait for no standby",
            "look at who is named in synchronous_standby_names and not "
            "there (check-replication), then launch this again",
            value=found.names or "overridden",
        )


_OVERRIDDEN = """
SELECT 1 FROM pg_settings
WHERE name = 'synchronous_standby_names' AND setting = '' AND sourcefile LIKE '%postgresql.auto.conf'
"""
