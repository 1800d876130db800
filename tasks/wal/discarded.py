"""The commits of the timeline in use that another history lacks: what a return to that history gives up."""

from __future__ import annotations

import tempfile
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.wal.branch import read_history
from tasks.wal.format.names import Timeline
from tasks.wal.reading.supply import Supply, read_supply, runs_of
from tasks.wal.reading.waldump import Commit, at_the_end, commits_in


@probe
def read_discarded(env: Environment, system: int, live: int, kept: int, end: int) -> tuple[Commit, ...]:
    """Read every commit of timeline `live` after the place where it parted from timeline `kept`; of the same one, after
    `end`, at least up to which the kept server wrote.

    Raises:
        OpsError: the WAL from there on, or a history, cannot be read completely.
    """
    histories = (read_history(env, "backups", system, number) for number in (live, kept))
    since = end if live == kept else parted_at(*histories)
    supply = read_supply(env, "backups", system, live)
    first, found = since // supply.segment_bytes, list[Commit]()
    if missing := supply.missing(first, max([first, *supply.numbers])):
        raise OpsError(f"{missing[0]} is missing", "start the WAL receiver and the archiver, and check their logs")
    with tempfile.TemporaryDirectory(prefix="ops-wal-") as directory:
        for batch in runs_of([number for number in supply.numbers if number >= first]):
            found += _commits(env, supply, batch, Path(directory))
    return tuple({commit.lsn: commit for commit in found if commit.lsn >= since}.values())


def parted_at(one: Timeline, other: Timeline) -> int:
    """Return the LSN up to which two histories are the same.

    Raises:
        OpsError: they have no timeline in common.
    """
    common = [*(number for number, _ in one.ancestors), one.number]
    ends = [min(left, one.left_at(number) or 0) for number in common if (left := other.left_at(number))]
    if not ends:
        raise OpsError(
            f"timelines {one.number} and {other.number} have no history in common",
            "they are of two clusters: check [postgres] data_directory",
        )
    return max(ends)


def _commits(env: Environment, supply: Supply, batch: list[int], directory: Path) -> list[Commit]:
    pieces = [supply.pieces[number] for number in batch]
    files = [(piece.segment, supply.bring(piece, directory)) for piece in pieces]
    found = commits_in(env.postgres, files, at_the_end(files))
    for _, path in files[:-1]:  # the next batch begins with the last one
        path.unlink(missing_ok=True)
    return found
