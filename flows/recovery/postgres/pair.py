"""The two servers of a PostgreSQL failover as the run finds them, and the resulting course (§8.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from runbook.errors import OpsError
from runbook.report import Report
from tasks.failover.fencing import Fencing, find_fencing
from tasks.failover.marker import FailoverMarker
from tasks.failover.member import (
    ClusterMember,
    Lag,
    MemberControl,
    read_configured,
    read_control,
    read_lag,
    read_member,
    read_silent,
)
from tasks.postgres.replication.synchronous import address
from tasks.wal.format.names import lsn_text

SILENT_SECONDS = 5.0
"""A standby may process what a dead primary sent last for this time."""
Mode = Literal["planned", "unplanned"]
Course = Literal["hand over", "take over", "finish"]


@dataclass(frozen=True)
class ServerPair:
    """The failover from `old` to `new`; `was` and `will` are their present states. `lag` and `fencing` are None where
    the course does not need them, `wal` without a WAL receiver. `sync_names`: the standbys that commits wait or waited
    for; `sync_from`: the source of that."""

    course: Course
    old: Postgres
    new: Postgres
    was: ClusterMember
    will: ClusterMember
    wal: Wal | None
    control: MemberControl | None
    lag: Lag | None
    fencing: Fencing | None
    marker: FailoverMarker | None
    sync_names: str
    sync_commit: str
    sync_from: str

    @property
    def target(self) -> str:
        """The target of pin and permit."""
        return f"{address(self.old)} → {address(self.new)}"

    @property
    def old_timeline(self) -> int:
        """The old primary's newest timeline; 0 where it is unknown."""
        return self.was.timeline or (self.control.timeline if self.control else 0)

    @property
    def system(self) -> int:
        """The old primary's system identifier; 0 where it is unknown."""
        return self.was.system or (self.control.system if self.control else 0)


def read_pair(env: Environment, mode: Mode, wanted: str) -> ServerPair:
    """Read both servers, their fence and the marker of an unfinished failover; changes nothing.

    Raises:
        OpsError: there is no second server, or a parameter is wrong.
    """
    _require_two(env, mode)
    env.forget_roles()
    primary, standby = env.postgres, env.standby
    marker = FailoverMarker.find(env.reports_directory)
    now = {address(node): read_member(node) for node in (primary, standby)}
    if mode == "unplanned" and now[address(primary)].dead and now[address(standby)].follows:
        now[address(standby)] = read_silent(standby, SILENT_SECONDS)
    if wanted and wanted not in now:
        raise OpsError(
            f"new_primary {wanted} is neither of the two servers", f"give one of {', '.join(now)}, or leave it empty"
        )
    course = _course(now[address(primary)], now[address(standby)], mode, wanted, marker)
    target = wanted or (marker.new if marker else "")
    both_recover = course == "take over" and target == address(primary) and now[target].follows
    old, new = (standby, primary) if course == "finish" or both_recover else (primary, standby)
    return _described(env, course, old, new, now, marker)


def _require_two(env: Environment, mode: str) -> None:
    if not env.has("standby"):
        raise OpsError("the environment has no standby", "add [standby] to its TOML; without one run restore-database")
    if mode not in ("planned", "unplanned"):
        raise OpsError(f"mode is “{mode}”", "choose planned or unplanned")


def _course(
    primary: ClusterMember, standby: ClusterMember, mode: Mode, wanted: str, marker: FailoverMarker | None
) -> Course:
    """The course: finish an earlier run, hand over from a running primary, or take over from a dead one."""
    if primary.is_primary and not standby.is_primary:  # two primaries are refused
        left_by_another = marker is not None and marker.new == primary.address and wanted != standby.address
        if left_by_another or wanted == primary.address or (mode == "unplanned" and not standby.follows):
            return "finish"
    return "hand over" if primary.is_primary else "take over"


def _described(
    env: Environment,
    course: Course,
    old: Postgres,
    new: Postgres,
    now: dict[str, ClusterMember],
    marker: FailoverMarker | None,
) -> ServerPair:
    was, will = now[address(old)], now[address(new)]
    down = course != "hand over"
    lag = read_lag(old, new.name) if course == "hand over" and new.name else None
    names, commit, source = will.sync_names, will.sync_commit, "the new primary's configuration"
    if was.is_primary:
        names, commit, source = was.sync_names, was.sync_commit, "the primary itself"
    elif course == "take over" and (found := read_configured(old, "synchronous_commit")):
        names, commit = read_configured(old, "synchronous_standby_names"), found
        source = "the configuration files of the dead primary"
    return ServerPair(
        course,
        old,
        new,
        was,
        will,
        env.wal if env.has("wal") else None,
        read_control(old) if down else None,
        lag,
        find_fencing(env.services, old) if course == "take over" else None,
        marker,
        names,
        commit,
        source,
    )


def report_pair(report: Report, title: str, pair: ServerPair) -> None:
    """Report both servers in a table."""
    rows = []
    for member in (pair.was, pair.will):
        role = member.problem or ("standby" if member.in_recovery else "primary")
        place = "" if member.problem else lsn_text(member.written)
        received = lsn_text(member.received) if member.follows else ""
        rows.append((member.address, role, member.timeline or "", place, received, member.receiver, member.paused))
    columns = ("server", "role", "timeline", "written or replayed", "received", "WAL receiver", "replay")
    report.table(f"Servers {title}", columns, rows)
