"""The database's recovery points: by failover to the standby, and by base backup and WAL (§8.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from blocks.environment import Environment, Stores
from runbook import clock
from runbook.errors import OpsError, VerificationFailed
from runbook.files import inside
from runbook.kinds import probe
from runbook.units import size
from tasks.backups.catalogue import Backup, open_all
from tasks.backups.manifest import CHUNK_BYTES
from tasks.cluster.content import cluster_in, lineage
from tasks.cluster.origin import is_on, own_backups
from tasks.failover.member import ClusterMember, ask_member
from tasks.recovery_points.backups import is_beside, lives_here
from tasks.recovery_points.point import Point, best_of
from tasks.recovery_points.wal import Moment, WrittenWal, ask_written, local_files, moment_of
from tasks.stores.store import store_of
from tasks.wal.archive.archive import ArchiveListing, StoredSegment
from tasks.wal.archive.continuity import Chain, chain_from
from tasks.wal.archive.destinations import archive_of
from tasks.wal.branch import timeline_in_use
from tasks.wal.format.names import Segment, Timeline

PATIENCE_SECONDS = 5.0
MOST_BASES = 5
RECEIVER = "check that the WAL receiver and the archiver run"
GAP = "find that segment (in the replica store, in the receiver's directory); otherwise run backup-cluster now"
REJOIN = "check its log, or run rejoin-standby"


@probe
def read_written(env: Environment) -> WrittenWal:
    """The primary's write position, and which servers have it."""
    names = [env.standby.name] if env.has("standby") else []
    return ask_written(env.postgres, [*names, *([env.wal.name] if env.has("wal") else [])])


@probe
def read_standby_point(env: Environment, written: WrittenWal) -> Point:
    """The point of a failover to the standby, which also replays the WAL receiver's WAL."""
    member = ask_member(env.standby)
    point = Point("database", "standby", "live", member.address)
    if trouble := _unfit(member, written):
        return replace(point, problem=trouble, hint=REJOIN)
    streamed = (written.streams or {}).get(env.standby.name, 0)
    reached = max(streamed, member.received, member.written)
    end = _fed(env, written, reached)
    moment = moment_of(env, written, end)
    paused = "" if member.paused == "not paused" else f"replay is {member.paused}"
    behind = size(written.end - reached) + " behind" if written.end > reached else "has everything"
    return replace(
        point,
        at=moment.at,
        exact=moment.exact,
        proven=f"answers, {member.receiver or 'no stream'}",
        problem=paused or ("" if moment.at else "the time of its data is unknown"),
        hint="SELECT pg_wal_replay_resume() on it: a failover refuses a paused standby" if paused else REJOIN,
        unknown=moment.at is None,
        detail=behind if written.end else "the primary does not answer",
    )


def _unfit(member: ClusterMember, written: WrittenWal) -> str:
    if member.problem:
        return f"it does not answer: {member.problem}"
    if not member.in_recovery:
        return "it takes writes itself, and follows no server"
    other = written.system and member.system != written.system
    return f"it belongs to another cluster (system identifier {member.system})" if other else ""


def _fed(env: Environment, written: WrittenWal, reached: int) -> int:
    """The standby's position, or a later one if the receiver's files continue from there."""
    files = local_files(Path(env.wal.directory), written.system) if env.has("wal") else []
    end = reached
    for segment, path in files:
        if segment.start <= end < segment.end:
            whole = path.name == segment.name
            end = segment.end if whole else max(end, segment.start + _written_bytes(path, segment))
    return end


@probe
def read_wal_points(env: Environment, written: WrittenWal, which: Stores) -> tuple[Point, ...]:
    """The points of a base backup and the WAL after it: the newest proven one, and an unproven one if that reaches
    further.

    The receiver's files count for `backups`: a recovery archives them first. They share the fate of the region. If they
    are on the primary's host and the store is not, the point of the store alone is reported too."""
    none = Point("database", "point in time", which, beside=is_beside(env, "database", which, ["cluster", "wal"]))
    try:
        return tuple(_points(env, written, which, none))
    except OpsError as error:
        unknown = not isinstance(error, VerificationFailed)
        return (replace(none, problem=error.message, hint=error.hint, unknown=unknown),)


