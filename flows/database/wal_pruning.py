"""Deleting archived WAL that no kept base backup needs, called with the open report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from blocks.environment import Environment, Stores
from flows.database.base_backup import by_pgbackrest
from flows.deleting import limit_unattended
from flows.store import store_for
from runbook.change import Carrier, Change
from runbook.report import Report
from runbook.units import size
from tasks.backups.catalogue import Backup
from tasks.backups.retention import RetentionRule, read_store
from tasks.cluster.content import cluster_in
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.prune import OldWal, delete_wal, find_old_wal
from tasks.wal.branch import timeline_in_use


def find_prunable_wal(
    report: Report, env: Environment, doomed: Sequence[Backup], rule: RetentionRule, which: Stores
) -> list[OldWal]:
    """The WAL that no kept base backup needs (`find_old_wal`).

    Nothing if a manifest is unreadable: that backup may need any segment. pgBackRest deletes its own WAL.
    """
    if which == "backups" and by_pgbackrest(env):
        return []
    stored = read_store(store_for(env, "cluster", which), "cluster", env.name)
    if stored.unreadable:
        return []
    names = {backup.name for backup in doomed}
    kept = [backup for backup in stored.backups if backup.name not in names]
    found = list[OldWal]()
    for system in sorted({cluster_in(backup).system for backup in kept}):
        archive = archive_of(env, which, system)
        in_use = timeline_in_use(env, archive, archive.listing(), system)
        old = find_old_wal(archive, system, kept, rule.window, in_use)
        old = replace(old, doomed=tuple(limit_unattended(report, env, "files of WAL", old.doomed, old.of)))
        if old.doomed:
            found.append(old)
    return found


def files(found: Sequence[OldWal]) -> list[tuple[object, int]]:
    """Every file with its bytes."""
    return [(f"{old.archive.place.where} {one.name}", one.bytes) for old in found for one in old.doomed]


def deletions_of(found: Sequence[OldWal]) -> list[Change[[], int]]:
    """The deletion of each part."""
    return [
        Change(delete_wal.bind(old), "delete WAL", f"{len(old.doomed)} files: {old.where}", size=old.bytes)
        for old in found
    ]


def prune_wal(report: Report, carry: Carrier, found: Sequence[OldWal], deletions: Sequence[Change[[], int]]) -> None:
    """Delete it and report the sizes."""
    files = freed = 0
    for old, deletion in zip(found, deletions, strict=True):
        of_this = carry(deletion)
        report.fact("WAL deleted", f"{len(old.doomed)} files, {size(of_this)}: {old.where}")
        files, freed = files + len(old.doomed), freed + of_this
    if found:
        deleted = f"{files} files of WAL deleted, {size(freed)}"
        report.outcome = f"{report.outcome}; {deleted}" if report.outcome else f"no backup, {deleted}"
