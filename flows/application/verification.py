"""What verifying a backup of the application's files consists of, called with the open report (§8.2)."""

from __future__ import annotations

import time

from blocks.environment import Environment, Stores
from flows.store import choose_backup, mark_failed, mark_verified
from runbook.render import duration, size
from runbook.report import Report
from tasks.catalogue import Backup
from tasks.entries import entries_of
from tasks.files import read_archive_back
from tasks.files_copy import try_files


def verify_files(report: Report, env: Environment, wanted: str, source: Stores) -> Backup:
    """Choose a backup of the files, read its archive back, unpack it into a scratch directory, compare every entry with
    the manifest, note that it is verified.

    Raises:
        OpsError: there is none, or no room for it.
        RunbookFailed: it is damaged, or is not what the manifest says.
    """
    backup = choose_backup(report, env, "files", wanted, source)
    report.fail_if_critical()
    started, entries = time.monotonic(), entries_of(backup.manifest)
    problems = read_archive_back(backup.path, entries)
    report.expect(
        "archive read back",
        not problems,
        "verify another one, and take a new backup",
        value="; ".join(problems[:3]) or f"{len(entries):,} entries",
        expected="every entry with its SHA-256",
    )
    if problems:
        mark_failed(report, backup, problems[0])
    report.fail_if_critical()
    tried = try_files(backup)
    report.expect(
        "unpacked files equal to the backup",
        not tried.differences,
        "the archive is whole: run this as the user who restores (root gives files their owners)",
        value="; ".join(tried.differences[:3]) or f"{tried.entries:,} entries, {size(tried.bytes)}",
        expected="mode, owner, size, content and target of every entry",
    )
    report.fact("restored in", duration(time.monotonic() - started))
    report.table("Worth knowing of a restore", ("what",), [(text,) for text in tried.notes])
    report.fail_if_critical()
    mark_verified(report, backup)
    return backup
