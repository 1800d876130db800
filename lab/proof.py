"""What a restore proved: its report, judged beside what the writing client knows, and printed."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lab.redis_ledger import RedisLoss
from lab.runs import Run
from runbook.files.chain import reports_in
from runbook.units import duration
from tasks.drill.ledger import WriteLedger
from tasks.drill.lost_writes import LedgerResult

RUNBOOK = "Full restore"
PROVEN_GOOD = ("OK", "WARN")
DATABASE = ("the copy is at the target", "copy equal to the backup")
"""What proves the database: from base backup and WAL, or from the dump."""
REDIS, FILES, KEPT_FILES = "Redis copy equal to the backup", "files equal to the backup", "live files intact"
OPTIONS = "Recovery options for the database"
MOST_ROWS = 80
_TABLES = re.compile(
    r"Recovery options|Statement that|Proven|Redis proven|Redis: sources|Application$|Writes lost, by kind"
)


@dataclass(frozen=True)
class Proof:
    """A flow run that ended, its JSON report, the application's health afterwards, and the ledger's account."""

    run: Run
    report: dict[str, Any]
    health: str
    ledger: WriteLedger
    lost: LedgerResult | None
    backups_began: datetime
    redis: RedisLoss | None = None

    def problems(self) -> list[str]:
        """Why the restore is not proven, as sentences; empty when it is."""
        found = []
        if not self.run.completed:
            found.append(f"the flow run ended {self.run.state}: {self.run.message}")
        if self.report["status"] not in PROVEN_GOOD:
            found.append(f"the report says {self.report['status']}")
        findings = {finding["name"]: finding for finding in self.report["findings"]}
        files = KEPT_FILES if KEPT_FILES in findings else FILES
        for name in (self._proof_of_database(findings), REDIS, files):
            if name not in findings:
                found.append(f"the report does not say “{name}”")
            elif findings[name]["status"] != "OK":
                found.append(f"{name}: {findings[name]['value']}")
        if not self.health.startswith("200 "):
            found.append(f"the application is not healthy: {self.health}")
        return found + self._ledger_problems() + self._redis_problems()

    def _redis_problems(self) -> list[str]:
        """A replica or the master's own files survive: no acknowledged write to Redis may be lost."""
        if self.redis is None:
            return ["Redis cannot be asked for the client's writes"]
        if not self.redis.backup_alone:
            return ["the client wrote nothing to Redis after the backup, so nothing was shown to survive"]
        lost = len(self.redis.lost)
        return [f"{lost} of {self.redis.acknowledged} acknowledged writes to Redis are lost"] if lost else []

    @staticmethod
    def _proof_of_database(findings: Mapping[str, object]) -> str:
        return next((name for name in DATABASE if name in findings), DATABASE[0])

    def _ledger_problems(self) -> list[str]:
        if self.lost is None:
            return ["the database cannot be asked for the client's writes"]
        before = self.ledger.acknowledged(before=self.backups_began)
        gone = [attempt for attempt in self.lost.lost if attempt in before]
        found = [] if before else ["the client wrote nothing before the backup, so nothing was shown to survive"]
        if gone:
            found.append(f"{len(gone)} of {len(before)} writes acknowledged before the backup are not there")
        if unnamed := {attempt.key for attempt in self.lost.lost} - self._named():
            found.append(f"{len(unnamed)} writes are lost that the report does not name")
        if self.lost.lost and self.dump_alone():
            found.append(f"{len(self.lost.lost)} acknowledged writes are lost, although the WAL had them")
        return found

    def dump_alone(self) -> str:
        """What the dump alone would have lost, if the database was restored from base backup and WAL; else ""."""
        rows = {
            row[0]: row for one in self.report["evidence"] if one["name"].startswith(OPTIONS) for row in one["rows"]
        }
        if "dump" not in rows or rows["dump"][-1]:
            return ""
        taken = datetime.fromisoformat(rows["dump"][2])
        everything = len(self.ledger.acknowledged())
        lost = everything - len(self.ledger.acknowledged(before=taken))
        return f"{lost} of {everything} acknowledged writes, all after {taken:%H:%M:%S} {taken.isoformat()[-6:]}"

    def accounts(self) -> str:
        """The report's count of lost writes beside the ledger's: whether they agree, or how not."""
        told = self.report["facts"].get("writes lost", "not counted")
        if self.lost is None:
            return f"report: {told}; ledger: not counted"
        mine, named = {attempt.key for attempt in self.lost.lost}, self._named()
        text = f"{told} (report, from the application's log); {self.lost.sentence} (the client's ledger): "
        if mine == named:
            return text + f"they agree, write by write: {len(mine)} of {len(named)}"
        more = f"{len(named - mine)} that the ledger does not miss (logged just after the snapshot that holds them)"
        less = f"{len(mine - named)} missing in the report"
        return (
            text
            + "they differ: the report names "
            + " and ".join(part for part, counts in ((more, named - mine), (less, mine - named)) if counts)
        )

    def text(self, links: Sequence[str]) -> str:
        """The report for a terminal."""
        report = self.report
        before = self.ledger.acknowledged(before=self.backups_began)
        outcome = f" — {report['outcome']}" if report["outcome"] else ""
        parts = [f"=== {report['runbook']} on {report['environment']}: {report['status']}{outcome} ==="]
        parts += [
            _table(item["name"], item["columns"], item["rows"])
            for item in report["evidence"]
            if item["columns"] and item["rows"] and _TABLES.match(item["name"])
        ]
        steps = [(step["name"].replace("_", " "), f"{step['seconds']:.2f}", step["status"]) for step in report["steps"]]
        parts.append(_table("Steps", ("step", "seconds", "status"), steps))
        findings = [(item["status"], item["name"], item["value"][:90]) for item in report["findings"]]
        parts.append(_table("Findings", ("", "finding", "value"), findings))
        facts = [*report["facts"].items(), ("took", duration(report["seconds"]))]
        facts += [
            ("writes lost, both accounts", self.accounts()),
            ("writes lost in Redis", self.redis.sentence if self.redis else "not counted"),
            *([("the dump alone would have lost", self.dump_alone())] if self.dump_alone() else []),
            ("writes before the backup", f"{len(before)} acknowledged, {self._kept(before)} there"),
            ("health", self.health),
            *(("look at it", link) for link in links),
        ]
        width = max(len(name) for name, _ in facts) + 1
        return "\n\n".join([*parts, "\n".join(f"{name + ':':{width}} {value}" for name, value in facts)])

    def _kept(self, before: Sequence[object]) -> str:
        if self.lost is None:
            return "unknown"
        return str(len(before) - sum(attempt in before for attempt in self.lost.lost))

    def _named(self) -> set[str]:
        """The resources of the lost writes that the report names one by one."""
        for item in self.report["evidence"]:
            if item["name"] == "Writes lost, one by one":
                return {row[3] for row in item["rows"]}
        return set()


def find_report(directory: Path, since: datetime, runbook: str = RUNBOOK) -> dict[str, Any] | None:
    """The newest report of a runbook that began after a moment, with its `path`."""
    newest = None
    for path in reports_in(directory):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if report["runbook"] == runbook and datetime.fromisoformat(report["started"]) >= since:
            newest = {**report, "path": str(path)}
    return newest


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = [[str(cell) for cell in row] for row in (columns, *rows[:MOST_ROWS])]
    widths = [max(_width(cell) for cell in column) for column in zip(*shown, strict=True)]
    lines = [
        "  " + "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]
    if len(rows) > MOST_ROWS:
        lines.append(f"  … {len(rows) - MOST_ROWS} more in the report")
    return "\n".join([title, *lines])


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
