"""WAL that only the server has: the segments of its `pg_wal` after the end of the archive, shipped as the receiver's.

The server may be dead. Its files are not trusted: a segment must be of the archive's cluster and of the timeline in
use, follow the archive without a gap, and decode. What follows the last readable record is older than its place, and is
cut off.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from blocks.environment import Environment, Stores
from runbook.files import inside
from runbook.kinds import action
from tasks.host.disk import is_here
from tasks.stores.directory import told
from tasks.wal.archive.archive import ArchiveListing
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.ship import Destination, Shipped, ship
from tasks.wal.branch import Branches
from tasks.wal.format.names import Segment, lsn_text
from tasks.wal.format.pages import next_record, record_behind
from tasks.wal.reading.local import Local, find_segments
from tasks.wal.reading.waldump import commits_in


@action(idempotent=True)
def ship_server_wal(env: Environment, which: Stores) -> Shipped:
    """Ship the WAL that only `pg_wal` of a server on this host has into one archive: the primary's, and the standby's,
    which may have confirmed a commit alone.

    Raises:
        OpsError, Unreachable: the directory or the archive cannot be accessed.
    """
    nodes = [env.postgres, *([env.standby] if env.has("standby") else [])]
    here = [node for node in nodes if is_here(node.host)] if env.wal.tool != "pgbackrest" else []
    done = [
        _ship_from(env, which, Path(node.data_directory) / "pg_wal", is_primary=node is env.postgres) for node in here
    ]
    return Shipped(tuple(name for one in done for name in one.put), tuple(name for one in done for name in one.refused))


def _ship_from(env: Environment, which: Stores, directory: Path, *, is_primary: bool) -> Shipped:
    if not directory.is_dir():
        return Shipped()
    local = find_segments(directory)
    if not local:
        return Shipped()
    archive = archive_of(env, which, local[-1].system)
    listing = archive.listing()
    if not (listing.segments or listing.partials):
        return Shipped()
    branches = Branches.found(env, archive, listing, local[-1].system)
    own, followed = local[-1].timeline, branches.in_use()
    if own == followed:
        wanted = _after(local, listing, own)
    elif is_primary and own not in listing.timelines and branches.history(own).left_at(followed):
        wanted = [one for one in local if one.timeline == own]  # it continued there, and no receiver had it
    else:
        wanted = []  # a branch that was left
    if not wanted:
        return Shipped()
    spool = Path(env.backups.spool) / env.name
    with told(spool):
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".wal-", dir=spool) as copies:
            hole = _copy_readable(env, wanted, Path(copies))
            if (history := directory / f"{own:08X}.history").is_file():
                inside.copy(history, Path(copies) / history.name)
            done = ship(Path(copies), Destination(which, partial(archive_of, env, which)))
            return replace(done, refused=(*done.refused, hole)) if hole else done


def _after(local: list[Local], listing: ArchiveListing, timeline: int) -> list[Local]:
    """Those that continue the archive: its last segment and what follows it without a gap."""
    archived = [name for name in (*listing.segments, *listing.partials) if int(name[:8], 16) == timeline]
    own = {one.segment.number: one for one in local if one.timeline == timeline and one.system == local[-1].system}
    if not archived or not own:
        return []
    number = max(Segment.named(name, local[-1].bytes).number for name in archived)
    number += number not in own
    found = []
    while number in own:
        found.append(own[number])
        number += 1
    return found


def _copy_readable(env: Environment, wanted: list[Local], directory: Path) -> str:
    """Copy segments as a receiver has them: finished ones, and the beginning of the last one as `.partial`. Returns why
    that is not all; "" where it is."""
    files = [(one.segment, directory / one.name) for one in wanted]
    for one, (_, path) in reversed(list(zip(wanted, files, strict=True))):
        inside.copy(one.path, path)  # of a running server: it writes on, and finishes one before it begins the next
    ends = list[int]()
    commits_in(env.postgres, files, ends.append)
    reached = next_record(files, ends[0]) if ends else files[-1][0].end
    behind = record_behind(files, reached) if ends else 0
    for segment, path in files:
        if segment.end <= reached:
            continue
        if segment.start < reached:
            content = inside.read(path)[: reached - segment.start]
            inside.write(path.with_name(f"{path.name}.partial"), content.ljust(segment.bytes, b"\0"))
        path.unlink()
    where = wanted[0].path.parent
    return f"{where} does not decode from {lsn_text(reached)} to {lsn_text(behind)}: later WAL exists" * bool(behind)
