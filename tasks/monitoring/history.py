"""The history of metrics: every value for two days, then hourly values for thirteen months.

`day-2026-11-26.jsonl` has a line for each round, `2026-11.jsonl` one for each hour: its mean and its highest value.
About half a megabyte for each day that is whole, and as much for a month.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbook.files import durable
from tasks.monitoring.state import directory_of

if TYPE_CHECKING:
    from pandas import DataFrame

WHOLE, MOST_MONTHS = timedelta(days=2), 13
_DAY = re.compile(r"day-(\d{4}-\d\d-\d\d)\.jsonl")
_MONTH = re.compile(r"(\d{4}-\d\d)\.jsonl")


def append(reports: Path, at: datetime, values: Mapping[str, float | None]) -> None:
    """Add the values of a round, without those that were not measured. Needs the state's lock.

    Raises:
        OSError: it cannot be written.
    """
    at = at.astimezone(UTC)
    kept = {name: round(value, 6) for name, value in values.items() if value is not None}
    line = json.dumps({"at": at.isoformat(timespec="seconds"), **kept})
    with (directory_of(reports) / f"day-{at:%Y-%m-%d}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def tidy(reports: Path, now: datetime) -> None:
    """Reduce old days to hours, and delete old months. If it is killed, the next call repeats it.

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


def history(directory: Path, metric: str, since: datetime) -> DataFrame:
    """The samples of one metric since then: `at`, `value`, `most`. As `histories`."""
    found = histories(directory, since)
    return found[found["metric"] == metric].drop(columns="metric").reset_index(drop=True)


def histories(directory: Path, since: datetime) -> DataFrame:
    """The samples of every metric since then, oldest first: `metric`, `at`, `value`, and `most`: of an hour's mean, the
    highest value. `directory`: the environment's report folder.

    Raises:
        OSError: a file cannot be read.
    """
    import pandas as pd

    rows = []
    for path in directory_of(directory).glob("*.jsonl"):
        for line in _lines(path) if _may_hold(path, since) else ():
            at = datetime.fromisoformat(line.pop("at"))
            for name, value in line.items() if at >= since else ():
                mean, most = value if isinstance(value, list) else (value, value)
                rows.append((name, at, float(mean), float(most)))
    found = pd.DataFrame(rows, columns=["metric", "at", "value", "most"])
    return found.astype({"at": "datetime64[us, UTC]"}).sort_values("at", kind="stable", ignore_index=True)


def _may_hold(path: Path, since: datetime) -> bool:
    if day := _DAY.fullmatch(path.name):
        return day[1] >= f"{since.astimezone(UTC):%Y-%m-%d}"
    month = _MONTH.fullmatch(path.name)
    return bool(month and month[1] >= f"{since.astimezone(UTC):%Y-%m}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file. A line that a kill left incomplete is skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, TypeError):
                line = json.loads(text)
                datetime.fromisoformat(line["at"])
                yield line


def _roll_up(day: Path, month: Path) -> None:
    """Add the mean and the highest value of each hour of a day to its month."""
    import pandas as pd

    frame = pd.DataFrame(_lines(day))
    if frame.empty:
        return
    hours = frame.drop(columns="at").astype(float).groupby(frame["at"].str[:13])
    means, highest = hours.mean().round(6), hours.max()
    lines = {line["at"][:13]: line for line in _lines(month)} if month.exists() else {}
    for hour in means.index:
        measured = means.loc[hour].dropna()
        rolled = {name: [mean, highest.at[hour, name]] for name, mean in measured.items()}
        lines[hour] = {"at": f"{hour}:30:00+00:00", **rolled}
    durable.write(month, "".join(json.dumps(lines[hour]) + "\n" for hour in sorted(lines)))
