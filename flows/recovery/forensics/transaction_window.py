"""The stretch of WAL in which a transaction is looked for, called with the open report. Nothing is changed."""

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
from runbook.errors import OpsError, VerificationFailed
from runbook.kinds import probe
from runbook.progress import Done, progress
from runbook.report import Report, Status
from runbook.units import size
from tasks.backups.catalogue import open_all
from tasks.cluster.content import cluster_in
from tasks.cluster.target import Target, parse_target
from tasks.stores.directory import told
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.supply import Supply, clear, first_at, runs_of, system_here
from tasks.wal.reading.transactions import End
from tasks.wal.reading.waldump import lines_in

DEFAULT = timedelta(hours=24)
WORKERS = 8
KEPT_SEGMENTS = 64
MOST_NAMED = 5


@dataclass(frozen=True)
class Window:
    """Segments that are there, from `first` to `last`; what the operator means by the two edges; where they are brought
    to be read; why some could not be (by name, as it is found)."""

    supply: Supply
    numbers: tuple[int, ...]
    missing: tuple[str, ...]
    since: Target
    until: Target
    directory: Path
    damaged: dict[str, str] = field(default_factory=dict)

    def holds(self, end: End) -> bool:
        """Whether a transaction was committed in it."""
        after = end.lsn >= self.since.lsn if self.since.by == "lsn" else end.at >= self.since.at
        before = end.lsn < self.until.lsn if self.until.by == "lsn" else end.at <= self.until.at  # latest: never
        return after and before


def parse_edges(since: str, until: str, env: Environment) -> tuple[Target, Target]:
    """Both edges, each a time or an LSN. Nothing: until now, for 24 hours.

    Raises:
        OpsError: one is neither.
    """
    end = _edge(until, env) if until.strip() else Target("latest")
    if since.strip():
        return _edge(since, env), end
    newest = end.at if end.by == "time" else datetime.now(UTC)
    return Target("time", at=newest - DEFAULT), end


def _edge(text: str, env: Environment) -> Target:
    return parse_target("lsn" if "/" in text and ":" not in text else "time", text, env.zone)


def find_system(env: Environment, source: Stores) -> int:
    """The cluster that is live, or whose WAL came here last, or was backed up last.

    Raises:
        OpsError: nothing tells which it is.
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
            "nothing tells which cluster is meant: the server does not answer, there is no WAL here and no base backup",
            "look at [postgres], [wal] and [backups] cluster",
        )
    return cluster_in(max(own, key=lambda one: one.manifest.taken)).system


@contextlib.contextmanager
def room(env: Environment) -> Iterator[Path]:
    """A directory for what is brought, on the disk that is meant for that."""
    spool = Path(env.backups.spool) / env.name
    with told(spool):
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".wal-", dir=spool) as directory:
        yield Path(directory)


@probe
def choose_window(env: Environment, supply: Supply, edges: tuple[Target, Target], most: int, directory: Path) -> Window:
    """The segments between the two edges, one more on each side: commit times are not quite in the order of WAL.

    Raises:
        OpsError: there are none, or more than `most`.
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
        raise OpsError(
            "there is no WAL in that window",
            f"there is from {_at(supply, numbers[0])} to "
            f"{_at(supply, numbers[-1] + 1)}: choose since and until within that",
        )
    if len(inside) > most:
        bytes_ = len(inside) * supply.segment_bytes
        raise OpsError(
            f"the window has {len(inside)} segments of WAL ({size(bytes_)}), more than {most}",
            "narrow since and until, or raise most_segments",
        )
    missing = supply.missing(max(first, min(numbers[0], inside[0])), min(last, numbers[-1]))
    return Window(supply, inside, tuple(missing), since, until, directory)


def _at(supply: Supply, number: int) -> str:
    return lsn_text(number * supply.segment_bytes)


