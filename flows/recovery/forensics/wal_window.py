"""The stretch of WAL that find-transaction reads. Nothing is changed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from flows.store import store_for
from runbook import clock
from runbook.errors import OpsError, VerificationFailed
from runbook.kinds import probe
from runbook.progress import WorkDone, progress
from runbook.report import Report, Status
from tasks.backups.catalogue import open_all
from tasks.cluster.content import cluster_in
from tasks.cluster.target import RecoveryTarget, parse_target
from tasks.stores.directory import told
from tasks.wal.format.names import lsn_text
from tasks.wal.format.pages import next_record, record_behind
from tasks.wal.reading.supply import Supply, clear, first_at, runs_of, system_here
from tasks.wal.reading.transactions import End
from tasks.wal.reading.waldump import lines_in

DEFAULT = timedelta(hours=24)
WORKERS = 8
KEPT_SEGMENTS = 64
MOST_NAMED = 5


@dataclass(frozen=True)
class Window:
    """Segments of WAL in order, and the operator's two edges. `damaged`: segments that could not be read, and why."""

    supply: Supply
    numbers: tuple[int, ...]
    missing: tuple[str, ...]
    since: RecoveryTarget
    until: RecoveryTarget
    directory: Path
    damaged: dict[str, str] = field(default_factory=dict)

    def holds(self, end: End) -> bool:
        """Whether a transaction was committed between the edges."""
        after = end.lsn >= self.since.lsn if self.since.by == "lsn" else end.at >= self.since.at
        before = end.lsn < self.until.lsn if self.until.by == "lsn" else end.at <= self.until.at  # latest: never
        return after and before

    @property
    def first_lsn(self) -> str:
        """Where the first segment begins."""
        return self.lsn_of(self.numbers[0])

    def lsn_of(self, number: int) -> str:
        """Where a segment begins."""
        return lsn_text(number * self.supply.segment_bytes)


def parse_edges(since: str, until: str, env: Environment) -> tuple[RecoveryTarget, RecoveryTarget]:
    """Both edges, each a time or an LSN. The default is the last 24 hours.

    Raises:
        OpsError: an edge is neither.
    """
    end = _parse_edge(until, env) if until.strip() else RecoveryTarget("latest")
    if since.strip():
        return _parse_edge(since, env), end
    newest = end.at if end.by == "time" else datetime.now(UTC)
    return RecoveryTarget("time", at=newest - DEFAULT), end


def _parse_edge(text: str, env: Environment) -> RecoveryTarget:
    return parse_target("lsn" if "/" in text and ":" not in text else "time", text, env.zone)


def find_system(env: Environment, source: Stores) -> int:
    """The system identifier of the live cluster, else of the newest WAL on this host, else of the newest base backup.

    Raises:
        OpsError: none of them is available.
    """
    live = nodes.ask(env.postgres)
    if live:
        return live.system
    with contextlib.suppress(OpsError):
        if system := system_here(env):
            return system
    backups, _ = open_all(store_for(env, "cluster", source), "cluster")
    own = [one for one in backups if one.manifest.environment == env.name]
    if not own:
        raise OpsError(
            "the cluster is unknown: the server does not answer, and there is no WAL on this host and no base backup",
            "check [postgres], [wal] and [backups] cluster",
        )
    return cluster_in(max(own, key=lambda one: one.manifest.taken)).system


@contextlib.contextmanager
def scratch_directory(env: Environment) -> Iterator[Path]:
    """A directory for copies of segments, on the disk of the backup spool."""
    spool = Path(env.backups.spool) / env.name
    with told(spool):
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".wal-", dir=spool) as directory:
        yield Path(directory)


@probe
def choose_window(
    env: Environment, supply: Supply, edges: tuple[RecoveryTarget, RecoveryTarget], directory: Path
) -> Window:
    """The segments between the two edges and one more on each side: commit times are not exactly in the order of WAL.

    Raises:
        OpsError: there are none.
    """
    since, until = edges
    numbers = supply.numbers
    if since.by == "lsn":
        first = since.lsn // supply.segment_bytes
        first -= first - 1 in supply.pieces
    else:
        first = numbers[max(first_at(env.postgres, supply, since.at, directory) - 1, 0)]
    if until.by == "latest":
        last = numbers[-1]
    elif until.by == "lsn":
        last = max(until.lsn - 1, 0) // supply.segment_bytes
    else:
        place = first_at(env.postgres, supply, until.at + timedelta(microseconds=1), directory)
        last = numbers[min(place + 1, len(numbers) - 1)]
    inside = tuple(number for number in numbers if first <= number <= last)
    if not inside:
        begin, end = (lsn_text(number * supply.segment_bytes) for number in (numbers[0], numbers[-1] + 1))
        raise OpsError("there is no WAL in that window", f"choose since and until within LSN {begin} to {end}")
    missing = supply.missing(max(first, min(numbers[0], inside[0])), min(last, numbers[-1]))
    return Window(supply, inside, tuple(missing), since, until, directory)


