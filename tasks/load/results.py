"""What Locust measured, by endpoint (its JSON: the CSV files that it writes meanwhile lack the last second)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, excerpt

STATS, FAILURES = "load.json", "load_failures.csv"
COLUMNS = ("endpoint", "requests", "failed", "error ratio", "p50 s", "p95 s", "p99 s", "longest s", "requests/s")


@dataclass(frozen=True)
class Endpoint:
    """Times in seconds, of all requests, the failed ones too."""

    name: str
    requests: int
    failed: int
    p50: float
    p95: float
    p99: float
    longest: float
    per_second: float

    @property
    def error_ratio(self) -> float:
        """Of its requests."""
        return self.failed / self.requests if self.requests else 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """For a table of COLUMNS."""
        times = (f"{seconds:.3f}" for seconds in (self.p50, self.p95, self.p99, self.longest))
        return (
            self.name,
            str(self.requests),
            str(self.failed),
            f"{self.error_ratio:.4f}",
            *times,
            f"{self.per_second:.2f}",
        )


@dataclass(frozen=True)
class Results:
    """Each endpoint, all of them together, and why requests failed: (endpoint, error, how often)."""

    endpoints: tuple[Endpoint, ...]
    whole: Endpoint
    failures: tuple[tuple[str, str, str], ...]

    def of(self, name: str) -> Endpoint | None:
        """None: nobody asked it."""
        return next((one for one in self.endpoints if one.name == name), None)


def read_results(directory: Path) -> Results:
    """
    Raises:
        OpsError: Locust wrote none, or something else.
    """
    path = directory / STATS
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OpsError(f"the load left no results: {error.strerror}", f"see {directory / 'locust.log'}") from None
    try:
        found = json.loads(text)
        times = [{int(ms): int(n) for ms, n in one["response_times"].items()} for one in found]
        seconds = _seconds(found)
        endpoints = tuple(
            _endpoint(str(one["name"]), times[at], int(one["num_failures"]), seconds) for at, one in enumerate(found)
        )
        whole = _endpoint("全体", _added(times), sum(one.failed for one in endpoints), seconds)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OpsError(f"the load's results cannot be read: {excerpt(text)}", f"see {directory}") from None
    if not whole.requests:
        raise OpsError("not one request was sent", f"see {directory / 'locust.log'}")
    return Results(tuple(sorted(endpoints, key=lambda one: one.name)), whole, _failures(directory / FAILURES))


def write_results(results: Results, path: Path) -> None:
    """The table as CSV: the evidence that spreadsheets read."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(one.row for one in (*results.endpoints, results.whole))])


def _seconds(found: Sequence[Mapping[str, float]]) -> float:
    """From the first request to the last, of all endpoints."""
    begun = min((one["start_time"] for one in found), default=0.0)
    return max(max((one["last_request_timestamp"] or begun for one in found), default=0.0) - begun, 1.0)


def _endpoint(name: str, times: Mapping[int, int], failed: int, seconds: float) -> Endpoint:
    """`times`: milliseconds → how many requests took them (Locust rounds to two digits above 100)."""
    count = sum(times.values())
    p50, p95, p99, longest = (_percentile(times, share) for share in (0.5, 0.95, 0.99, 1.0))
    return Endpoint(name, count, failed, p50, p95, p99, longest, count / seconds)


def _percentile(times: Mapping[int, int], share: float) -> float:
    wanted, seen = math.ceil(sum(times.values()) * share), 0
    for milliseconds, count in sorted(times.items()):
        seen += count
        if seen >= wanted:
            return milliseconds / 1000
    return 0.0


def _added(times: Sequence[Mapping[int, int]]) -> dict[int, int]:
    whole = dict[int, int]()
    for one in times:
        for milliseconds, count in one.items():
            whole[milliseconds] = whole.get(milliseconds, 0) + count
    return whole


def _failures(path: Path) -> tuple[tuple[str, str, str], ...]:
    """Most frequent first; they may lack the last second."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["Name"], excerpt(row["Error"], 200), row["Occurrences"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return ()
    return tuple(sorted(rows, key=lambda row: -int(row[2]) if row[2].isdigit() else 0))
