"""The gate before a promotion and before a rejoin (§8.3): which commits would be lost, read behind the fence.

A plan calls the same functions, without the fence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres.server import Postgres
from flows.loss import loss_of, require_confirmed
from flows.recovery.postgres.findings import feeds_old_wal, is_synchronous
from flows.recovery.postgres.pair import ServerPair
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.kinds import probe
from runbook.report import Report
from tasks.failover.feeding import RECEIVER, Fed, WalSource, own_wal, sources_of
from tasks.failover.member import control_of
from tasks.failover.segments import ends_in_shutdown, read_commits
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address
from tasks.postgres.tables.filenodes import read_database_names
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.committed import Committed
from tasks.wal.reading.local import find_segments


@dataclass(frozen=True)
class PromotionLoss:
    """The loss of a promotion. `evidence`: why nothing is lost; "" otherwise."""

    loss: Loss
    evidence: str = ""


def planned_loss(pair: ServerPair) -> Loss:
    """The loss by what is known now. A running primary sends everything until it is stopped."""
    part = pair.new.database
    if pair.course == "hand over":
        is_provable = is_here(pair.old.host) or is_here(pair.new.host) or is_synchronous(pair)
        why = f"the files of {address(pair.old)} and {address(pair.new)} are on other hosts"
        return Loss(part) if is_provable else Loss.not_known(part, why)
    sources = sources_of(pair.new, pair.wal, pair.will)
    if feeds_old_wal(pair) and (own := own_wal(pair.old, pair.will)):
        sources += (own,)
    end = max([pair.will.written, *(source.beyond.end for source in sources)])
    return measure.work(pair, end, _unread(pair, sources)).loss


def pass_promotion(report: Report, pair: ServerPair, fed: Fed) -> PromotionLoss:
    """Let the standby pass to its promotion, which follows at once: the old primary is fenced, and the standby has
    replayed what can be read. Returns the loss.

    Raises:
        LossExceeded: more would be lost than was confirmed. No server was promoted.
        OpsError: the standby followed another timeline meanwhile.
    """
    if fed.timeline != pair.will.timeline:
        raise OpsError(
            f"{address(pair.new)} was on timeline {pair.will.timeline}, and followed timeline {fed.timeline} meanwhile",
            "find out which timeline the application wrote to last, then run this again",
        )
    found = measure.after(fed)(pair, fed.place, _unread(pair, fed.sources))
    require_confirmed(report, found.loss)
    return found


def _unread(pair: ServerPair, sources: Collection[WalSource]) -> tuple[str, ...]:
    """The standbys whose WAL could not be read."""
    return tuple(pair.wal.name for one in sources if pair.wal and one.name == RECEIVER and one.problem)


@probe
def measure(pair: ServerPair, end: int, unread: Collection[str]) -> PromotionLoss:
    """Count the commits of a stopped primary after `end`, the LSN up to which the new one has its WAL. `unread`: the
    names of standbys whose WAL could not be read."""
    part = pair.new.database
    try:
        read = commits_after(pair.old, pair.will.system, pair.will.timeline, end)
        loss = loss_of(part, read, read_database_names(pair.new))
        evidence = "0 (proven: the old primary's WAL has no further commit)" if loss.is_none else ""
        return PromotionLoss(loss, evidence)
    except OpsError as error:
        why = error.message
    if pair.course == "hand over" and _was_shut_down(pair, end):
        return PromotionLoss(Loss(part), "0 (proven: the standby's WAL ends with the old primary's shutdown)")
    if is_synchronous(pair, unread):
        evidence = f"0, by synchronous replication ({pair.sync_names}): all WAL of its standbys was replayed"
        return PromotionLoss(Loss(part), evidence)
    return PromotionLoss(Loss.not_known(part, f"{why}, and its commits waited for no server whose WAL was read"))


def _was_shut_down(pair: ServerPair, end: int) -> bool:
    """Whether the standby's WAL shows the clean shutdown of the primary that this run stopped."""
    if not is_here(pair.new.host):
        return False
    try:
        return ends_in_shutdown(pair.new, Path(pair.new.data_directory, "pg_wal"), pair.will.timeline, end)
    except OpsError:
        return False


def commits_after(old: Postgres, system: int, timeline: int, end: int) -> list[Committed]:
    """Return every commit after `end` of a stopped server whose files are on this host. `system`, `timeline`: what it
    must have written.

    Raises:
        OpsError: how far it got cannot be read.
    """
    if not is_here(old.host):
        raise OpsError(f"the files of {address(old)} are on another host")
    control, pg_wal = control_of(old), Path(old.data_directory, "pg_wal")
    if control is None:
        raise OpsError(f"{old.data_directory} is missing or cannot be read")
    if control.system != system:
        raise OpsError(f"{old.data_directory} is of another cluster")
    segments = [one for one in find_segments(pg_wal) if one.timeline == timeline]
    if control.was_standby and not any(one.start + one.bytes >= end for one in segments):
        return []  # a standby that is behind
    found, reached = read_commits(old, pg_wal, timeline, end)
    if reached < control.checkpoint:
        raise OpsError(
            f"{address(old)} wrote up to {lsn_text(control.checkpoint)}, and its WAL ends at {lsn_text(reached)}"
        )
    return found
