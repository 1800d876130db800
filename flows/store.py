"""What runbooks do with the backups of a store, whatever is in them. Plain functions, called with the open report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from blocks.environment import Environment, Stores
from runbook.errors import OpsError
from runbook.permit import Permit
from runbook.render import duration, size
from runbook.report import Report, Status
from tasks import at_hand, catalogue
from tasks.backup_log import append_line
from tasks.catalogue import Backup
from tasks.manifest import Kind
from tasks.retention import Stored, delete_backups, read_store
from tasks.stores.store import Store, store_of

MOST_SHOWN = 50


def store_for(env: Environment, kind: Kind, which: Stores = "backups") -> Store:
    """Where an environment's backups of a kind are: in its first or its second set of stores.

    Raises:
        OpsError: the environment has no such set, or an address in it is wrong.
    """
    return store_of(env.stores(which), kind)


def read_files(report: Report, backup: Backup) -> list[str]:
    """Have a backup's files at hand until the run ends, compared with its manifest; returns what is wrong."""
    report.at_end(lambda: at_hand.put_away(backup))
    return list(at_hand.verify_files(backup))


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
        catalogue.mark_verified(backup.store, backup.name, {"by": report.runbook, "at": report.started_at})
    except OpsError as error:
        report.warn("note in the catalogue", error.hint, value=error.message)


def note(report: Report, env: Environment, text: str) -> None:
    """A line in the backup log. A backup is none the worse for a log that cannot be written."""
    if not env.has("logs"):
        return
    try:
        append_line(env.logs, text)
    except OpsError as error:
        report.warn("backup log", error.hint, value=error.message)


def tell_backups(report: Report, backups: Sequence[Backup]) -> None:
    """The newest backups of a store as a table."""
    shown = list(reversed(backups))[:MOST_SHOWN]
    more = len(backups) - len(shown)
    report.table(
        "Backups in the store" + (f" (the newest {len(shown)}; {more} more)" if more else ""),
        ("backup", "age", "size", "verified by a restore"),
        [
            (backup.name, duration(backup.age_seconds), size(backup.manifest.bytes), backup.verified or "never")
            for backup in shown
        ],
    )


def find_prunable(
    report: Report, env: Environment, kind: Kind, age: timedelta, keep_verified: int, which: Stores = "backups"
) -> tuple[Stored, Sequence[Backup]]:
    """What is in the store, and what of it the safe rule lets go; planned line by line.

    Raises:
        RunbookFailed: the clock jumped.
    """
    store = store_for(env, kind, which)
    stored = read_store(store, kind, env.name)
    ahead = stored.from_the_future()
    report.expect("clock", not ahead, "correct this host's clock, or look who took them: ages mean nothing now",
                  value=f"of the future: {', '.join(ahead[:3])}" if ahead else "none is of the future")  # fmt: skip
    if stored.unreadable:
        report.warn("manifests that cannot be read", f"look at them in {store.where}; they are never deleted here",
                    value=", ".join(stored.unreadable[:5]))  # fmt: skip
    if stored.backups and not any(backup.verified for backup in stored.backups):
        report.warn("verified backups", "verify-backup verifies one; until then nothing is deleted", value="none")
    report.fail_if_critical()
    doomed = stored.doomed(age, keep_verified)
    for backup in doomed:
        report.plan("delete", f"{backup.name}, {duration(backup.age_seconds)} old", size=backup.manifest.bytes)
    return stored, doomed


def prune(report: Report, permit: Permit, env: Environment, doomed: Sequence[Backup]) -> None:
    """Delete them, and write that into the backup log."""
    freed = delete_backups(permit, env.name, doomed)
    note(report, env, f"Pruned {len(doomed)} - {', '.join(backup.name for backup in doomed)}")
    later = any(backup.store.keeps_deleted() for backup in doomed[:1])
    when = "are free when the bucket's lifecycle rule removes their versions" if later else "free again"
    report.outcome = f"{len(doomed)} deleted, {size(freed)} {when}"
