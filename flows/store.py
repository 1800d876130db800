"""What runbooks do with the backups of a store, whatever is in them. Plain functions, called with the open report."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import get_args

from blocks.environment import Environment, Stores
from runbook.errors import OpsError
from runbook.permit import Permit
from runbook.render import duration, size
from runbook.report import Report, Status
from runbook.shown import show_table
from tasks import at_hand, catalogue
from tasks.backup_log import append_line
from tasks.catalogue import Backup
from tasks.manifest import Kind
from tasks.publishing import clean_unfinished
from tasks.retention import delete_backups, read_backup, read_store, read_stores
from tasks.stores.directory import BAD
from tasks.stores.store import Store, store_of

MOST_SHOWN = 50


def store_for(env: Environment, kind: Kind, which: Stores = "backups") -> Store:
    """Where an environment's backups of a kind are: in its first or its second set of stores.

    Raises:
        OpsError: the environment has no such set, or an address in it is wrong.
    """
    store = store_of(env.stores(which), kind)
    at_hand.sweep(store)
    return store


def tidy(report: Report, env: Environment, store: Store) -> None:
    """See to what killed runs left in a store, and tell: each backup gets its line in the backup log, if late."""
    done = clean_unfinished(store, env.name)
    if done.removed:
        report.fact("removed unfinished backups", ", ".join(done.removed))
    for backup in done.sent:
        report.fact("sent now", f"{backup.name}, which had waited in {store.spool}")
        note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)} (sent late)")
    for name, reason in done.bad:
        report.warn(
            f"{name} waited to be sent and is damaged",
            f"look at it in {store.spool / (BAD + name)}, then remove it; it was never offered",
            value=reason,
        )


def read_files(report: Report, backup: Backup) -> list[str]:
    """Have a backup's files at hand until the run ends, compared with its manifest; returns what is wrong."""
    report.at_end(lambda: at_hand.put_away(backup))
    problems = list(at_hand.verify_files(backup))
    if problems:
        mark_failed(report, backup, problems[0])
    return problems


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
        what = f"that it is verified could not be noted: {error.message}"
        report.warn("note in the catalogue", error.hint, value=what)


def mark_failed(report: Report, backup: Backup, reason: str) -> None:
    """Note that it did not stand its proof: from now on it stands in for no other backup."""
    facts = {"by": report.runbook, "at": report.started_at, "reason": reason[:500]}
    try:
        catalogue.mark_failed(backup.store, backup.name, facts)
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


def tell_backups(report: Report, env: Environment) -> None:
    """Every backup of every kind in both sets of stores, newest first: in the report, and as a table artifact."""
    sets = [which for which in get_args(Stores) if env.has(which)]
    places = list(itertools.product(sets, get_args(Kind)))
    found = read_stores([(store_for(env, kind, which), kind) for which, kind in places], env.name)
    rows = list[tuple[Backup, str]]()
    for (which, kind), stored in zip(places, found, strict=True):
        if isinstance(stored, OpsError):  # a second place that is away makes no backup worse
            report.warn(f"{which} of {kind} could not be listed", stored.hint, value=stored.message)
            continue
        rows += [(backup, which) for backup in stored.backups]
        for name in stored.unreadable:
            report.warn(f"{name} in {which}", "look at it; it is never offered or deleted", value="manifest unreadable")
    rows.sort(key=lambda row: row[0].manifest.taken, reverse=True)
    columns = ("backup", "kind", "where", "taken (UTC)", "age", "size", "encrypted", "verified by a restore")
    told = [
        (
            backup.name, backup.manifest.kind, which, f"{backup.manifest.taken:%Y-%m-%d %H:%M}",
            duration(backup.age_seconds), size(backup.manifest.bytes), "yes" if backup.manifest.clear else "no",
            backup.verified or "never",
        )
        for backup, which in rows
    ]  # fmt: skip
    more = f" (the newest {MOST_SHOWN} of {len(told)}; all are in the artifact)" if len(told) > MOST_SHOWN else ""
    report.table(f"All backups{more}", columns, told[:MOST_SHOWN])
    show_table(f"backups-{env.name}", f"すべてのバックアップ ({env.title or env.name})", columns, told)


def find_prunable(
    report: Report, env: Environment, kind: Kind, age: timedelta, keep_verified: int, which: Stores = "backups"
) -> Sequence[Backup]:
    """What the safe rule lets go; planned line by line.

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
    verified = [backup for backup in stored.backups if backup.verified]
    if stored.backups and len(verified) < keep_verified:
        report.warn("verified backups", f"verify-backup verifies more; until there are {keep_verified} none goes",
                    value=len(verified), expected=f"at least {keep_verified}")  # fmt: skip
    report.fail_if_critical()
    doomed = stored.doomed(age, keep_verified)
    if doomed:
        _judge_kept(report, verified[-1])
    for backup in doomed:
        report.plan("delete", f"{backup.name}, {duration(backup.age_seconds)} old", size=backup.manifest.bytes)
    return doomed


def _judge_kept(report: Report, newest: Backup) -> None:
    """What the deleted ones leave it to, read once more to its end: it may have gone bad since it was verified."""
    problems = read_backup(newest)
    report.expect(
        f"files of {newest.name}, the newest that is verified",
        not problems,
        "verify-backup another one first; nothing is deleted",
        value="; ".join(problems[:3]) or size(newest.manifest.bytes),
        expected="as in its manifest (SHA-256)",
    )
    if problems:
        mark_failed(report, newest, problems[0])
    report.fail_if_critical()


def prune(report: Report, permit: Permit, env: Environment, doomed: Sequence[Backup]) -> None:
    """Delete them, and write that into the backup log."""
    freed = delete_backups(permit, env.name, doomed)
    note(report, env, f"Pruned {len(doomed)} - {', '.join(backup.name for backup in doomed)}")
    later = any(backup.store.keeps_deleted() for backup in doomed[:1])
    when = "are free when the bucket's lifecycle rule removes their versions" if later else "free again"
    report.outcome = f"{len(doomed)} deleted, {size(freed)} {when}"
