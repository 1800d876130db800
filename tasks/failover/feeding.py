"""A standby brought to the end of what was received anywhere, and proven to be there (§8.3).

"Replayed = received" would refuse good ones: it may have got more from the archive than it was streamed, and what was
streamed may end in the middle of a record.
"""

from __future__ import annotations

import contextlib
import os
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
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.failover.member import Control, Member, ask_member
from tasks.failover.segments import Beyond, read_beyond
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.local import find_segments

FEED = "replay everything received on"
PATIENCE_SECONDS = 3.0
"""A standby asks its own archive every `wal_retrieve_retry_interval` (5 s, the lab 0.5 s)."""
FEED_SECONDS = 120.0
RECEIVER = "the WAL receiver"
OLD_PRIMARY = "the old primary's own WAL"


@dataclass(frozen=True)
class Source:
    """One place where WAL was received, and what it holds that the standby has not replayed; `problem` where that is
    not known. `segments` of which cluster and newest timeline."""

    name: str
    directory: str
    beyond: Beyond
    system: int = 0
    timeline: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Fed:
    """The proof: the standby has replayed to `place`, on `timeline`; `received` is what it was streamed."""

    place: int
    received: int
    timeline: int
    sources: tuple[Source, ...]


@probe
def read_source(name: str, postgres: Postgres, directory: str, timeline: int, place: int) -> Source:
    """See `source_of`. `postgres` has the programs that read it."""
    return source_of(name, postgres, directory, timeline, place)


def source_of(name: str, postgres: Postgres, directory: str, timeline: int, place: int) -> Source:
    """What a directory of WAL on this host holds of a timeline after a position."""
    path = Path(directory)
    try:
        segments = find_segments(path)
        newest = segments[-1] if segments else None
        beyond = read_beyond(postgres, path, timeline, place)
    except OpsError as error:
        return Source(name, directory, Beyond(place), problem=error.message)
    return Source(name, directory, beyond, newest.system if newest else 0, newest.timeline if newest else 0)


@dataclass(frozen=True)
class Feeding:
    """What is fed to `standby`: the receiver's WAL, where there is one, and that of `old`, a dead primary on this host,
    where it is needed. `control`: of a primary that was shut down in good order; its last checkpoint must have been
    replayed."""

    standby: Postgres
    wal: Wal | None
    control: Control | None
    old: Postgres | None = None


@action
def feed(permit: Permit, feeding: Feeding) -> Fed:
    """Wait until the standby has replayed all WAL that is named; where its own `restore_command` does not bring it, it
    is given one that does, for the time of this.

    Raises:
        OpsError: it does not get there; no server was promoted.
    """
    standby, old = feeding.standby, feeding.old
    permit.require(FEED, address(standby))
    failpoint("failover: before feeding")
    if old is None:
        with contextlib.suppress(Unreachable):
            return until(lambda: _fed(feeding), what="the replay", seconds=PATIENCE_SECONDS)
    directory = feeding.wal.directory if feeding.wal else ""
    with contextlib.ExitStack() as stack:
        if old:
            directory = str(stack.enter_context(_staged(feeding, old)))
        stack.enter_context(_restoring(standby, directory))
        try:
            return until(lambda: _fed(feeding), what="the replay", seconds=FEED_SECONDS)
        except Unreachable as error:
            raise OpsError(
                f"{address(standby)} does not replay everything that was received: {error.message}", _otherwise(old)
            ) from None


def _otherwise(old: Postgres | None) -> str:
    if old is None:
        return "check its log; copy what it misses from the receiver's directory to where its restore_command reads"
    return (
        "check its log; or start the old primary. To lose what only the old primary has: rename "
        f"{old.data_directory} aside, and run this again"
    )


def own_wal(old: Postgres, now: Member) -> Source | None:
    """What a dead primary's own directory of WAL has beyond what the standby `now` has replayed; None where that is not
    on this host, is of another cluster or timeline, or cannot be decoded from there on."""
    if not is_here(old.host):
        return None
    found = source_of(OLD_PRIMARY, old, str(Path(old.data_directory, "pg_wal")), now.timeline, now.written)
    return None if found.problem or (found.system, found.timeline) != (now.system, now.timeline) else found


