"""Locust's results by endpoint, from its JSON: its CSV files lack the last second."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runbook.errors import OpsError, excerpt

if TYPE_CHECKING:
    from pandas import DataFrame

STATS, FAILURES = "load.json", "load_failures.csv"
COLUMNS = ("endpoint", "requests", "failed", "error ratio", "p50 s", "p95 s", "p99 s", "longest s", "requests/s")


@dataclass(frozen=True)
class EndpointResult:
    """One endpoint. Times in seconds, of all requests, also failed ones."""

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
        """The failed share of its requests."""
        return self.failed / self.requests if self.requests else 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """A row of a table with COLUMNS."""
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
    """The endpoints, all requests together (`whole`), and failures: (endpoint, error, count)."""

    endpoints: tuple[EndpointResult, ...]
    whole: EndpointResult
    failures: tuple[tuple[str, str, str], ...]

    def of(self, name: str) -> EndpointResult | None:
        """The endpoint of that name; None: it got no request."""
        return next((one for one in self.endpoints if one.name == name), None)


def read_results(directory: Path) -> Results:
    """Read Locust's results.

    Raises:
        OpsError: the file is missing, unreadable, or has no request.
    """
    path = directory / STATS
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OpsError(f"the load left no results: {error.strerror}", f"see {directory / 'locust.log'}") from None
    try:
        found = json.loads(text)
        times, seconds = _times(found), _seconds(found)
        endpoints = tuple(
            _endpoint(str(one["name"]), times[times["at"] == at], int(one["num_failures"]), seconds)
            for at, one in enumerate(found)
        )
        whole = _endpoint("all requests", times, sum(one.failed for one in endpoints), seconds)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OpsError(f"the load's results cannot be read: {excerpt(text)}", f"see {directory}") from None
    if not whole.requests:
        raise OpsError("not one request was sent", f"see {directory / 'locust.log'}")
    return Results(tuple(sorted(endpoints, key=lambda one: one.name)), whole, _failures(directory / FAILURES))


def write_results(results: Results, path: Path) -> None:
    """The table as CSV, which spreadsheets read."""
    frame_of(results).to_csv(path, index=False, encoding="utf-8-sig")


def frame_of(results: Results) -> DataFrame:
    """A row for each endpoint; the last one is of all requests. Columns: COLUMNS, as numbers."""
    import pandas as pd

    found = pd.DataFrame([one.row for one in (*results.endpoints, results.whole)], columns=list(COLUMNS))
    return found.astype(dict.fromkeys(COLUMNS[1:3], int) | dict.fromkeys(COLUMNS[3:], float))


def _times(found: Sequence[Mapping[str, Mapping[str, int]]]) -> DataFrame:
    """Locust's histograms: `count` requests of the endpoint `at` took `ms` (rounded to two digits above 100)."""
    import pandas as pd

    rows = [(at, int(ms), int(n)) for at, one in enumerate(found) for ms, n in one["response_times"].items()]
    return pd.DataFrame(rows, columns=["at", "ms", "count"])


def _seconds(found: Sequence[Mapping[str, float]]) -> float:
    """Seconds from the first to the last request, of all endpoints."""
    begun = min((one["start_time"] for one in found), default=0.0)
    return max(max((one["last_request_timestamp"] or begun for one in found), default=0.0) - begun, 1.0)


def _endpoint(name: str, times: DataFrame, failed: int, seconds: float) -> EndpointResult:
    import numpy as np

    count = int(times["count"].sum())
    if not count:
        return EndpointResult(name, 0, failed, 0.0, 0.0, 0.0, 0.0, 0.0)
    shares = (0.5, 0.95, 0.99, 1.0)
    found = np.quantile(times["ms"], shares, weights=times["count"], method="inverted_cdf") / 1000
    p50, p95, p99, longest = map(float, found)
    return EndpointResult(name, count, failed, p50, p95, p99, longest, count / seconds)


def _failures(path: Path) -> tuple[tuple[str, str, str], ...]:
    """Failures, the most frequent first; the last second may be missing."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["Name"], excerpt(row["Error"], 200), row["Occurrences"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return ()
    return tuple(sorted(rows, key=lambda row: -int(row[2]) if row[2].isdigit() else 0))
