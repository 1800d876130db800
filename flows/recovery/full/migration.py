"""The migrations of a restored database: judged in the plan, run on the staged copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.kinds import permitted_by
from runbook.report import Report
from tasks.application.staged_files import FilesCopy
from tasks.backups import entries as listing
from tasks.backups.catalogue import Backup
from tasks.migrations.alembic import MigratedDatabase, upgrade
from tasks.migrations.command import MigrationFailed, run_command
from tasks.migrations.packed import backend_in, packs_alembic, read_packed_heads
from tasks.migrations.scripts import INI, MigrationHeads, read_heads


def uses_alembic(env: Environment, files: Backup | None, revision: str) -> bool:
    """Whether Alembic migrates this database: it has a revision, or there is an `alembic.ini`."""
    if not env.has("application") or not env.application.backend_directory or env.application.migrate_command:
        return False
    live = (Path(env.application.backend_directory) / INI).is_file()
    return bool(revision) or live or bool(files and packs_alembic(env.application, files))


def judge(report: Report, env: Environment, revision: str, files: Backup | None) -> None:
    """Judge whether the migrations can run on the copy: Alembic's Python, its scripts, one head, a known revision; or
    another tool's command. The scripts are those that will be live: the files backup's where it contains the backend.

    Args:
        revision: the backup's; empty where it has none, or where it is not known yet
    """
    if env.has("application") and env.application.migrate_command:
        program = env.application.migrate_command[0]
        _judge_program(report, env, files, "migrate_command", program)
        how = f"{' '.join(env.application.migrate_command)}; meanwhile the live database refuses changes of its schema"
        report.plan("migrate the copy", how, by=[run_command])
        return
    if not uses_alembic(env, files, revision):
        report.fact("migrations", "none: the environment has no Alembic and no [application] migrate_command")
        if revision:
            hint = "set [application] backend_directory and python, or migrate after the restore"
            report.warn("migrations", hint, value=f"the backup stays at revision {revision}")
        return
    _judge_program(report, env, files, "python", env.application.python)
    try:
        pending = _heads(env, files).pending(revision)
    except OpsError as error:
        hint = "correct [application] backend_directory: alembic upgrade head runs there on the copy"
        report.fail(
            "migrations",
            error.hint or hint,
            value=error.message,
            expected=f"one head, and revision {revision or 'none'} known",
        )
        return
    names = ", ".join(script.revision for script in pending) or "nothing pending"
    how = f"alembic upgrade head, from {revision or 'no revision'}: {names}"
    report.plan("migrate the copy", how, by=[upgrade])


def _heads(env: Environment, files: Backup | None) -> MigrationHeads:
    if files and packs_alembic(env.application, files):
        return read_packed_heads(env.application, files)
    return read_heads(env.application)


def _judge_program(report: Report, env: Environment, files: Backup | None, key: str, program: str) -> None:
    """It must exist now, or be in the files backup (a virtual environment below the application's directory)."""
    there = bool(program) and shutil.which(program) is not None
    root = env.application.directory
    if not there and files and root and Path(program).is_relative_to(root):
        names = {entry.path for entry in listing.entries_of(files.manifest)}
        there = Path(program).relative_to(root).as_posix() in names
    report.require(
        f"program of [application] {key}",
        there,
        f"install it, or correct [application] {key}",
        value=program or "not set",
        expected="an executable, on this host or in the files backup",
    )


def migrate(
    report: Report,
    permit: Permit,
    env: Environment,
    database: str,
    files: FilesCopy | None,
    *,
    revision: str,
    after: object,
) -> MigratedDatabase | None:
    """Migrate the copy with the code that will run on it. None: nothing changed.

    Args:
        revision: the backup's

    Raises:
        as `upgrade` and `run_command`; what is known of the live database is in the report.
    """
    if not env.has("application"):
        return None
    application, inside = env.application, backend_in(env.application)
    backend = files.path / inside if files and inside is not None else Path(application.backend_directory)
    if application.migrate_command:
        try:
            with permitted_by(permit, after=after):
                done = run_command.bind(env.postgres, application)(database, backend)
        except MigrationFailed as error:
            _report_failure(report, error)
            raise
        report.fact("migrated by", f"{application.migrate_command[0]}, {done.seconds:.1f} s")
        _report_run(report, done.output, done.live)
        return done
    if not application.backend_directory or not (revision or (backend / INI).is_file()):
        return None
    with permitted_by(permit, after=after):
        done = upgrade.bind(env.postgres, application)(database, backend_directory=backend)
    return done if report_revision(report, done) else None


def _report_run(report: Report, output: str, live: str) -> None:
    if live:
        report.fact("live database during the migration", live)
    report.table("Output of the migration command", ("line",), [(line,) for line in output.splitlines()])


def _report_failure(report: Report, error: MigrationFailed) -> None:
    """The command's output, and the state of a live database that it may have changed."""
    _report_run(report, error.output, error.live.text if error.live else "")
    if error.live and not error.live.is_unchanged:
        hint = "find out what the command writes and compare it with the newest backup, then run this again"
        report.state_is(f"nothing live was replaced, but {error.live.text}", hint)


def report_revision(report: Report, done: MigratedDatabase) -> bool:
    """Report the schema's revision. Returns whether it changed."""
    changed = done.before != done.after
    report.fact("Alembic revision", f"{done.before} → {done.after}" if changed else f"{done.after}, nothing pending")
    return changed
