"""The manual's maintenance table (§7.1) as data, and what prefect.yaml makes of it.

python -m deployments.maintenance    # prints it, as docs/maintenance.md shows it
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import TypeAdapter

TABLE = Path(__file__).with_name("maintenance.toml")
DEPLOYMENTS = Path(__file__).parent.parent / "prefect.yaml"
NAME = "{{ $OPS_ENVIRONMENT }}"
FREQUENCIES = {"日次": "daily", "週次": "weekly", "月次": "monthly", "四半期": "quarterly", "年次": "yearly"}
# Working hours: half a day is the four hours of a drill (§8.4).
UNITS = {"分": 60, "時間": 3600, "日": 8 * 3600}
HALF_A_DAY = "半日"
WEEKDAYS = "日月火水木金土"


@dataclass(frozen=True)
class MaintenanceRow:
    """One row of §7.1, its cells as they stand there. `deployments`: `flow-name` or `flow-name/suffix`."""

    frequency: str
    task: str
    owner: str
    duration: str
    priority: str
    deployments: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """As the manual's table has them."""
        return (self.frequency, self.task, self.owner, self.duration, self.priority)

    @property
    def tags(self) -> tuple[str, ...]:
        """What each of its deployments is tagged with, besides section and chapter."""
        return (self.owner, FREQUENCIES[self.frequency], f"優先度{self.priority}", duration_tag(self.duration))


@dataclass(frozen=True)
class Cron:
    """One of the manual's own cron lines."""

    section: str
    line: str
    duration: str
    deployments: tuple[str, ...]


@dataclass(frozen=True)
class Also:
    """What is scheduled besides, and why."""

    why: str
    duration: str
    deployments: tuple[str, ...]


@dataclass(frozen=True)
class PlannedWork:
    """What somebody waits for: a row, or what is scheduled besides."""

    task: str
    owner: str
    duration: str
    deployments: tuple[str, ...]


@dataclass(frozen=True)
class MaintenanceTable:
    """The whole file."""

    row: tuple[MaintenanceRow, ...]
    cron: tuple[Cron, ...]
    also: tuple[Also, ...]

    def planned(self) -> list[PlannedWork]:
        """All that is scheduled."""
        return [
            *(PlannedWork(row.task, row.owner, row.duration, row.deployments) for row in self.row),
            *(PlannedWork(f"cron {cron.section}", "SRE", cron.duration, cron.deployments) for cron in self.cron),
            *(PlannedWork(also.why.partition(":")[0], "SRE", also.duration, also.deployments) for also in self.also),
        ]

    def durations(self) -> dict[str, str]:
        """Deployment → how long it is expected to take."""
        return {one: each.duration for each in self.planned() for one in each.deployments}


def read_table(path: Path = TABLE) -> MaintenanceTable:
    """The table of a file."""
    return TypeAdapter(MaintenanceTable).validate_python(tomllib.loads(path.read_text(encoding="utf-8")))


def duration_tag(duration: str) -> str:
    """`所要5分`."""
    return f"所要{duration}"


def seconds_of(duration: str) -> int:
    """`5分`, `2時間`, `半日`, `1日`.

    Raises:
        ValueError: it is none of those.
    """
    if duration == HALF_A_DAY:
        return UNITS["日"] // 2
    found = re.fullmatch(r"(\d+)(分|時間|日)", duration)
    if not found:
        raise ValueError(f"{duration} is no duration: one is 5分, 2時間, 半日 or 1日")
    return int(found[1]) * UNITS[found[2]]


def name_in(environment: str, deployment: str) -> str:
    """What Prefect calls it: `daily-check/health` is `daily-check/production-health`."""
    flow, _, suffix = deployment.partition("/")
    return f"{flow}/{environment}-{suffix}" if suffix else f"{flow}/{environment}"


@functools.cache
def entries(path: Path = DEPLOYMENTS) -> dict[str, dict[str, Any]]:
    """The entries of prefect.yaml, by what the table calls them."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
    return {_called(entry): entry for entry in content}


def _called(entry: dict[str, Any]) -> str:
    flow = entry["entrypoint"].rpartition(".")[2].replace("_", "-")
    suffix = entry["name"].removeprefix(NAME).removeprefix("-")
    return f"{flow}/{suffix}" if suffix else flow


def crons_of(deployment: str) -> list[str]:
    """When it runs; [] where prefect.yaml has no schedule or no entry for it."""
    entry = entries().get(deployment) or {}
    return [str(schedule["cron"]) for schedule in entry.get("schedules") or [] if schedule.get("active", True)]


def told(cron: str) -> str:
    """A cron line for people: 毎月2日 07:00."""
    minute, hour, day, month, weekday = cron.split()
    if hour == "*":
        return f"{minute.removeprefix('*/')}分ごと" if minute.startswith("*/") else f"毎時{minute}分"
    at = f"{int(hour):02}:{int(minute):02}"
    if weekday != "*":
        days = "から".join(f"{WEEKDAYS[int(each) % 7]}曜" for each in weekday.split("-"))
        return f"毎週{days} {at}"
    if day == "*":
        return f"毎日 {at}"
    months = f"{month.replace(',', '・')}月" if month != "*" else "毎月"
    return f"{months}{day}日 {at}"


def _when(deployments: tuple[str, ...]) -> str:
    return "<br>".join(f"`{one}`: {'、'.join(map(told, crons_of(one))) or 'not scheduled'}" for one in deployments)


def page() -> str:
    """All of it, as Markdown."""
    return "\n".join(_lines(read_table())) + "\n"


def _lines(table: MaintenanceTable) -> Iterator[str]:
    yield "| 頻度 | タスク | 担当者 | 所要時間 | 優先度 | デプロイメントと時刻 (Asia/Tokyo) |"
    yield "|---|---|---|---|---|---|"
    for row in table.row:
        yield f"| {' | '.join(row.cells)} | {_when(row.deployments)} |"
    yield ""
    yield "| cron (manual) | デプロイメントと時刻 (Asia/Tokyo) |"
    yield "|---|---|"
    for cron in table.cron:
        yield f"| {cron.section} `{cron.line}` | {_when(cron.deployments)} |"
    yield ""
    yield "| Besides | デプロイメントと時刻 (Asia/Tokyo) |"
    yield "|---|---|"
    for also in table.also:
        yield f"| {also.why} | {_when(also.deployments)} |"


if __name__ == "__main__":
    print(page(), end="")
