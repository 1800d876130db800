"""Applying Alembic's migrations (§1.1)."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.context import FlowRunContext

from blocks.environment import Environment
from flows.database.backup import backup_database
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import duration
from runbook.report import Report
from runbook.run import runbook
from tasks import catalogue, integrity
from tasks.catalogue import Backup
from tasks.gx import process
from tasks.migrations import MIGRATE, Heads, Script, read_heads, read_revision, upgrade


@flow(name="apply-migrations")
def apply_migrations(environment: str, revision: str = "head", confirm: str = "") -> Report:
    """マイグレーションの適用 (§1.1)

    Brings the application's database to a revision of Alembic's, newest by default. Run it with a release that has new
    migrations. Without `confirm` it says which are pending and changes nothing; where none is, it is OK at once.

    It changes the schema, and data where a migration does. In production it needs a verified backup younger than the
    RPO, or takes a backup first. To undo: `alembic downgrade`, or restore that backup (restore-database). Evidence:
    revision before and after, what Alembic said, the expectations on the migrated data.

    Departs from the manual: several heads are an error; a migration that waits 10 s for a lock gives up.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        revision: head か、リビジョンの ID (先頭の数文字でもよい)
        confirm: 実行するときは環境名を入力。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Apply migrations", env, confirm, changes=True) as report:
        current = read_revision(env.postgres, env.postgres.database)
        heads = read_heads(env.application)
        pending = _judge(report, heads, current, revision)
        if not pending:
            report.outcome = f"nothing is pending: {env.postgres.database} is at {current or 'no revision'}"
            return report
        process.start()
        backup = _find_verified(report, env) if env.tier == "production" else None
        needs_backup = env.tier == "production" and backup is None
        _plan(report, env, current, pending, needs_backup=needs_backup)
        permit = report.permit(Act(MIGRATE, env.postgres.database))
        if needs_backup:
            taken = backup_database(environment) if FlowRunContext.get() else backup_database.fn(environment)
            report.fact("backup taken first", taken.facts.get("backup", ""))
        done = upgrade(permit, env.postgres, env.application, env.postgres.database, pending[-1].revision)
        report.fact("Alembic revision", f"{done.before or 'none'} → {done.after}")
        report.fact("took", duration(done.seconds))
        report.table("What Alembic said", ("line",), [(line,) for line in done.output.splitlines()])
        _expect_sound(report, env)
        report.outcome = f"{env.postgres.database} is at {done.after}"
    return report


def _judge(report: Report, heads: Heads, current: str, revision: str) -> tuple[Script, ...]:
    """What is pending. Several heads, an unknown revision, and a schema newer than the code end the run here."""
    report.fact("revision of the database", current or "none")
    report.fact("heads of the application", ", ".join(heads.names) or "none")
    several = len(heads.names) > 1
    report.expect(
        "one head",
        not several,
        "merge them (`alembic merge heads`) in the application's repository, test it, and deploy that",
        value=", ".join(heads.names),
        expected="one",
    )
    report.fail_if_critical()
    pending = heads.pending(current, revision)
    target = heads.resolve(revision)
    report.expect(
        "pending migrations", True, "", value=", ".join(s.revision for s in pending) or f"none up to {target}"
    )
    return pending


def _find_verified(report: Report, env: Environment) -> Backup | None:
    """The newest backup whose restore was proven, if it is younger than the RPO."""
    store = Path(env.backups.postgres)
    for name in reversed(catalogue.names(store, "postgres")):
        try:
            backup = catalogue.open_backup(store, name)
        except OpsError:
            continue
        if backup.age_seconds > env.rpo_seconds:
            break
        if backup.verified:
            report.fact("verified backup", f"{name}, {duration(backup.age_seconds)} old")
            return backup
    report.fact("verified backup", f"none younger than {duration(env.rpo_seconds)}: one is taken first")
    return None


def _plan(report: Report, env: Environment, current: str, pending: tuple[Script, ...], *, needs_backup: bool) -> None:
    if needs_backup:
        report.plan("take a backup", f"of {env.postgres.database}, since no verified one is younger than the RPO")
    for script in pending:
        report.plan("migrate", f"{', '.join(script.down) or 'nothing'} → {script.revision}: {script.title}")
    report.plan("check", "revision, and the expectations on the migrated data", seconds=2)


def _expect_sound(report: Report, env: Environment) -> None:
    evidence = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}"
    found = integrity.run_expectations(env.postgres, env.postgres.database, evidence)
    report.table("Expectations", ("table", "expectation", "holds", "observed"), found.rows)
    report.expect(
        "expectations",
        not found.broken,
        "look at the table of expectations: the migrated data breaks the application's rules",
        value="; ".join(found.broken[:3]) or f"{sum(row.ok for row in found.rows)} hold",
        expected="all hold",
    )
    if found.missing:
        report.warn(
            "tables and columns that this revision lacks", "migrate to head", value="; ".join(found.missing[:3])
        )
