"""The gate before live data of the database is replaced.

The live side is stopped, or its writers are kept out; then it is read to its end; then what the copy lacks is counted.
A run that would lose more than its plan said ends here, with nothing replaced. A plan counts in the same way, without
the fence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from blocks.postgres.server import execute
from flows.recovery.point.choice import PointOrigin, ship
from flows.recovery.stopped_services import ClusterServices
from runbook import clock
from runbook.errors import LossExceeded, OpsError
from runbook.files import record
from runbook.guard.loss import Loss, exceeded, losses_text
from runbook.kinds import probe
from runbook.report import Report
from runbook.units import duration
from tasks.cluster.fence import FencedServer, read_fence, read_written
from tasks.cluster.swap import superseded_clusters
from tasks.cluster.target import Stop
from tasks.failover.member import read_configured
from tasks.host.disk import is_here
from tasks.postgres.replication.status import parse_sync_names
from tasks.recovery_points.wal import LEAST_COMMIT_BYTES
from tasks.wal.archive.archive import timeline_in
from tasks.wal.archive.continuity import Chain, chain_from
from tasks.wal.archive.fetch import fetch
from tasks.wal.discarded import parted_at
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.reading.committed import Committed, count_by_database, read_committed
from tasks.wal.reading.local import Local, find_segments
from tasks.wal.reading.supply import read_supply
from tasks.wal.reading.waldump import Commit

FENCED = "records/fenced-server.json"


@dataclass(frozen=True)
class SwapBegun:
    """What a run had decided when it fenced the server, for the run after a killed one: the server's control file, and
    the transaction before which the copy ends ("": the end of the WAL)."""

    control: str
    before: str = ""


def fence_cluster(
    report: Report, env: Environment, services: ClusterServices, source: Stores, before: str = ""
) -> FencedServer:
    """Stop the application, the standby, the server and the WAL receiver, prove that, and ship the rest of the WAL.

    Raises:
        OpsError: one of them does not stop. Nothing live was replaced.
    """
    services.stop()
    services.last = found = read_fence.after(services.last)(env.postgres, env.services)
    if found.data:
        record.write(env.reports_directory / FENCED, SwapBegun(found.control, before))
    else:
        found = _renamed(env) or found
    ship(report, env, source)
    return found


def before_of(stop: Stop) -> str:
    """The transaction, or the LSN, before which a recovery ends; "": the end of the WAL."""
    if stop.lsn and not stop.inclusive and not (stop.after and stop.after.lsn == stop.lsn):
        return lsn_text(stop.lsn)
    return str(stop.after.xid) if stop.after else ""


def forget_swap(env: Environment) -> None:
    """Forget what `fence_cluster` wrote down: the swap is complete."""
    (env.reports_directory / FENCED).unlink(missing_ok=True)


def _renamed(env: Environment) -> FencedServer | None:
    """The server that a run had fenced which was killed between its renames: its directory has another name."""
    begun = record.read(env.reports_directory / FENCED, SwapBegun, "delete it, and run this again")
    kept = (read_written(env.postgres, data) for data in reversed(superseded_clusters(env.postgres)))
    return next((one for one in kept if begun and one.control and one.control == begun.control), None)


def begun_before(env: Environment) -> str:
    """The transaction before which a run wanted to end that was killed between its renames; "" where there is none."""
    if (Path(env.postgres.data_directory) / "PG_VERSION").exists() or not _renamed(env):
        return ""
    begun = record.read(env.reports_directory / FENCED, SwapBegun, "delete it, and run this again")
    return begun.before if begun else ""


def require_fence(env: Environment, fenced: FencedServer) -> None:
    """Check, just before the swap, that the server did not run since it was fenced.

    Raises:
        OpsError: it did. Nothing live was replaced.
    """
    live = Path(env.postgres.data_directory).resolve()
    now = read_fence(env.postgres, env.services)
    if fenced.data == live and now.control != fenced.control:
        raise OpsError(
            f"the database server ran again after it was stopped: its control file now says “{now.control}”",
            f"find out what starts {env.services.names.get(env.postgres.service)}, stop it, then run this again; "
            "nothing live was replaced",
        )


def planned_losses(report: Report) -> tuple[Loss, ...]:
    """The losses that this run's plan said, and that a person confirmed."""
    return report.effect.lost if report.effect and not isinstance(report.effect.lost, str) else ()


