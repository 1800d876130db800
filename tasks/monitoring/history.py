"""What was measured, kept small: every value for two days, then one line an hour, for thirteen months.

`day-2026-11-26.jsonl` has a line for each round, `2026-11.jsonl` one for each hour: its mean and its highest value.
About half a megabyte for each day that is whole, and as much for a month.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from runbook.files import durable
from tasks.monitoring.state import directory_of

WHOLE, MOST_MONTHS = timedelta(days=2), 13
_DAY = re.compile(r"day-(\d{4}-\d\d-\d\d)\.jsonl")
_MONTH = re.compile(r"(\d{4}-\d\d)\.jsonl")
_Hours = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Sample:
    """A value, or an hour's: its mean, and the highest of it."""

    at: datetime
    value: float
    most: float


def append(reports: Path, at: datetime, values: Mapping[str, float | None]) -> None:
    """One round; what was not measured is left out. Under the state's lock.

    Raises:
        OSError: it cannot be written.
    """
    at = at.astimezone(UTC)
    kept = {name: round(value, 6) for name, value in values.items() if value is not None}
    line = json.dumps({"at": at.isoformat(timespec="seconds"), **kept})
    with (directory_of(reports) / f"day-{at:%Y-%m-%d}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def tidy(reports: Path, now: datetime) -> None:
    """Days that are over become hours, and months that are long over go. Killed anywhere, it is done again.

    Raises:
        OSError: a file cannot be written.
    """
    directory = directory_of(reports)
    for path in sorted(directory.glob("day-*.jsonl")):
        found = _DAY.fullmatch(path.name)
        if found and datetime.fromisoformat(found[1]).replace(tzinfo=UTC) < now - WHOLE - timedelta(days=1):
            _roll_up(path, directory / f"{found[1][:7]}.jsonl")
            path.unlink()
    oldest = now - timedelta(days=31 * MOST_MONTHS)
    for path in directory.glob("????-??.jsonl"):
        if (found := _MONTH.fullmatch(path.name)) and found[1] < f"{oldest:%Y-%m}":
            path.unlink()


def history(directory: Path, metric: str, since: datetime) -> list[Sample]:
    """What was measured of a metric from `since` on, oldest first; `directory` is the environment's report folder.

    Raises:
        OSError: a file may not be read.
    """
    return histories(directory, since).get(metric, [])


def histories(directory: Path, since: datetime) -> dict[str, list[Sample]]:
    """Of every metric.

    Raises:
        OSError: a file may not be read.
    """
    found: dict[str, list[Sample]] = {}
    for path in sorted(directory_of(directory).glob("*.jsonl")):
        if not _may_hold(path, since):
            continue
        for line in _lines(path):
            at = datetime.fromisoformat(line.pop("at"))
            if at >= since:
                for name, value in line.items():
                    mean, most = value if isinstance(value, list) else (value, value)
                    found.setdefault(name, []).append(Sample(at, float(mean), float(most)))
    return {name: sorted(samples, key=lambda one: one.at) for name, samples in found.items()}


def _may_hold(path: Path, since: datetime) -> bool:
    if day := _DAY.fullmatch(path.name):
        return day[1] >= f"{since.astimezone(UTC):%Y-%m-%d}"
    month = _MONTH.fullmatch(path.name)
    return bool(month and month[1] >= f"{since.astimezone(UTC):%Y-%m}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a kill left half written is passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, TypeError):
                line = json.loads(text)
                datetime.fromisoformat(line["at"])
                yield line


def _roll_up(day: Path, month: Path) -> None:
    hours: _Hours = {}
    for line in _lines(day):
        values = hours.setdefault(line.pop("at")[:13], {})
        for name, value in line.items():
            values.setdefault(name, []).append(float(value))
    lines = {line["at"][:13]: line for line in _lines(month)} if month.exists() else {}
    for hour, measured in hours.items():
        rolled = {name: [round(sum(values) / len(values), 6), max(values)] for name, values in measured.items()}
        lines[hour] = {"at": f"{hour}:30:00+00:00", **rolled}
    durable.write(month, "".join(json.dumps(lines[hour]) + "\n" for hour in sorted(lines)))
