"""What was compared, kept beside its files so that what somebody reviewed is what is applied; and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from blocks.environment import Environment
from runbook import record
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.report import Report
from tasks.postgres.salvage import SQL, Counted
from tasks.postgres.salvage_apply import SALVAGE, Applied

FOLDER, RECORD = "salvage", "record.json"


@dataclass(frozen=True)
class Salvage:
    """One comparison: of which source, with which live database (its OID), the SQL's SHA-256, each table's counts,
    those that could not be compared and why, and when it was applied ("" if never)."""

    stamp: str
    source: str
    database: int
    digest: str
    tables: tuple[Counted, ...]
    others: tuple[tuple[str, str], ...]
    applied: str = ""

    @property
    def name(self) -> str:
        """As the form names it: when, and of which content."""
        return f"{self.stamp}-{self.digest[:16]}"

    @property
    def written(self) -> list[Counted]:
        """The tables of which there are statements."""
        return [one for one in self.tables if one.inserts or one.updates]


def folder(env: Environment, stamp: str) -> Path:
    """Where a comparison's files are."""
    return env.reports_directory / FOLDER / stamp


def keep(env: Environment, salvage: Salvage) -> None:
    """Write it down beside its files."""
    path = folder(env, salvage.stamp) / RECORD
    record.write(path, salvage)
    path.chmod(0o600)  # the samples in it are masked; the names of tables are not


def find(env: Environment, reviewed: str) -> Salvage:
    """The comparison that a form names.

    Raises:
        OpsError: it is not there, or its files are of another.
    """
    stamp = reviewed.strip().rpartition("-")[0]
    hint = "launch it again without reviewed: it compares anew"
    found = record.read(folder(env, stamp) / RECORD, Salvage, hint) if stamp and "/" not in stamp else None
    if found is None or found.name != reviewed.strip():
        raise OpsError(f"there is no comparison “{reviewed[:60]}” on this host", hint)
    return found


def mark_applied(env: Environment, salvage: Salvage) -> None:
    """Note that it was."""
    keep(env, replace(salvage, applied=datetime.now(UTC).isoformat(timespec="seconds")))


def tell(report: Report, env: Environment, salvage: Salvage) -> None:
    """Counts, and where the rows are."""
    place = folder(env, salvage.stamp)
    report.fact("source", salvage.source)
    report.fact("SQL to review", place / SQL)
    report.fact("rows as CSV", f"{place}/*.csv")
    report.table(
        "Rows by primary key",
        ("table", "only in the source", "only live", "differing", "of those written live since", "INSERTs", "UPDATEs"),
        [(one.table, one.missing, one.live_only, one.differing, one.conflicts, one.inserts, one.updates)
         for one in salvage.tables],
    )  # fmt: skip
    if samples := [(one.table, text) for one in salvage.tables for text in one.samples]:
        report.table("Samples (texts are masked: read the files)", ("table", "statement"), samples)
    if salvage.others:
        report.table("Not comparable", ("table", "why"), salvage.others)
        report.warn("tables that could not be compared", "look at them by hand in the source: no file has their rows",
                    value=", ".join(name for name, _ in salvage.others[:10]))  # fmt: skip
    conflicts = sum(one.conflicts for one in salvage.tables)
    held_back = sum(one.differing - one.updates for one in salvage.tables)
    if conflicts and held_back:
        report.warn("conflicts", "read them in the CSV (“differs”); differing=overwrite takes the source's values",
                    value=f"{conflicts:,} rows differ and were written in the live database since, or nobody can say: "
                    "left as they are")  # fmt: skip
    elif conflicts:
        report.warn("conflicts", "read the UPDATEs before you confirm: they go over what was written since",
                    value=f"{conflicts:,} rows that were written live since get the source's values")  # fmt: skip
    if any(one.missing for one in salvage.tables):
        report.fact("rows only in the source", "lost by the recovery, or deleted in the live database since: the keys "
                    "do not tell which; read the file before you confirm")  # fmt: skip


def plan(report: Report, salvage: Salvage) -> None:
    """A line a table."""
    for one in salvage.written:
        report.plan("write", f"{one.table}: {one.inserts:,} rows inserted, {one.updates:,} updated",
                    seconds=(one.inserts + one.updates) / 5000)  # fmt: skip
    report.plan("before the commit", "foreign keys asked, sequences advanced; all of it in one transaction")


def acts(salvage: Salvage) -> Sequence[Act]:
    """What a permit is needed for."""
    return [Act(SALVAGE, one.table) for one in salvage.written]


def tell_done(report: Report, salvage: Salvage, done: Applied) -> None:
    """What was written, and what was not."""
    ran = done.ran
    if done.sequences:
        report.fact("sequences advanced", ", ".join(done.sequences))
    if ran.passed:
        report.warn("statements that found nothing to do", "their rows were written live since they were compared, or "
                    "this was applied before: launch it again without reviewed to see what is left",
                    value=f"{ran.passed:,}, such as {ran.examples[0]}")  # fmt: skip
    report.outcome = f"{ran.inserted:,} rows inserted and {ran.updated:,} updated, of {salvage.source}"