AGAIN = "run this with an empty confirm, and confirm what the new plan says of the loss"


def require_confirmed(report: Report, *losses: Loss, hint: str = AGAIN) -> None:
    """Check that no more is lost than this run's plan said.

    Raises:
        LossExceeded: it is. The message has the new loss.
    """
    planned = planned_losses(report)
    if more := exceeded(planned, losses):
        said = [one for one in planned if one.part in {loss.part for loss in more}]
        raise LossExceeded(f"{losses_text(more)}, but the plan said: {losses_text(said)}", hint)


@dataclass(frozen=True)
class ClusterCopy:
    """A copy that may replace the live cluster: it has every commit of its history up to `stop`, and none after it.

    `known`: the commits that were read from the WAL before; `without`: transactions that it leaves out on purpose;
    `databases`: the OIDs of those that are replaced, none for all; `names`: databases by OID."""

    part: str
    origin: PointOrigin
    stop: Stop
    known: Sequence[Commit] = ()
    without: Collection[int] = ()
    databases: Collection[int] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The LSN up to which it has every commit record: one that begins later is missing."""
        if not self.stop.lsn:
            return self.origin.content.stop - 1
        return self.stop.lsn if self.stop.inclusive else self.stop.lsn - 1


def pass_cluster(
    report: Report,
    env: Environment,
    services: ClusterServices,
    copy: ClusterCopy,
    fenced: FencedServer | None = None,
    measured: Loss | None = None,
) -> Loss:
    """Let a copy of the whole cluster pass to the swap, which follows at once: with the server fenced, and no more lost
    than was confirmed. `measured`: the loss of another region's cluster, by that one's gate. Returns the loss.

    Raises:
        LossExceeded: it would lose more. Nothing live was replaced.
        OpsError: the server does not stop, or ran again.
    """
    fenced = fenced or fence_cluster(report, env, services, "backups", before_of(copy.stop))
    loss = measured or measure.after(services.last)(env, fenced, copy, _planned(report, copy.part))
    services.last = loss
    require_confirmed(report, loss)
    require_fence(env, fenced)
    return loss


def _planned(report: Report, part: str) -> Loss:
    return next((loss for loss in planned_losses(report) if loss.part == part), Loss(part))


@probe
def measure(env: Environment, fenced: FencedServer, copy: ClusterCopy, planned: Loss) -> Loss:
    """Count the commits of the live cluster that a copy lacks. The server is fenced, and its WAL was shipped.
    `planned`: what the plan said. Where WAL behind the target cannot be read, everything since the target is lost."""
    try:
        chain, begin = _live_chain(fenced, copy)
        read, end = _read(env, fenced, copy, chain, begin)
    except OpsError as error:
        return _uncounted(planned, error.message)
    if why := chain.trouble or _unread(env, fenced, chain, max(end, copy.end)):
        return _uncounted(planned, why)
    return replace(_counted(copy, read, planned), read_to=end)


def _uncounted(planned: Loss, why: str) -> Loss:
    return planned if planned.since else Loss.not_known(planned.part, why)


def _counted(copy: ClusterCopy, read: Sequence[Committed], planned: Loss) -> Loss:
    lost = [one for one in read if one.xid not in copy.without]
    if copy.databases:
        lost = [one for one in lost if one.may_concern(copy.databases)]
    later = sum(one.lsn > planned.read_to for one in lost)  # not by time: the plan read before it was made
    return replace(lost_commits(copy.part, lost, copy.names), later=later)


def lost_commits(part: str, lost: Sequence[Committed], names: Mapping[int, str]) -> Loss:
    """The loss of these commits. `names`: databases by OID."""
    times = sorted(one.at for one in lost)
    first, last = (times[0], times[-1]) if times else (None, None)
    return Loss(part, len(lost), first=first, last=last, by=count_by_database(lost, names))


@dataclass
class DatabaseGate:
    """The gate of one database that is replaced on a running server. The swap calls it when no session is left in that
    database, and none can log in: a refusal rolls the swap back. `loss`: what it measured."""

    report: Report
    env: Environment
    copy: ClusterCopy
    loss: Loss | None = None
    _found: list[Committed] = field(default_factory=list)
    _read_to: int = 0

    def read_ahead(self) -> None:
        """Read what was written until now, so that only the rest is read while clients wait.

        Raises:
            OpsError: WAL that the server wrote cannot be read.
        """
        env, copy = self.env, self.copy
        begin = self._read_to or copy.end
        with env.postgres.connect() as connection:
            ((text, timeline),) = execute(connection, _WRITTEN)
        end, bytes_ = lsn_of(str(text)), copy.origin.content.segment_bytes
        supply = read_supply.work(env, "backups", copy.origin.content.system, int(timeline))
        first, last = begin // bytes_, (end - 1) // bytes_
        if missing := supply.missing(first, last):
            raise OpsError(f"{missing[0]} of the live server cannot be read", "check pg_wal, and run this again")
        with tempfile.TemporaryDirectory(prefix=".gate-", dir=_spool(env)) as place:
            files = [
                (supply.pieces[number].segment, supply.bring(supply.pieces[number], Path(place)))
                for number in range(first, last + 1)
            ]
            self._found += read_committed(env.postgres, files, begin, end)
        self._read_to = max([begin, *(one.lsn for one in self._found)])

    def __call__(self) -> None:
        """Count what the copy lacks.

        Raises:
            LossExceeded: it is more than was confirmed.
        """
        part = self.copy.part
        try:
            self.read_ahead()
            self.loss = _counted(self.copy, self._found, _planned(self.report, part))
        except OpsError as error:
            self.loss = Loss.not_known(part, error.message)
        require_confirmed(self.report, self.loss)


_WRITTEN = "SELECT pg_current_wal_flush_lsn(), timeline_id FROM pg_control_checkpoint()"


def _live_chain(fenced: FencedServer, copy: ClusterCopy) -> tuple[Chain, int]:
    """The WAL of the history that the live server was on, and the LSN after which the copy lacks its commits: its end,
    or where its own history left the live one.

    Raises:
        OpsError: the archive does not answer, or the two have no common history.
    """
    origin, own = copy.origin, copy.origin.chain.timeline
    listing = origin.archive.listing()
    live = timeline_in(origin.archive, listing, fenced.timeline) if fenced.timeline else own
    if fenced.system and fenced.system != origin.content.system:
        raise OpsError(f"the live server is another cluster: its system identifier is {fenced.system}")
    begin = min(copy.end, parted_at(own, live))
    return chain_from(listing, live, begin, origin.content.segment_bytes), begin


def _read(
    env: Environment, fenced: FencedServer, copy: ClusterCopy, chain: Chain, begin: int
) -> tuple[list[Committed], int]:
    """The commits after `begin`, and the end of the WAL that was read. What was read before is not read again. The
    newest segments of a stopped server are read where they are: not every archive takes an unfinished one."""
    known = [one for one in copy.known if one.lsn > begin]
    same = chain.timeline == copy.origin.chain.timeline
    begin = known[-1].lsn if known and same else begin
    links = [link for link in chain.links if link.segment.end > begin]
    found = [Committed(one.xid, one.lsn, one.at) for one in known] if same else []
    with tempfile.TemporaryDirectory(prefix=".gate-", dir=_spool(env)) as place:
        fetched = fetch(copy.origin.archive, copy.origin.content.system, links, Path(place))
        if fetched.damage:
            raise OpsError(fetched.damage)
        files = {link.segment.number: (link.segment, Path(place) / link.segment.name) for link in fetched.links}
        newest = max(files, default=begin // copy.origin.content.segment_bytes)
        for one in _local(fenced.data / "pg_wal") if fenced.data else ():  # in order
            if one.timeline == chain.timeline.number and newest <= one.segment.number <= newest + 1:
                newest, files[one.segment.number] = one.segment.number, (one.segment, one.path)
        found += read_committed(env.postgres, list(files.values()), begin) if files else []
    local = [segment.end for segment, path in files.values() if path.parent != Path(place)]
    return found, max([chain.end, *local])


def _spool(env: Environment) -> Path:
    spool = Path(env.backups.spool) / env.name
    spool.mkdir(parents=True, exist_ok=True, mode=0o700)
    return spool


def _unread(env: Environment, fenced: FencedServer, chain: Chain, end: int) -> str:
    """Why WAL of the live server may exist that was not read; "" where all was."""
    if fenced.data is None or fenced.problem:
        return _unreadable(env, fenced)
    if end + LEAST_COMMIT_BYTES < fenced.checkpoint:
        return (
            f"the live server wrote up to {lsn_text(fenced.checkpoint)}, and only WAL up to {lsn_text(end)} can be read"
        )
    newest = chain.links[-1].segment.number if chain.links else -1
    later = [
        one
        for one in _local(fenced.data / "pg_wal")
        if one.timeline == chain.timeline.number and one.segment.number > max(newest, end // one.bytes)
    ]
    return f"{later[0].name} in {fenced.data}/pg_wal is not in the archive" if later else ""


def _unreadable(env: Environment, fenced: FencedServer) -> str:
    """Why nobody can read how far a stopped server got, if commits may exist that no copy has; "" otherwise."""
    if fenced.problem:
        return f"how far the live server got cannot be read: {fenced.problem}"
    return unwaited(env) if fenced.data is None else ""


def _local(directory: Path) -> list[Local]:
    return [one for one in find_segments(directory) if one.system] if directory.is_dir() else []


def unwaited(env: Environment) -> str:
    """Why commits may exist that only the missing data directory had; "" where each waited for a copy that was read."""
    missing = f"{env.postgres.data_directory} is missing"
    if not env.has("wal") or env.wal.method != "receivewal":
        return f"{missing}, and with it the WAL that was not archived yet"
    if not is_here(env.postgres.host):
        return f"{missing}, and its configuration is on {env.postgres.host}"
    names = parse_sync_names(read_configured(env.postgres, "synchronous_standby_names"))
    read = {env.wal.name}
    if env.has("standby") and is_here(env.standby.host):  # its pg_wal is shipped
        read.add(env.standby.name)
    if not names.needed:
        return f"{missing}, and commits did not wait for the WAL receiver"
    # Each commit waited for `needed` of the names: it is on one that was read, if fewer than that were not.
    return (
        ""
        if names.needed > len(set(names.names) - read)
        else f"{missing}, and commits waited for {', '.join(names.names)}, not all of which can be read"
    )


def judge_objective(report: Report, env: Environment, newest: datetime) -> None:
    """Compare the measured loss with the RPO. `newest`: the newest write that was restored."""
    loss = report.losses.get(env.postgres.database, Loss.not_known(env.postgres.database, "nobody measured it"))
    if loss.unknown:
        hint = "compare with the clients' own records"
        report.warn("data loss against the RPO", hint, value=loss.text)
        return
    until = clock.now() if loss.since else loss.last or newest
    lost = max((until - newest).total_seconds(), 0.0)
    report.prefer(
        "data loss against the RPO",
        lost <= env.rpo_seconds,
        "check what was written after that point (find-transaction)",
        value=duration(lost),
        expected=f"at most {duration(env.rpo_seconds)}",
    )


def planned_loss(env: Environment, copy: ClusterCopy, given_up: int, *, to_the_end: bool) -> Loss:
    """The loss by what is known before the fence: `given_up` commits lie after the target. A recovery to the end has
    what is written until the fence; another one loses it too."""
    live = read_written(env.postgres, Path(env.postgres.data_directory)) if is_here(env.postgres.host) else None
    if live and live.timeline not in (0, copy.origin.chain.timeline.number):  # the copy is of another branch
        found = measure.work(env, live, copy, Loss(copy.part))
        return found if found.unknown else replace(found, as_of=clock.now())
    if to_the_end:
        is_silent = live and not _renamed(env) and not nodes.ask(env.postgres)
        why = _unreadable(env, live) if live and is_silent else "" if live else copy.origin.unread
        return Loss.not_known(copy.part, why) if why else Loss(copy.part)
    known = [Committed(one.xid, one.lsn, one.at) for one in copy.known if one.lsn > copy.end]
    counted = _counted(copy, known, Loss(copy.part))
    read_to = known[-1].lsn if known else copy.end
    return replace(counted, count=max(given_up, counted.count or 0), as_of=clock.now(), read_to=read_to)
