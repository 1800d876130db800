"""The application's migration scripts and the database's revision, called with the open report (§1.1)."""

from __future__ import annotations

from collections.abc import Sequence

from flows.database.migration.rehearsal import MOST_SHOWN
from runbook.report import Report, Status
from runbook.units import first_of
from tasks.migrations.scripts import MigrationHeads, Script

UNREVERSIBLE_HINT = "write it in the application's repository; until then only a backup can undo the migration"


def judge_heads(report: Report, heads: MigrationHeads, current: str) -> None:
    """The revision of the database and the heads of the application; several heads are an error."""
    report.fact("revision of the database", current or "none")
    report.fact("heads of the application", ", ".join(heads.names) or "none")
    report.require(
        "one head",
        len(heads.names) < 2,
        "merge them (`alembic merge heads`) in the application's repository, test and deploy the result",
        value=", ".join(heads.names) or "none",
        expected="one",
    )


def judge_pending(report: Report, heads: MigrationHeads, current: str, revision: str) -> tuple[Script, ...]:
    """The pending migrations.

    Raises:
        RunbookFailed: there are several heads.
        OpsError: the revision is unknown, or the schema is newer than the code.
    """
    judge_heads(report, heads, current)
    report.fail_if_critical()
    pending = heads.pending(current, revision)
    value = ", ".join(script.revision for script in pending) or f"none up to {revision}"
    report.passed("pending migrations", value=value)
    return pending


def judge_downgrades(report: Report, scripts: Sequence[Script], otherwise: Status) -> None:
    """Scripts whose downgrade does not undo the upgrade, found by reading them."""
    bad = [script for script in scripts if not script.reversible]
    report.require(
        "downgrades",
        not bad,
        UNREVERSIBLE_HINT,
        value=first_of([f"{s.revision} ({s.path.name}): {s.downgrade}" for s in bad], 5, between="; ")
        or f"{len(scripts)} written",
        expected="one that undoes its upgrade, in every script",
        worst=otherwise,
    )


def show_history(report: Report, heads: MigrationHeads, applied: set[str], current: str) -> None:
    """Every migration, newest first."""
    rows = [
        (
            script.revision,
            script.title,
            ", ".join(script.down) or "—",
            "current" if script.revision == current else "applied" if script.revision in applied else "pending",
            script.downgrade if script.reversible else f"🛑 {script.downgrade}",
            "" if script.transactional else "commits in between",
        )
        for script in heads.scripts
    ]
    columns = ("revision", "title", "after", "state", "downgrade", "transaction")
    report.table("History, newest first", columns, rows, most=MOST_SHOWN)
