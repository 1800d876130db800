"""What every restore does with a backup of a store, whatever is in it. Plain functions, called with the open report."""

from __future__ import annotations

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks import catalogue
from tasks.catalogue import Backup


def judge_origin(report: Report, env: Environment, backup: Backup, wanted: str) -> None:
    """A store may be shared: another environment's backup is taken only by its name."""
    report.expect(
        "environment of the backup",
        backup.manifest.environment == env.name,
        f"it was taken of {backup.manifest.environment}; if that is meant, launch it with backup={backup.name}",
        value=backup.manifest.environment,
        expected=env.name,
        otherwise=Status.WARN if wanted == backup.name else Status.CRITICAL,
    )


def mark_verified(report: Report, backup: Backup) -> None:
    """Note that a restore of it was proven. That it cannot be noted is no reason to call a good restore bad."""
    try:
        catalogue.mark_verified(backup.path.parent, backup.name, {"by": report.runbook, "at": report.started_at})
    except OpsError as error:
        report.warn("note in the catalogue", error.hint, value=error.message)
