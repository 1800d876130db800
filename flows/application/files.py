"""Backups of the application's files (§8.2)."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from blocks.environment import Environment, Stores
from flows.store import choose_backup, judge_key, mark_failed, mark_verified, note, store_for, tidy
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.application.files import archive_files, directory_of, measure_files, read_archive_back
from tasks.application.staged_files import try_files
from tasks.backups import manifest, publishing
from tasks.backups.catalogue import Backup
from tasks.backups.entries import ArchivedFiles, entries_of
from tasks.backups.manifest import Manifest
from tasks.stores.store import Store


@flow(name="backup-files", flow_run_name=RunName("backup-files {environment} files"))
def backup_files(environment: str) -> Report:
    """アプリケーションファイルのバックアップ (§8.2 手順4)

    Archives the application's directory (code, settings, uploads) with a manifest of every file: mode, owner, size,
    SHA-256 of the bytes in the archive. Then reads the archive back. Run it daily, and after every release.

    It changes nothing in the directory. An interrupted backup is never offered for a restore; the next run deletes it.
    Evidence: the manifest in the backup, the skipped files, and the files that changed during the backup.

    Departs from the manual: its step is only a comment (rsync); here it is a backup that a restore can prove.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Backup files", env, changes=True) as report:
        store = store_for(env, "files")
        tidy(report, env, store)  # before free space is judged: an interrupted backup uses some
        found = measure_files(env.application, store.spool)
        report.require(
            "free space in the store",
            found.free_bytes > found.bytes,
            f"free {size(found.bytes - found.free_bytes)} at {store.spool}, or give the store more space",
            value=size(found.free_bytes),
            expected=f"more than {size(found.bytes)}",
        )
        report.fail_if_critical()
        name = _take(report, env, store)
        report.outcome = f"{name} is in the store"
        report.fact("backup", name)
        note(report, env, f"Backup completed - {name}")
    return report


def _take(report: Report, env: Environment, store: Store) -> str:
    started, taken = time.monotonic(), datetime.now(UTC)
    name, directory = publishing.begin(store, "files", env.name, env.zone)
    archived = archive_files(env.application, directory)
    problems = read_archive_back(directory, archived.entries)
    report.require(
        "archive read back",
        not problems,
        "run this again; check the store's disk",
        value="; ".join(problems[:3]) or f"{len(archived.entries):,} entries",
        expected="every entry with its SHA-256",
    )
    report.fail_if_critical()
    sealed = Manifest(
        kind="files",
        name=name,
        environment=env.name,
        taken=taken,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool="tar.zst",
        files=manifest.sums_of(directory),
        content=archived.model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, sealed)
    judge_key(report, backup)
    _report_results(report, archived, sealed, directory_of(env.application))
    return name


def _report_results(report: Report, archived: ArchivedFiles, sealed: Manifest, directory: Path) -> None:
    files = sum(entry.kind == "file" for entry in archived.entries)
    report.fact("directory", directory)
    report.fact("size", f"{size(sealed.bytes)} of {size(archived.bytes)} in {files:,} files")
    report.fact("took", duration(sealed.seconds))
    if archived.changed:
        report.warn(
            "files that changed while they were read",
            "if several files belong together, stop the process that writes them and take another backup",
            value="; ".join(archived.changed[:3]),
        )
    if archived.skipped:
        report.table("Not in the backup", ("path",), [(what,) for what in archived.skipped])


def verify_files(report: Report, env: Environment, wanted: str, source: Stores) -> Backup:
    """Choose a backup of the files, read its archive back, unpack it into a scratch directory, compare every entry with
    the manifest, and record it as verified.

    Raises:
        OpsError: there is no backup, or not enough free disk space.
        RunbookFailed: it is damaged, or differs from its manifest.
    """
    backup = choose_backup(report, env, "files", wanted, source, failed_too=True)
    report.fail_if_critical()
    started, entries = time.monotonic(), entries_of(backup.manifest)
    problems = read_archive_back(backup.path, entries)
    report.require(
        "archive read back",
        not problems,
        "take a new backup, and verify another one",
        value="; ".join(problems[:3]) or f"{len(entries):,} entries",
        expected="every entry with its SHA-256",
    )
    if problems:
        mark_failed(report, backup, problems[0])
    report.fail_if_critical()
    tried = try_files(backup)
    report.require(
        "unpacked files equal to the backup",
        not tried.differences,
        "the archive is complete: run this as the user that restores (only root can set owners)",
        value="; ".join(tried.differences[:3]) or f"{tried.entries:,} entries, {size(tried.bytes)}",
        expected="mode, owner, size, content and target of every entry",
    )
    report.fact("restored in", duration(time.monotonic() - started))
    report.table("Notes about a restore", ("note",), [(text,) for text in tried.notes])
    report.fail_if_critical()
    mark_verified(report, backup)
    return backup
