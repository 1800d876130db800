"""The durations of an environment's past recoveries, from its reports."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from runbook.kinds import probe
from tasks.recovery_points.estimate import DurationSample

MEASURING = (
    *("verify-backup", "restore-database", "restore-redis", "restore-files", "restore-to-point", "full-restore"),
    *("postgresql-failover", "redis-failover", "region-failover"),
)
"""Runbooks whose reports may have a measure. Others, such as the frequent checks, are not opened."""
MOST_REPORTS = 60
_NAME = re.compile(r"\d{8}T\d{6}Z-.+-\d{6}-(?P<key>[a-z0-9-]+)\.json")


@probe
def read_samples(reports: Path, environment: str) -> dict[str, tuple[DurationSample, ...]]:
    """The measures of successful runs by name (`database backup`, `everything backup` …), oldest first. Unreadable
    reports are skipped."""
    found = defaultdict[str, list[DurationSample]](list)
    for path in _newest(reports):
        report = _read(path)
        if report.get("environment") != environment or report.get("status") not in ("OK", "WARN"):
            continue
        for one in report.get("measures", ()):
            found[str(one["what"])].append(DurationSample(int(one["bytes"]), float(one["seconds"])))
    return {way: tuple(samples) for way, samples in found.items()}


def _newest(reports: Path) -> list[Path]:
    """The newest reports of each of these runbooks, oldest first: their names begin with the time."""
    by_key = defaultdict[str, list[str]](list)
    try:
        with os.scandir(reports) as entries:
            for entry in entries:
                if (match := _NAME.fullmatch(entry.name)) and match["key"] in MEASURING:
                    by_key[match["key"]].append(entry.name)
    except OSError:
        return []
    return [reports / name for names in by_key.values() for name in sorted(names)[-MOST_REPORTS:]]


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
