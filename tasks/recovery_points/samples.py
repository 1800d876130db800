"""How long past recoveries of an environment took, from its reports."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from runbook.kinds import probe
from tasks.recovery_points.estimate import Sample

MEASURING = (
    *("verify-backup", "restore-database", "restore-redis", "restore-files", "restore-to-point", "full-restore"),
    *("postgresql-failover", "redis-failover", "region-failover"),
)
"""Runbooks whose reports may hold a measure: others are not even opened, the frequent checks among them."""
MOST_REPORTS = 60
_NAME = re.compile(r"\d{8}T\d{6}Z-.+-\d{6}-(?P<key>[a-z0-9-]+)\.json")


@probe
def read_samples(reports: Path, environment: str) -> dict[str, tuple[Sample, ...]]:
    """By way (`database backup`, `everything backup` …) what was measured, oldest first; of runs that ended well. What
    cannot be read is passed over."""
    found = defaultdict[str, list[Sample]](list)
    for path in _newest(reports):
        report = _read(path)
        if report.get("environment") != environment or report.get("status") not in ("OK", "WARN"):
            continue
        for one in report.get("measures", ()):
            found[str(one["what"])].append(Sample(int(one["bytes"]), float(one["seconds"])))
    return {way: tuple(samples) for way, samples in found.items()}


def _newest(reports: Path) -> list[Path]:
    """The newest reports of each of those runbooks, oldest first: their names begin with the time."""
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