@contextlib.contextmanager
def _staged(feeding: Feeding, old: Postgres) -> Iterator[Path]:
    """Copies of the old primary's segments that the standby has not replayed to their end, next to the standby's data
    directory and readable for its user. Segments that were kept for later use are not among them: their names are ahead
    of their content, and the standby would put them in the place of its own."""
    standby, now = feeding.standby, ask_member(feeding.standby)
    found = own_wal(old, now)
    if found is None or any(other.beyond.end > found.beyond.end for other in sources_of(standby, feeding.wal, now)):
        raise OpsError(
            f"{OLD_PRIMARY} in {old.data_directory} does not go on from {lsn_text(now.written)}",
            "run this again: it judges anew what can be fed",
        )
    data = Path(standby.data_directory)
    staged, owner = data.with_name(f"{data.name}.feed"), data.stat()
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(mode=0o700)
    try:
        for one in find_segments(Path(found.directory)):
            if one.timeline == now.timeline and now.written < one.start + one.bytes and one.start < found.beyond.end:
                shutil.copy(one.path, staged / one.name)
        if os.geteuid() == 0:
            for path in (*staged.iterdir(), staged):
                os.chown(path, owner.st_uid, owner.st_gid)
        failpoint("failover: old primary's WAL staged")
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _fed(feeding: Feeding) -> Fed:
    """Raises Unreachable, with the reason, while it has not come to the end."""
    postgres, control = feeding.standby, feeding.control
    now = ask_member(postgres)
    if not now.follows:
        raise OpsError(f"{now.address} is no standby any more: {now.problem or 'it takes writes'}", "run it again")
    if now.receiver == "streaming":
        raise Unreachable(f"{now.address} is still being streamed to")
    sources = sources_of(postgres, feeding.wal, now)
    if feeding.old:
        unread = Source(OLD_PRIMARY, feeding.old.data_directory, Beyond(now.written), problem="it cannot be decoded")
        sources += (own_wal(feeding.old, now) or unread,)
    for source in sources:
        if source.problem and source.name != RECEIVER:  # of the receiver's the plan has warned
            raise Unreachable(f"{source.name} cannot be compared: {source.problem}")
        if source.beyond.bytes:
            raise Unreachable(f"{source.name} has {source.beyond.bytes:,} bytes more than {lsn_text(now.written)}")
    _require_own(postgres, now)
    if not is_here(postgres.host) and now.written < now.received:
        raise Unreachable(f"it was streamed {lsn_text(now.received)} and has replayed {lsn_text(now.written)}")
    if control and now.written <= control.checkpoint:
        raise Unreachable(f"the shutdown checkpoint at {lsn_text(control.checkpoint)} is not replayed")
    return Fed(now.written, now.received, now.timeline, sources)


def _require_own(postgres: Postgres, now: Member) -> None:
    """A standby needs its own WAL up to what it has replayed, else its promotion ends in a PANIC: a `restore_command`
    may have put a shorter segment in the place of its own."""
    if not is_here(postgres.host):
        return
    pg_wal = Path(postgres.data_directory, "pg_wal")
    there = [one for one in find_segments(pg_wal) if one.timeline == now.timeline and one.start <= now.written]
    newest = max(there, key=lambda one: one.start, default=None)
    if newest is None or newest.start + newest.bytes <= now.written:
        return
    with contextlib.suppress(CommandFailed):  # a file that was replaced meanwhile: what cannot be told is not held back
        end = read_beyond(postgres, pg_wal, newest.timeline, newest.start).end
        if end < now.written:
            raise OpsError(
                f"{now.address} has replayed {lsn_text(now.written)}, and its own WAL ends at {lsn_text(end)}: its "
                "archive has put a shorter segment in the place of its own",
                f"do not restart it; put a copy of {newest.name} that goes on further (the old primary's) into its "
                "pg_wal, correct its restore_command, and run it again",
            )


def sources_of(postgres: Postgres, wal: Wal | None, now: Member) -> tuple[Source, ...]:
    """What the receiver, and the standby's own directory of WAL, hold beyond what it has replayed, as far as they are
    on this host."""
    places = [(RECEIVER, wal.directory)] if wal else []
    if is_here(postgres.host):
        places.append(("the standby's own WAL", str(Path(postgres.data_directory, "pg_wal"))))
    return tuple(source_of(name, postgres, directory, now.timeline, now.written) for name, directory in places)


@contextlib.contextmanager
def _restoring(postgres: Postgres, directory: str) -> Iterator[None]:
    """Its `restore_command` reads a directory of this host, also a segment that is not whole; then as it was."""
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
