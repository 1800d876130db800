"""Deleting old backups by retention, called with the open report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from blocks.environment import Environment, Stores
from flows.deleting import judge_clocks, limit_unattended
from flows.store import mark_failed, note, store_for
from runbook import clock
from runbook.change import Change
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration, size
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Kind
from tasks.backups.retention import (
    RetentionRule,
    StoredBackup,
    delete_backups,
    need_of,
    read_backup,
    read_store,
    reasons_to_stay,
)


def find_prunable(
    report: Report, env: Environment, kind: Kind, rule: RetentionRule, which: Stores = "backups"
) -> Sequence[Backup]:
    """The backups that the retention rule deletes.

    Raises:
        RunbookFailed: this host's clock is wrong, or the newest verified backup is damaged.
    """
    store = store_for(env, kind, which)
    judge_clocks(report, env, store)
    stored = read_store(store, kind, env.name)
    ahead = stored.from_the_future()
    report.require(
        "clock",
        not ahead,
        "correct this host's clock, or find the host that took them. Until then no age can be trusted",
        value=f"taken in the future: {', '.join(ahead[:3])}" if ahead else "no backup is dated in the future",
    )
    if stored.unreadable:
        report.warn(
            "manifests that cannot be read",
            f"inspect them in {store.where}; this runbook never deletes them",
            value=", ".join(stored.unreadable[:5]),
        )
    verified = [backup for backup in stored.backups if backup.is_proven]
    if stored.backups and len(verified) < rule.keep.verified:
        report.warn(
            "verified backups",
            f"run verify-backup with kind={kind}; none is deleted before {rule.keep.verified} are verified",
            value=len(verified),
            expected=f"at least {rule.keep.verified}",
            follow=[Next("verify-backup", "verify one more", {"kind": kind})],
        )
    report.fail_if_critical()
    _show_rule(report, stored, rule, which)
    number = len(stored.backups) + len(stored.kept)
    doomed = limit_unattended(report, env, "backups", stored.doomed(rule), number)
    if doomed:
        _judge_newest(report, verified[-1])
    return doomed


def _show_rule(report: Report, stored: StoredBackup, rule: RetentionRule, which: Stores) -> None:
    """The rule, the disk space it needs, and the reasons to keep backups."""
    keep = rule.keep
    report.fact(
        "retention",
        f"every backup of the last {keep.hours} hours, then the newest of {keep.daily} days, {keep.weekly} weeks "
        f"and {keep.monthly} months; always the {keep.verified} newest verified ones, and the last one before tables "
        "shrank",
    )
    if stored.backups:
        need = need_of(which, stored.backups[0].manifest.kind, stored.backups, keep)
        report.fact(
            "disk space for this retention",
            f"up to {size(need.bytes)}: {need.number} backups of about "
            f"{size(int(need.each_bytes))}; used now: {size(need.there_bytes)}",
        )
        stays = Counter(reasons_to_stay(stored.backups, rule, clock.now()).values())
        report.table("Backups that stay", ("number", "why"), [(number, why) for why, number in stays.items()])


def _judge_newest(report: Report, newest: Backup) -> None:
    """Read the newest verified backup again: it may be damaged since it was verified."""
    problems = read_backup(newest)
    report.require(
        f"files of {newest.name}, the newest that is verified",
        not problems,
        "verify another backup first (verify-backup). Nothing was deleted",
        value="; ".join(problems[:3]) or size(newest.manifest.bytes),
        expected="as in its manifest (SHA-256)",
    )
    if problems:
        mark_failed(report, newest, problems[0])
    report.fail_if_critical()


def deletion_of(report: Report, env: Environment, doomed: Sequence[Backup]) -> Change[[], None]:
    """Delete them, one line each, and note it in the backup log."""
    delete = delete_backups.bind(env.name, doomed)

    def prune() -> None:
        later = doomed[0].store.keeps_deleted()  # queried first: an error after the deletion would hide its success
        freed = delete()
        note(report, env, f"Pruned {len(doomed)} - {', '.join(backup.name for backup in doomed)}")
        when = {
            True: "are freed when the bucket's lifecycle rule removes their versions",
            False: "freed",
            None: "freed, or still kept as versions: the policy does not allow s3:GetBucketVersioning",
        }
        report.outcome = f"{len(doomed)} deleted, {size(freed)} {when[later]}"

    first, *others = [_planned(env, backup) for backup in doomed]
    return Change(prune, first.step, first.detail, size=first.bytes, more=others, by=[delete])


def _planned(env: Environment, backup: Backup) -> PlannedStep:
    kept = "" if backup.manifest.environment == env.name else ", kept by a restore"
    detail = f"{backup.name}, taken {duration(backup.age_seconds)} ago{kept}"
    return PlannedStep("delete", detail, backup.manifest.bytes)
