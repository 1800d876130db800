"""The replay of all received WAL on a standby, and its proof (§8.3).

Comparing replayed with received WAL would refuse good standbys: one may have replayed more from the archive than it
received by streaming, and a stream may end in the middle of a record.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql

from blocks.postgres.restore_command import restore_command
from blocks.postgres.server import Postgres, execute
from blocks.postgres.wal import Wal
from runbook.errors import CommandFailed, OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.failover.member import ClusterMember, MemberControl, ask_member
from tasks.failover.segments import Beyond, read_beyond
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.local import find_segments

FEED = "replay everything received on"
PATIENCE_SECONDS = 3.0
"""A standby polls its archive every `wal_retrieve_retry_interval` (5 s; 0.5 s in the lab)."""
FEED_SECONDS = 120.0
RECEIVER = "the WAL receiver"
OLD_PRIMARY = "the old primary's own WAL"


@dataclass(frozen=True)
class WalSource:
    """A place with received WAL. `beyond`: what the standby has not replayed of it; `problem`: why that is unknown;
    `system` and `timeline`: the cluster and newest timeline of its segments."""

    name: str
    directory: str
    beyond: Beyond
    system: int = 0
    timeline: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Fed:
    """The proof: the standby has replayed up to `place` on `timeline`. `received`: the end of its stream."""

    place: int
    received: int
    timeline: int
    sources: tuple[WalSource, ...]


@probe
def read_source(name: str, postgres: Postgres, directory: str, timeline: int, place: int) -> WalSource:
    """See `source_of`. `postgres` has the programs that read it."""
    return source_of(name, postgres, directory, timeline, place)


def source_of(name: str, postgres: Postgres, directory: str, timeline: int, place: int) -> WalSource:
    """Read what a WAL directory on this host has of a timeline after a position."""
    path = Path(directory)
    try:
        segments = find_segments(path)
        newest = segments[-1] if segments else None
        beyond = read_beyond(postgres, path, timeline, place)
    except OpsError as error:
        return WalSource(name, directory, Beyond(place), problem=error.message)
    return WalSource(name, directory, beyond, newest.system if newest else 0, newest.timeline if newest else 0)


@dataclass(frozen=True)
class Feeding:
    """What `standby` replays: the WAL receiver's WAL, and that of `old`, a dead primary on this host, if needed.
    `control`: of a primary that was shut down cleanly, whose last checkpoint must be replayed."""

    standby: Postgres
    wal: Wal | None
    control: MemberControl | None
    old: Postgres | None = None


@action(of=lambda standby: Act(FEED, address(standby)))
def feed(standby: Postgres, wal: Wal | None, control: MemberControl | None, old: Postgres | None) -> Fed:
    """Wait until the standby has replayed all of this WAL (see `Feeding`). If its `restore_command` does not fetch it,
    set one that does, temporarily.

    Raises:
        OpsError: the standby does not reach the end; no server was promoted.
    """
    feeding = Feeding(standby, wal, control, old)
    failpoint("failover: before feeding")
    if old is None:
        with contextlib.suppress(Unreachable):
            return until(lambda: _fed(feeding), what="the replay", seconds=PATIENCE_SECONDS)
    directory = wal.directory if wal else ""
    with contextlib.ExitStack() as stack:
        if old:
            directory = str(stack.enter_context(_staged(feeding, old)))
        stack.enter_context(_restoring(standby, directory))
        try:
            return until(lambda: _fed(feeding), what="the replay", seconds=FEED_SECONDS)
        except Unreachable as error:
            raise OpsError(
                f"{address(standby)} does not replay everything that was received: {error.message}", _hint(old)
            ) from None


def _hint(old: Postgres | None) -> str:
    if old is None:
        return "check its log; copy the missing WAL from the receiver's directory to where its restore_command reads"
    return (
        "check its log, or start the old primary. To accept the loss of what only the old primary has, rename "
        f"{old.data_directory}, then run this again"
    )


def own_wal(old: Postgres, now: ClusterMember) -> WalSource | None:
    """The WAL of a dead primary that the standby `now` has not replayed. None: it is not on this host, is from another
    cluster or timeline, or cannot be decoded from there on."""
    if not is_here(old.host):
        return None
    found = source_of(OLD_PRIMARY, old, str(Path(old.data_directory, "pg_wal")), now.timeline, now.written)
    return None if found.problem or (found.system, found.timeline) != (now.system, now.timeline) else found


@contextlib.contextmanager
def _staged(feeding: Feeding, old: Postgres) -> Iterator[Path]:
    """Copy the old primary's segments that the standby has not fully replayed, next to the standby's data directory and
    readable for its user. Recycled segments are left out: their content does not match their names, and the standby
    would replace its own segments by them."""
    standby, now = feeding.standby, ask_member(feeding.standby)
    found = own_wal(old, now)
    if found is None or any(other.beyond.end > found.beyond.end for other in sources_of(standby, feeding.wal, now)):
        raise OpsError(
            f"{OLD_PRIMARY} in {old.data_directory} does not continue from {lsn_text(now.written)}",
            "run this again: it judges the WAL again",
        )
    data = Path(standby.data_directory)
    staged, owner = data.with_name(f"{data.name}.feed"), data.stat()
    shutil.rmtree(staged, ignore_errors=True)
    inside.make_directory(staged)
    try:
        for one in find_segments(Path(found.directory)):
            if one.timeline == now.timeline and now.written < one.start + one.bytes and one.start < found.beyond.end:
                inside.copy(one.path, staged / one.name)
        inside.give(staged, (owner.st_uid, owner.st_gid))
        failpoint("failover: old primary's WAL staged")
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _fed(feeding: Feeding) -> Fed:
    """Raises Unreachable, with the reason, until the standby has reached the end."""
    postgres, control = feeding.standby, feeding.control
    now = ask_member(postgres)
    if not now.follows:
        raise OpsError(f"{now.address} is no longer a standby: {now.problem or 'it takes writes'}", "run it again")
    if now.receiver == "streaming":
        raise Unreachable(f"{now.address} still receives a stream")
    sources = sources_of(postgres, feeding.wal, now)
    if feeding.old:
        unread = WalSource(OLD_PRIMARY, feeding.old.data_directory, Beyond(now.written), problem="it cannot be decoded")
        sources += (own_wal(feeding.old, now) or unread,)
    for source in sources:
        if source.problem and source.name != RECEIVER:  # the plan has a warning about the receiver's
            raise Unreachable(f"{source.name} cannot be compared: {source.problem}")
        if source.beyond.bytes:
            raise Unreachable(f"{source.name} has {source.beyond.bytes:,} bytes after {lsn_text(now.written)}")
    _require_own(postgres, now)
    if not is_here(postgres.host) and now.written < now.received:
        raise Unreachable(f"it received up to {lsn_text(now.received)} and has replayed up to {lsn_text(now.written)}")
    if control and now.written <= control.checkpoint:
        raise Unreachable(f"the shutdown checkpoint at {lsn_text(control.checkpoint)} is not replayed")
    return Fed(now.written, now.received, now.timeline, sources)


def _require_own(postgres: Postgres, now: ClusterMember) -> None:
    """A standby needs WAL up to its replay position, otherwise its promotion ends in a PANIC: its `restore_command` may
    have replaced a segment by a shorter one."""
    if not is_here(postgres.host):
        return
    pg_wal = Path(postgres.data_directory, "pg_wal")
    there = [one for one in find_segments(pg_wal) if one.timeline == now.timeline and one.start <= now.written]
    newest = max(there, key=lambda one: one.start, default=None)
    if newest is None or newest.start + newest.bytes <= now.written:
        return
    with contextlib.suppress(CommandFailed):  # a file was replaced meanwhile: not judged
        end = read_beyond(postgres, pg_wal, newest.timeline, newest.start).end
        if end < now.written:
            raise OpsError(
                f"{now.address} has replayed up to {lsn_text(now.written)}, but its WAL ends at {lsn_text(end)}: its "
                "restore_command replaced a segment by a shorter one",
                f"do not restart it. Copy a longer {newest.name} (the old primary's) into its pg_wal, correct its "
                "restore_command, then run this again",
            )


def sources_of(postgres: Postgres, wal: Wal | None, now: ClusterMember) -> tuple[WalSource, ...]:
    """What the WAL receiver and the standby's pg_wal have beyond its replay position, as far as they are on this
    host."""
    places = [(RECEIVER, wal.directory)] if wal else []
    if is_here(postgres.host):
        places.append(("the standby's own WAL", str(Path(postgres.data_directory, "pg_wal"))))
    return tuple(source_of(name, postgres, directory, now.timeline, now.written) for name, directory in places)


@contextlib.contextmanager
def _restoring(postgres: Postgres, directory: str) -> Iterator[None]:
    """Set a `restore_command` that reads a directory of this host, incomplete segments included; then reset it."""
    if not directory or not is_here(postgres.host):
        yield
        return
    command = restore_command(directory)
    with postgres.connect() as connection:
        rows = execute(connection, "SELECT setting, sourcefile FROM pg_settings WHERE name = 'restore_command'")
        execute(connection, sql.SQL("ALTER SYSTEM SET restore_command = {}").format(sql.Literal(command)))
        execute(connection, "SELECT pg_reload_conf()")
    try:
        yield
    finally:
        before, file = rows[0]
        kept = sql.SQL("ALTER SYSTEM SET restore_command = {}").format(sql.Literal(before))
        own = str(file or "").endswith("postgresql.auto.conf")
        with postgres.connect() as connection:
            execute(connection, kept if own else "ALTER SYSTEM RESET restore_command")
            execute(connection, "SELECT pg_reload_conf()")