def read_window(
    env: Environment, window: Window, managers: Sequence[str], read: Callable[[Iterable[str]], None], what: str
) -> None:
    """Pass what pg_waldump prints of the whole window to `read`, batch by batch. Segments that cannot be copied or read
    are added to `window.damaged`."""
    done, keep_all = 0, len(window.numbers) <= KEPT_SEGMENTS
    with progress(lambda: WorkDone(f"{what}: {done} of {len(window.numbers)} segments", done / len(window.numbers))):
        for batch in runs_of(window.numbers):
            there = _copy_segments(window, batch)
            for run in runs_of(there, window.supply.torn):
                _read_run(env, window, run, managers, read)
            done += len(batch)
            if not keep_all:
                clear(window.directory, [window.supply.pieces[number].segment.name for number in there[-1:]])


def _read_run(
    env: Environment, window: Window, run: Sequence[int], managers: Sequence[str], read: Callable[[Iterable[str]], None]
) -> None:
    """One batch. If reading ends within a segment, it continues with the next one. That is damage, unless it is the end
    of the WAL: there no record follows."""
    while run:
        pieces = [window.supply.pieces[number] for number in run]
        files, ends = [(one.segment, window.directory / one.segment.name) for one in pieces], list[int]()
        read(lines_in(env.postgres, files, managers, stopped=ends.append))
        if not ends:
            return
        last = ends[0] // window.supply.segment_bytes
        # The newest segment may have only just begun.
        if last + 1 < max(window.supply.pieces) or record_behind(files, next_record(files, ends[0])):
            torn = window.supply.pieces[last]
            why = f"{torn.where}: the WAL after {lsn_text(ends[0])} cannot be read"
            window.damaged[f"the end of {torn.segment.name}"] = why
        run = [number for number in run if number > last]


def _copy_segments(window: Window, batch: Sequence[int]) -> list[int]:
    def one(number: int) -> bool:
        piece = window.supply.pieces[number]
        try:
            window.supply.bring(piece, window.directory)
        except VerificationFailed as error:
            window.damaged[piece.segment.name] = f"{piece.where}: {error.message}"
            return False
        return True

    with ThreadPoolExecutor(WORKERS) as pool:
        return [number for number, there in zip(batch, pool.map(one, batch), strict=True) if there]


def report_window(report: Report, window: Window) -> None:
    """Which WAL is read."""
    supply = window.supply
    places = sorted({supply.pieces[number].where for number in window.numbers})
    report.fact(
        "WAL",
        f"LSN {window.first_lsn} to {window.lsn_of(window.numbers[-1] + 1)} on timeline {supply.timeline.number}, "
        f"{len(window.numbers)} segments, from {', '.join(places)}",
    )
    report.fact("window", f"{_edge_text(window.since)} to {_edge_text(window.until)}")
    report.fact("cluster", f"system identifier {supply.system}")


def judge_gaps(report: Report, window: Window, *, found: bool) -> None:
    """Whether all of the window was read. If nothing was found, a gap is CRITICAL: it may hide the transaction."""
    names = [*window.missing, *window.damaged]
    named = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
    why = f" ({next(iter(window.damaged.values()))})" if window.damaged else ""
    report.require(
        "WAL without a gap",
        not names,
        "copy these segments from the replica store, the receiver's directory or the standby to [wal] directory, "
        "or read the replica store (source=copies); then run it again",
        value=f"missing: {named}{why}; commits in them are not listed"
        if names
        else f"{len(window.numbers)} segments read",
        worst=Status.WARN if found else Status.CRITICAL,
    )
    for why in window.supply.silent:
        report.warn("a source of WAL", "give this user the right to read it, then run it again", value=why)


def judge_begin(report: Report, window: Window, first: End | None) -> None:
    """Whether there is WAL as old as the beginning that the operator named."""
    oldest = window.supply.numbers[0]
    if first and window.since.by == "time" and first.at > window.since.at and window.numbers[0] == oldest > 1:
        report.warn(
            "WAL from the beginning of the window",
            "search the replica store, which may have older WAL: source=copies",
            value=f"the oldest commit found is of {clock.text(first.at)}",
            expected=_edge_text(window.since),
        )


def _edge_text(edge: RecoveryTarget) -> str:
    if edge.by == "latest":
        return "now"
    return lsn_text(edge.lsn) if edge.by == "lsn" else f"{clock.text(edge.at)}"
