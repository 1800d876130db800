"""Reports of the past, as the chain of an environment's report folder has them (runbook/files/chain.py)."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from runbook.errors import OpsError
from runbook.guard.loss import Loss, losses_text

DRILL = "dr-drill"
RECOVERIES = (
    *("full-restore", "undo-full-restore", "restore-to-point", "region-failover", "postgresql-failover"),
    *("restore-database", "undo-restore", "restore-tables", "undo-restore-tables"),
    *("redis-failover", "restore-redis", "undo-restore-of-redis", "restore-files", "undo-restore-of-files"),
)
"""The runbooks that replace live data, by the names of their reports."""
LONGEST_DRILL = timedelta(days=1)


@dataclass(frozen=True)
class FiledReport:
    """One report. `content` is its whole JSON (runbook/report.py, `as_json`)."""

    path: Path
    content: dict[str, Any]

    @property
    def runbook(self) -> str:
        return str(self.content["runbook"])

    @property
    def environment(self) -> str:
        return str(self.content["environment"])

    @property
    def status(self) -> str:
        return str(self.content["status"])

    @property
    def started(self) -> datetime:
        return datetime.fromisoformat(self.content["started"])

    @property
    def finished(self) -> datetime:
        return datetime.fromisoformat(self.content["finished"])

    @property
    def facts(self) -> dict[str, str]:
        return dict(self.content["facts"])

    @property
    def findings(self) -> list[dict[str, str]]:
        return list(self.content["findings"])

    @property
    def losses(self) -> tuple[Loss, ...]:
        """What a recovery measured as lost, by part."""
        return tuple(Loss.from_json(one) for one in self.content.get("losses", ()))

    @property
    def lost(self) -> str:
        """The same as a clause."""
        return losses_text(self.losses or (Loss.not_known("the data", "that run measured none"),), detailed=True)

    def rows(self, evidence: str) -> list[list[str]]:
        """The rows of the table of that name, none where there is none."""
        return [row for item in self.content["evidence"] if item["name"] == evidence for row in item["rows"]]


def filed(
    directory: Path, environment: str, runbook: str = "*", *, since: datetime | None = None
) -> Iterator[FiledReport]:
    """The reports of an environment, newest first; `runbook` is a flow's name (`verify-backup`). What is no report of
    the chain, or cannot be read, is passed over: `verify_chain` tells of it. A directory that is not there has none.

    Raises:
        OpsError: the directory may not be read.
    """
    try:
        # Their names begin with the time: newer than `since` is known without reading.
        names = sorted((path.name for path in directory.glob(f"*-{runbook}.json")), reverse=True)
    except OSError as error:
        raise OpsError(f"{directory} cannot be read: {error.strerror}", "correct its owner") from None
    for name in names:
        found = _read(directory / name)
        if found is None or found.environment != environment or not _is_of(found, runbook):
            continue
        if since and found.started < since:
            return
        yield found


def recoveries(directory: Path, environment: str) -> Iterator[FiledReport]:
    """The recoveries that replaced data, newest first. Those of drills are left out.

    Raises:
        OpsError: the directory may not be read.
    """
    by_runbook = [filed(directory, environment, name) for name in RECOVERIES]
    for one in heapq.merge(*by_runbook, key=lambda one: one.started, reverse=True):
        replaced = one.losses or one.status in ("OK", "WARN")
        drills = filed(directory, environment, DRILL, since=one.started - LONGEST_DRILL)
        if replaced and not any(drill.started <= one.started <= drill.finished for drill in drills):
            yield one


def last(directory: Path, environment: str, runbook: str, *, planned: bool = False) -> FiledReport | None:
    """The newest report of a runbook that did something: plans count only where they are asked for."""
    return next((one for one in filed(directory, environment, runbook) if planned or one.status != "PLANNED"), None)


def _is_of(found: FiledReport, runbook: str) -> bool:
    """`*-backup.json` is `verify-backup` too: what is before the name is the chain's number."""
    return runbook == "*" or found.path.stem.removesuffix(f"-{runbook}").rpartition("-")[2].isdigit()


def _read(path: Path) -> FiledReport | None:
    try:
        found = FiledReport(path, json.loads(path.read_text(encoding="utf-8")))
        _ = found.environment, found.status, found.finished, found.facts, found.losses
        _ = [(one["name"], one["status"], one["value"], one["hint"]) for one in found.findings]
        _ = [(item["name"], [*item["rows"]]) for item in found.content["evidence"]]
        return found if found.started.tzinfo else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