def read_window(
    env: Environment, window: Window, managers: Sequence[str], read: Callable[[Iterable[str]], None], what: str
) -> None:
    """Have `read` go through what pg_waldump prints of the whole window, batch by batch. What cannot be had, or not be
    read, is noted in the window."""
    done, keep_all = 0, len(window.numbers) <= KEPT_SEGMENTS
    with progress(lambda: Done(f"{what}: {done} of {len(window.numbers)} segments", done / len(window.numbers))):
        for batch in runs_of(window.numbers):
            there = _bring(window, batch)
            for run in runs_of(there, window.supply.torn):
                _read_run(env, window, run, managers, read)
            done += len(batch)
            if not keep_all:
                clear(window.directory, [window.supply.pieces[number].segment.name for number in there[-1:]])


def _read_run(
    env: Environment, window: Window, run: Sequence[int], managers: Sequence[str], read: Callable[[Iterable[str]], None]
) -> None:
    """One batch. Where it ends before its last segment (one of them is not whole), it goes on behind that one."""
    while run:
        pieces = [window.supply.pieces[number] for number in run]
        files, ends = [(one.segment, window.directory / one.segment.name) for one in pieces], list[int]()
        read(lines_in(env.postgres, files, managers, ends.append))
        last = min((lsn // window.supply.segment_bytes for lsn in ends), default=run[-1])
        if last >= run[-1]:
            return
        torn = window.supply.pieces[last]
        if last + 1 < max(window.supply.pieces):  # else the newest one has only just begun
            why = f"{torn.where}: nothing can be read behind {lsn_text(ends[0])}"
            window.damaged[f"the end of {torn.segment.name}"] = why
        run = [number for number in run if number > last]


def _bring(window: Window, batch: Sequence[int]) -> list[int]:
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


def judge_window(report: Report, window: Window, *, found: bool) -> None:
    """Whether all of it was read. Where nothing was found, what was not read may hold it: that is no answer."""
    names = [*window.missing, *window.damaged]
    told_names = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
    why = f" ({next(iter(window.damaged.values()))})" if window.damaged else ""
    report.require(
        "WAL of the window without a gap",
        not names,
        "what was committed there is not told: look for these segments in the second store (source=copies), the "
        "receiver's directory and on the standby, put them into [wal] directory, and launch this again",
        value=f"missing: {told_names}{why}" if names else f"{len(window.numbers)} segments, every one was read",
        worst=Status.WARN if found else Status.CRITICAL,
    )
    for why in window.supply.silent:
        report.warn("a place of WAL", "what is only there was not read; have this user read it", value=why)


def tell_window(report: Report, window: Window) -> None:
    """What was looked through."""
    supply = window.supply
    places = sorted({supply.pieces[number].where for number in window.numbers})
    report.fact(
        "WAL",
        f"LSN {_at(supply, window.numbers[0])} to {_at(supply, window.numbers[-1] + 1)} on timeline "
        f"{supply.timeline.number}, {len(window.numbers)} segments, from {', '.join(places)}",
    )
    report.fact("window", f"{_edge_told(window.since)} to {_edge_told(window.until)}")
    report.fact("cluster", f"system identifier {supply.system}")


def _edge_told(edge: Target) -> str:
    if edge.by == "latest":
        return "now"
    return lsn_text(edge.lsn) if edge.by == "lsn" else f"{edge.at:%Y-%m-%d %H:%M:%S UTC}"


def judge_begin(report: Report, window: Window, first: End | None, *, asked: bool) -> None:
    """Whether there is WAL as far back as was asked for."""
    numbers = window.supply.numbers
    late = first is not None and window.since.by == "time" and first.at > window.since.at
    if asked and late and window.numbers[0] == numbers[0] and numbers[0] > 1:
        assert first
        report.warn(
            "WAL as far back as the window",
            "older WAL may be in the second store: source=copies",
            value=f"the oldest commit that could be read is of {first.at:%Y-%m-%d %H:%M:%S UTC}",
            expected=_edge_told(window.since),
        )
