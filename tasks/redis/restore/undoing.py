"""Exchange the live data with data that a restore replaced. The directories are recorded before the first rename, so
that a run after a killed one continues with them, and never confuses the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.files import record
from runbook.guard.loss import Loss
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.redis.restore.final_save import LastState
from tasks.redis.restore.survivors import PART
from tasks.redis.restore.swap import STAMP, SUPERSEDED, SwappedRedis, exchange, free_name, superseded_redis
from tasks.redis.server import live_directory, read_progress

UNDO = "put Redis data back"
RECORD = "redis-undo.json"
STARTED = "records/redis-started.json"


@dataclass(frozen=True)
class Undoing:
    """`aside` becomes `live`, whose data is kept as `kept` (None: there was none)."""

    live: Path
    aside: Path
    kept: Path | None

    @property
    def is_exchanged(self) -> bool:
        """Both renames were done."""
        return not self.aside.exists() and self.live.exists() and (self.kept is None or self.kept.exists())


@dataclass(frozen=True)
class RestoredRun:
    """The server process that was started after the swap which replaced the data `kept`."""

    kept: str
    run_id: str


def note_started(block: Redis, reports: Path, kept: Path | None) -> None:
    """Record the process that serves since `kept` was replaced: only its own counters tell how much was written since.

    Raises:
        Unreachable, OpsError: it does not answer.
    """
    if kept:
        record.write(reports / STARTED, RestoredRun(kept.name, read_progress(block).run_id))


def loss_of_undo(block: Redis, aside: Path, last: LastState | None, reports: Path, planned: Loss | None = None) -> Loss:
    """The writes since `aside` was replaced, which its undo discards. `last`: the live server's state; `planned`: what
    the plan counted.

    The count is known only while the process runs that was started after that swap.
    """
    moment = datetime.strptime(aside.name.rpartition(SUPERSEDED)[2], STAMP).replace(tzinfo=UTC)
    run = record.read(reports / STARTED, RestoredRun, "delete it: the undo then counts no writes")
    is_same = last and run and (run.kept, run.run_id) == (aside.name, last.run_id)
    has_newer = any(path.name > aside.name for path in superseded_redis(block))
    if not (last and is_same) or last.writes is None or has_newer:
        return Loss.everything_since(PART, moment, unit="write")
    counted = planned.count if planned and planned.count is not None else last.writes
    return Loss(PART, last.writes, "write", later=max(last.writes - counted, 0))


def find_undoing(block: Redis, reports: Path) -> Undoing | None:
    """The record of a killed undo; None: there is none, or a restore came after it.

    Raises:
        OpsError: the record cannot be read.
    """
    found = record.read(reports / RECORD, Undoing, "delete it, and name the data to restore in `kept`")
    if found is None or found.live != live_directory(block):
        return None
    newest = max((path.name for path in superseded_redis(block)), default="")
    is_of_now = newest <= (found.kept or found.aside).name and (found.aside.exists() or found.is_exchanged)
    return found if is_of_now else None


def end_undoing(reports: Path) -> None:
    """Delete the record: the undo is complete, or aborted without a change."""
    (reports / RECORD).unlink(missing_ok=True)


@action(of=lambda aside: Act(UNDO, str(aside)))
def swap_back(block: Redis, aside: Path, reports: Path) -> SwappedRedis:
    """Rename a replaced directory to the live name; the current one is kept. Renames of a killed run are not repeated.

    Raises:
        OpsError: the server has not exited, or a rename failed (then the live directory is back).
    """
    undoing = _noted(block, aside, reports)
    if undoing.is_exchanged:
        return SwappedRedis(undoing.live, undoing.kept)
    return exchange(block, aside, undoing.kept)


def swap_again(swapped: SwappedRedis, aside: Path) -> None:
    """Undo both renames: the earlier data is live again.

    Raises:
        OpsError: a rename failed.
    """
    try:
        swapped.live.rename(aside)
        if swapped.kept:
            swapped.kept.rename(swapped.live)
    except OSError as error:
        hint = f"rename {swapped.kept} to {swapped.live} by hand, and start the service"
        raise OpsError(f"{error.filename} cannot be renamed: {error.strerror}", hint) from None


def _noted(block: Redis, aside: Path, reports: Path) -> Undoing:
    found, live = find_undoing(block, reports), live_directory(block)
    if found and found.aside == aside and (found.is_exchanged or not live.exists()):
        return found
    undoing = Undoing(live, aside, free_name(live) if live.exists() else None)
    record.write(reports / RECORD, undoing)
    return undoing
