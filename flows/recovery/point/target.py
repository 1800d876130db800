"""The target of a point-in-time recovery, located in the WAL before anything is touched."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blocks.environment import Environment
from flows.recovery.point.choice import PointOrigin, full_xid
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.report import Report, Status
from tasks.cluster.catalog import databases_in
from tasks.cluster.content import cluster_in
from tasks.cluster.target import RecoveryTarget, Stop, find_stop, find_stop_at
from tasks.host.disk import is_here
from tasks.stores.directory import told
from tasks.wal.archive.continuity import Link
from tasks.wal.format.names import lsn_text
from tasks.wal.format.pages import Files
from tasks.wal.reading.decode import Behind, Reader, copies_of
from tasks.wal.reading.destruction import MARKS_SINCE, begin_of_drop, read_definitions
from tasks.wal.reading.waldump import Commit, PreparedTransactions

PREPARED = "prepared transactions at the target"


@dataclass(frozen=True)
class FoundTarget:
    """Where the recovery stops (None: the target is not in the readable WAL), and what was read.

    `links`: the segments that it needs. `newest`: the newest commit that was read. `lost`: how many commits follow the
    stop (`more`: others were not read). `damage`: why reading ended early; `behind`: what lies after that.
    `undecodable`: the segment that does not decode. `replaced`: segments that were read from an intact copy.
    `commits`, `prepared`: every commit that was read, and the transactions that were prepared for one."""

    stop: Stop | None
    links: tuple[Link, ...]
    newest: Commit | None
    lost: int
    more: bool
    damage: str
    behind: Behind | None = None
    undecodable: Link | None = None
    replaced: tuple[Link, ...] = ()
    commits: tuple[Commit, ...] = ()
    prepared: PreparedTransactions = field(default_factory=PreparedTransactions)


@probe
def find_in_wal(env: Environment, origin: PointOrigin, target: RecoveryTarget, directory: Path) -> FoundTarget:
    """Fetch WAL in parallel, and find the target in it.

    Raises:
        OpsError, Unreachable: the archive does not answer, or the disk is full.
    """
    content, stop = origin.content, None
    with told(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    reader = Reader(
        env.postgres,
        origin.archive,
        content.system,
        origin.chain,
        directory,
        copies_of(env, content.system, origin.backup.manifest.environment),
        end=content.stop,
    )
    for _ in reader.batches():
        if stop := find_stop(target, reader.commits, content.stop, reader.end, whole=reader.is_whole):
            break
    commits = reader.commits
    if stop:
        files = [(link.segment, directory / link.segment.name) for link in reader.read]
        stop = before_drops(env, origin, stop, commits, files)
    after = [one for one in commits if stop and one.lsn >= stop.lsn and one != stop.before and stop.lsn]
    is_cut_off = reader.is_whole or bool(reader.damage)  # otherwise the target was found before
    return FoundTarget(
        stop,
        _needed(reader.read, stop),
        commits[-1] if commits else None,
        len(after),
        len(reader.read) < len(origin.chain.links) or bool(origin.chain.behind),
        reader.damage,
        reader.behind() if is_cut_off else None,
        reader.undecodable,
        tuple(reader.replaced),
        tuple(commits),
        reader.prepared,
    )


def report_prepared(report: Report, found: FoundTarget, stop: Stop) -> None:
    """The transactions that are prepared at the target: neither committed nor rolled back."""
    warn_prepared(report, found.prepared.left_at(stop.lsn + stop.inclusive))


def warn_prepared(report: Report, names: Sequence[str]) -> None:
    """Name transactions that are prepared at the target, once."""
    if names and not any(one.name == PREPARED for one in report.findings):
        report.warn(
            PREPARED,
            "when the server runs again, find out from the application that prepared them what it decided, and run "
            "COMMIT PREPARED or ROLLBACK PREPARED for each: until then they hold their locks",
            value=", ".join(names),
            expected="none",
        )


def before_drops(env: Environment, origin: PointOrigin, stop: Stop, commits: Sequence[Commit], files: Files) -> Stop:
    """The stop before the first trace of a DROP DATABASE that commits after it: from that trace on the database is
    invalid, although the transaction has not committed. A stop after a record stays: it must include that record.

    Raises:
        VerificationFailed: the trace is not in the WAL.
    """
    content, there = origin.content, [one for one in commits if one.lsn >= origin.content.stop]
    for drop in there if stop.lsn and not stop.inclusive else ():
        if drop.dropped and drop.lsn >= stop.lsn:
            marks = content.server_version >= MARKS_SINCE
            begin = begin_of_drop(env.postgres, files, drop, start=content.stop, marks=marks)
            if begin >= stop.lsn:  # so do the later ones
                break
            stop = find_stop_at(there, begin)
    return stop


def _needed(read: Sequence[Link], stop: Stop | None) -> tuple[Link, ...]:
    """Up to the segment after the stop: its record may end there."""
    if stop is None:
        return tuple(read)
    return tuple(link for link in read if link.segment.start <= stop.lsn + link.segment.bytes)


def judge_target(report: Report, origin: PointOrigin, target: RecoveryTarget, found: FoundTarget) -> Stop:
    """Judge whether the target can be reached, and report the transactions on both sides of it.

    Raises:
        RunbookFailed: it cannot. The report has the newest and the oldest reachable point.
    """
    newest = found.newest.text if found.newest else f"the end of the base backup, LSN {origin.content.stop_lsn}"
    oldest = cluster_in(origin.oldest)
    report.fact("newest reachable point" if not found.more or found.damage else "newest point read", newest)
    reason = found.damage or origin.chain.end_reason
    if found.damage or found.behind:
        behind = f"; after it: {found.behind.text}" if found.behind else ""
        report.fail(
            "WAL of the archive",
            _beyond(found, origin, newest),
            value=f"{reason}{behind}",
            expected="no gap, of this cluster",
            worst=Status.WARN if found.stop and target.by != "latest" else Status.CRITICAL,
        )
        if target.by == "latest":
            found = replace(found, stop=None)
    early = _is_early(target, origin)
    if early and target.by == "time":  # the archive has the first commit after it, but not those before it
        found = replace(found, stop=None)
    report.require(
        "target within the archive",
        found.stop is not None,
        f"oldest reachable point: {oldest.stopped.isoformat(timespec='seconds')}, LSN {oldest.stop_lsn}; newest: "
        f"{newest}. Run it again with by=latest, or with a target between the two",
        value=target.text if found.stop else f"{target.text}: {_why(target, early, reason, origin)}",
        expected="between the oldest and the newest reachable point",
    )
    report.fail_if_critical()
    assert found.stop
    stop = found.stop
    _report_stop(report, target, found, stop)
    report_prepared(report, found, stop)
    return stop


def judge_database(
    report: Report, env: Environment, origin: PointOrigin, stop: Stop, found: FoundTarget, wal: Path
) -> None:
    """Judge whether the application's database exists where the recovery stops: the WAL before it may drop it. WAL has
    OIDs only; the data directory knows which databases had its name."""
    named = set[int]()
    if is_here(env.postgres.host):
        with contextlib.suppress(OSError, ValueError, struct.error):
            named = databases_in(Path(env.postgres.data_directory), env.postgres.database)
    drops = [one for one in found.commits if one.dropped in named and one.lsn < stop.lsn]
    if not drops:
        return
    files = [(link.segment, wal / link.segment.name) for link in found.links]
    created = read_definitions(env.postgres, files, (), origin.content.stop, drops[-1].lsn).databases.created
    report.require(
        "application's database at the target",
        any(drops[-1].lsn < one < stop.lsn for one in created),
        f"choose a target before it (by=before_transaction target={drops[-1].xid}), or one after it was restored",
        value=f"{env.postgres.database} was dropped by {drops[-1].text}",
        expected="it exists",
    )


def _report_stop(report: Report, target: RecoveryTarget, found: FoundTarget, stop: Stop) -> None:
    report.fact("target", target.text)
    report.fact("stops", _where(stop))
    report.table(
        "Both sides of the target",
        ("side", "transaction", "committed", "LSN"),
        [
            (side, one.xid, one.at.isoformat(), lsn_text(one.lsn)) if one else (side, "none", "", "")
            for side, one in (("last included", stop.before), ("first excluded", stop.after))
        ],
    )
    more = " or more (not all WAL was read)" if found.more else ""
    report.fact("transactions after the target", f"{found.lost:,}{more}")


def _beyond(found: FoundTarget, origin: PointOrigin, newest: str) -> str:
    """The next step at a gap: fill it, or accept the loss after it by naming the last point before it."""
    there = f"by=transaction target={found.newest.xid}" if found.newest else f"by=lsn target={origin.content.stop_lsn}"
    if origin.chain.pruned and not found.damage:
        return f"run it with backup=auto, for a newer base backup. This one reaches only {newest} ({there})"
    return (
        "find an intact copy of that segment: in the replica store (source=copies), the receiver's directory, or "
        "pg_wal of the old primary and the standby. Copy it into [wal] directory, then run this again. Without a "
        f"copy, run it with {there}: that restores everything up to {newest}, and nothing after the gap"
    )


def _is_early(target: RecoveryTarget, origin: PointOrigin) -> bool:
    oldest = cluster_in(origin.oldest)
    match target.by:
        case "time":
            return target.at < oldest.stopped
        case "lsn":
            return target.lsn < oldest.stop
        case "latest":
            return False
    return full_xid(target.xid, oldest.next_xid) < oldest.next_xid


def _why(target: RecoveryTarget, early: bool, reason: str, origin: PointOrigin) -> str:
    if early:
        return "before the oldest base backup"
    if reason:
        return f"unreachable: {reason}"
    ahead = (
        ""
        if origin.chain.timeline.number == 1
        else (
            f" on timeline {origin.chain.timeline.number}, which began at "
            f"{lsn_text(origin.chain.timeline.ancestors[-1][1])}. If it was written earlier on another timeline, give "
            "that one (timeline=…). If an earlier run restored to this point, nothing is left to do"
        )
    )
    return f"the archive does not contain it{ahead}"


def _where(stop: Stop) -> str:
    if not stop.lsn:
        return "when the base backup is consistent: nothing was committed after it"
    return f"{'after' if stop.inclusive else 'before'} the record at {lsn_text(stop.lsn)}"


def epochs(origin: PointOrigin, stop: Stop) -> dict[int, int]:
    """The IDs of the two transactions with their epochs."""
    return {one.xid: full_xid(one.xid, origin.content.next_xid) for one in (stop.before, stop.after) if one}


def require_target(text: str, by: str) -> None:
    """Check the form before anything is read.

    Raises:
        OpsError: the target is missing.
    """
    if by != "latest" and not text.strip():
        raise OpsError("no target was given", "fill in target, or choose by=latest")
