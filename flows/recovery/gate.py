"""The gate before a cluster is replaced. (One database on a running server: flows/database/gate.py.)

The live side is stopped; then it is read to its end; then what the copy lacks is counted.
A run that would lose more than its plan said ends here, with nothing replaced. A plan counts in the same way, without
the fence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import psycopg

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from blocks.postgres.server import execute
from flows.database.gate import DatabaseCopy, spool
from flows.loss import loss_of, planned_loss_of, require_confirmed
from flows.recovery.point.choice import PointOrigin, ship
from flows.recovery.stopped_services import ClusterServices
from runbook import clock
from runbook.errors import OpsError
from runbook.files import record
from runbook.guard.loss import Loss
from runbook.kinds import probe
from runbook.report import Report
from runbook.units import duration
from tasks.cluster.fence import FencedServer, read_fence, read_written
from tasks.cluster.swap import superseded_clusters
from tasks.cluster.target import Stop
from tasks.failover.member import read_configured
from tasks.host.disk import is_here
from tasks.postgres.replication.status import DOES_NOT_WAIT, parse_sync_names
from tasks.recovery_points.wal import LEAST_COMMIT_BYTES
from tasks.wal.archive.archive import timeline_in
from tasks.wal.archive.continuity import Chain, chain_from
from tasks.wal.archive.fetch import fetch
from tasks.wal.discarded import parted_at
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.committed import Committed, read_committed
from tasks.wal.reading.local import Local, find_segments
from tasks.wal.reading.waldump import Commit

FENCED = "records/fenced-server.json"


@dataclass(frozen=True)
class SwapBegun:
    """What a run had decided when it fenced the server, for the run after a killed one: the server's control file, the
    transaction before which the copy ends ("": the end of the WAL), and the runbook's title."""

    control: str
    before: str = ""
    runbook: str = ""


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
        record.write(env.reports_directory / FENCED, SwapBegun(found.control, before, report.runbook))
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


def target_of_killed_run(report: Report, env: Environment) -> str:
    """The transaction before which a run of this runbook wanted to end that was killed behind its fence, if the server
    has not run since; between the renames, a run of any runbook. "" if there is none."""
    fenced = record.read(env.reports_directory / FENCED, SwapBegun, "delete it, and run this again")
    if not fenced:
        return ""
    live = Path(env.postgres.data_directory).resolve()
    if (live / "PG_VERSION").exists():
        is_continued = fenced.runbook == report.runbook and read_written(env.postgres, live).control == fenced.control
    else:
        is_continued = _renamed(env) is not None
    return fenced.before if is_continued else ""


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

    def of_database(self) -> DatabaseCopy:
        """The copy of its databases, where they alone are taken out of it."""
        return DatabaseCopy(self.part, self.end, self.origin.content.system, self.databases, without=self.without)

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
    loss = measured or measure.after(services.last)(env, fenced, copy, planned_loss_of(report, copy.part))
    services.last = loss
    require_confirmed(report, loss)
    require_fence(env, fenced)
    return loss


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
    return loss_of(copy.part, lost, copy.names, planned.read_to)


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
    with tempfile.TemporaryDirectory(prefix=".gate-", dir=spool(env)) as place:
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
    if fenced.data is None and (why := unwaited(env)):
        return f"{env.postgres.data_directory} is missing, and {why}"
    return ""


def _local(directory: Path) -> list[Local]:
    return [one for one in find_segments(directory) if one.system] if directory.is_dir() else []


def unwaited(env: Environment, *promoted: str) -> str:
    """Why commits may exist that only the data directory has; "" where each waited for a copy that is read without it:
    the WAL receiver's, that of a standby on this host, and that of the standbys named in `promoted`."""
    received = env.has("wal") and env.wal.method == "receivewal"
    if not received and not promoted:
        return "commits did not wait until their WAL was archived"
    if not (found := _sync_settings(env)):
        return f"its configuration is on {env.postgres.host}"
    names = parse_sync_names(found[0])
    if not names.needed or found[1] in DOES_NOT_WAIT:
        return f"commits did not wait for {' or '.join([*promoted, *['the WAL receiver'] * received])}"
    read = {*promoted, *([env.wal.name] if received else [])}
    if env.has("standby") and is_here(env.standby.host):  # its pg_wal is shipped
        read.add(env.standby.name)
    # Each commit waited for `needed` of the names: it is on one that was read, if fewer than that were not.
    if names.needed > len(set(names.names) - read):
        return ""
    return f"commits waited for {', '.join(names.names)}, not all of which can be read"


def _sync_settings(env: Environment) -> list[str]:
    """The standbys that commits wait for, and synchronous_commit: from the files on this host, or from a server on
    another host. Empty: it does not answer."""
    names = ("synchronous_standby_names", "synchronous_commit")
    if is_here(env.postgres.host):
        return [read_configured(env.postgres, name) for name in names]
    try:
        with env.postgres.connect(seconds=nodes.ASK_SECONDS) as connection:
            return [str(execute(connection, "SELECT current_setting(%s)", name)[0][0]) for name in names]
    except (OpsError, psycopg.Error):
        return []


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


def planned_loss(
    env: Environment, copy: ClusterCopy, given_up: int, *, to_the_end: bool, confirmed: Loss | None = None
) -> Loss:
    """The loss by what is known before the fence: `given_up` commits lie after the target. A recovery to the end has
    what is written until the fence; another one loses it too. `confirmed`: the loss of the plan that the run carries
    out, where it turns to another target or backup."""
    live = read_written(env.postgres, Path(env.postgres.data_directory)) if is_here(env.postgres.host) else None
    if live and live.timeline not in (0, copy.origin.chain.timeline.number):  # the copy is of another branch
        found = measure.work(env, live, copy, Loss(copy.part))
        return found if found.unknown else replace(found, as_of=clock.now())
    if to_the_end:
        return _loss_at_end(env, copy.part, live, copy.origin.unread)
    known = [Committed(one.xid, one.lsn, one.at) for one in copy.known if one.lsn > copy.end]
    counted = _counted(copy, known, confirmed or Loss(copy.part))
    read_to = known[-1].lsn if known else copy.end
    return replace(counted, count=max(given_up, counted.count or 0), as_of=clock.now(), read_to=read_to)


def loss_at_end(env: Environment) -> Loss | None:
    """The loss of a recovery of the whole cluster to the end of its WAL, as its plan states it where the archive has no
    gap. None: the server is on another host, so only the archived WAL shows it."""
    if not is_here(env.postgres.host):
        return None
    live = read_written(env.postgres, Path(env.postgres.data_directory))
    return _loss_at_end(env, env.postgres.database, live, "")


def _loss_at_end(env: Environment, part: str, live: FencedServer | None, unread: str) -> Loss:
    """A recovery to the end has what is written until the fence. `live` None: the server is on another host."""
    if live is None:
        why = unread
    else:
        is_silent = not _renamed(env) and not nodes.ask(env.postgres)
        why = _unreadable(env, live) if is_silent else ""
    return Loss.not_known(part, why) if why else Loss(part)