def _points(env: Environment, written: WrittenWal, which: Stores, none: Point) -> list[Point]:
    store = store_of(env, "cluster", which, patience_seconds=PATIENCE_SECONDS)
    backups = open_all(store, "cluster")[0]
    candidates = own_backups(backups, env.name, written.system)
    if not candidates:
        hint = "run backup-cluster" if which == "backups" else "run replicate-backups"
        return [replace(none, problem=f"there is no base backup of this cluster in {store.where}", hint=hint)]
    written = replace(written, system=cluster_in(candidates[-1]).system)  # a dead primary does not report it
    archive = archive_of(env, which, written.system, patience_seconds=PATIENCE_SECONDS)
    own = archive.listing()
    history = timeline_in_use(env, archive, own, written.system)
    tail = which == "backups" and env.has("wal")
    listings = [(_with_tail(env, own, written.system) if tail else own, none)]
    if tail and not none.beside and not survives_with_tail(env):
        listings = [(listings[0][0], replace(none, beside=True)), (own, none)]
    usable = [one for one in candidates if is_on(history, cluster_in(one))]
    wanted = {one.name: one for one in (*usable[-MOST_BASES:], *[one for one in usable if one.verified][-1:])}
    if not wanted:
        why = f"no base backup is on timeline {history.number} of the archive"
        return [replace(none, problem=why, hint="run backup-cluster")]
    moments = dict[int, Moment]()

    def moment(chain: Chain) -> Moment:  # most end at the same place
        if chain.end not in moments:
            moments[chain.end] = moment_of(env, written, chain.end, chain, archive)
        return moments[chain.end]

    return [
        point
        for listing, kind in listings
        for point in _best([_point(one, backups, listing, history, moment, kind) for one in wanted.values()])
    ]


def survives_with_tail(env: Environment) -> bool:
    """Whether the WAL receiver's files are not lost with the database's host."""
    return env.has("wal") and (env.stores("backups").survives == "server" or not lives_here(env, "database"))


def _best(found: Sequence[Point]) -> list[Point]:
    """The newest proven point, and an unproven one if that reaches further; otherwise why there is none."""
    some = [one for one in found if one.at]
    sure, best = best_of(one for one in some if one.proven), best_of(some)
    if best is None:
        return list(found[-1:])
    return [one for one in (sure, best if sure is None or best.at != sure.at else None) if one]


def _point(
    backup: Backup,
    backups: Sequence[Backup],
    listing: ArchiveListing,
    history: Timeline,
    moment_at: Callable[[Chain], Moment],
    none: Point,
) -> Point:
    content = cluster_in(backup)
    point = replace(none, name=backup.name, proven=backup.verified)
    try:
        whole = lineage(backup, backups)
    except VerificationFailed as error:
        return replace(point, problem=error.message, hint=error.hint)
    chain = chain_from(listing, history, content.stop, content.segment_bytes)
    if not chain.links:
        why = chain.trouble or "none has arrived"
        return replace(point, problem=f"the archive has no WAL after it: {why}", hint=RECEIVER)
    moment, wal = moment_at(chain), len(chain.links) * content.segment_bytes
    return replace(
        point,
        at=moment.at or content.stopped,
        exact=moment.exact,
        bytes=content.bytes + wal,
        restored_bytes=content.bytes * (2 if len(whole) > 1 else 1) + wal,
        problem=chain.trouble,
        hint=GAP if chain.trouble else "",
        detail=f"{chain.text}; goes back to {clock.text(content.stopped, 'minutes')}",
    )


def _with_tail(env: Environment, listing: ArchiveListing, system: int) -> ArchiveListing:
    """Add the receiver's files: the path is the name."""
    if not env.has("wal"):
        return listing
    segments, partials = dict(listing.segments), dict(listing.partials)
    for segment, path in local_files(Path(env.wal.directory), system):
        there = segments.get(segment.name, ())
        if any(not one.damaged for one in there) or (not there and listing.is_pruned(segment.name)):
            continue
        if path.name == segment.name:
            segments[segment.name] = (StoredSegment(str(path), segment.name, "", segment.bytes),)
        elif end := _written_bytes(path, segment):
            tail = StoredSegment(str(path), segment.name, "", end, end)
            partials[segment.name] = tuple(sorted((*partials.get(segment.name, ()), tail), key=lambda one: one.end))
    return ArchiveListing(segments, partials, listing.histories, listing.pruned)


def _written_bytes(path: Path, segment: Segment) -> int:
    """The end of a file's content: zeros follow."""
    try:
        with inside.reading(path) as file:
            for start in range(segment.bytes - CHUNK_BYTES, -1, -CHUNK_BYTES):
                file.seek(start)
                if written := file.read(CHUNK_BYTES).rstrip(b"\0"):
                    return start + len(written)
    except OSError:
        pass  # finished and renamed since the listing
    return 0
