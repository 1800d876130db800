"""Verification of a Redis backup on a scratch server (§2.3)."""

from __future__ import annotations

import time

from blocks.environment import Environment, Stores
from flows.store import choose_backup, mark_failed, mark_verified
from runbook.report import Report
from runbook.units import duration
from tasks.backups.catalogue import Backup
from tasks.redis.backup.proof import prove_backup
from tasks.redis.content.manifest import COLUMNS


def verify_redis(report: Report, env: Environment, wanted: str, source: Stores) -> Backup:
    """Load a backup of Redis into a scratch server, compare every key with the manifest, and mark it as verified.

    Raises:
        OpsError: there is no backup, or this server program cannot load it.
        RunbookFailed: it is damaged, or differs from its manifest.
    """
    backup = choose_backup(report, env, "redis", wanted, source, failed_too=True)
    report.fail_if_critical()
    started = time.monotonic()
    comparison = prove_backup(env.redis, backup)
    report.fact("restored in", duration(time.monotonic() - started))
    report.fact("keys expired since the backup", f"{comparison.expired_since:,}")
    report.table("Proven equal to the backup", COLUMNS, comparison.rows())
    report.require(
        "scratch server equal to the backup",
        comparison.is_equal,
        "verify another backup, and take a new one",
        value="; ".join(comparison.differences[:3]) or f"every key, in {len(comparison.proofs)} databases",
        expected="no difference",
    )
    if not comparison.is_equal:
        mark_failed(report, backup, comparison.differences[0])
    report.fail_if_critical()
    mark_verified(report, backup)
    return backup
