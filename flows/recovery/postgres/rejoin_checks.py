"""The server that is to rejoin as a standby (§8.3): its state, the commits that only it has, and its fitness."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from flows.loss import loss_of
from runbook.errors import OpsError, Unreachable
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import first_of, size
from tasks.cluster.tablespaces import map_occupied
from tasks.failover.member import ClusterMember, MemberControl, read_control, read_member
from tasks.failover.promotion import streams
from tasks.failover.rejoin import parted_from, read_diverged, was_interrupted
from tasks.failover.segments import Beyond, read_commits
from tasks.host.disk import disk_of, is_here
from tasks.postgres.replication.synchronous import address
from tasks.postgres.tables.filenodes import read_database_names
from tasks.wal.format.names import lsn_text

Method = Literal["auto", "rewind", "base_backup"]


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
