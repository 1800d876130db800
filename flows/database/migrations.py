"""Alembic migrations (§1.1): checked, applied, rolled back, created."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.database import expectations
from flows.database.migration import live, rehearsal, revisions
from flows.database.migration.rehearsal import Rehearsed, judge_expectations
from flows.database.migration.review import find_unfinished, judge_new, rehearse_new, scratch_at
from flows.pinned import pin_database
from runbook.change import Change, Check, State, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted
from tasks.migrations.alembic import (
    MigratedDatabase,
    MigrationUndo,
    Upgrade,
    downgrade,
    read_revision,
    upgrade_live,
)
from tasks.migrations.rehearsal import read_live_schema
from tasks.migrations.revision import check_message, create_revision
from tasks.migrations.scratch import scratch_name
from tasks.migrations.scripts import BASE, Script, read_heads
from tasks.postgres.server.server import read_database_bytes

Seconds = Annotated[float, Field(ge=0, le=86400)]
FIX = "fix the findings above, then run this again"


@flow(name="check-migrations", flow_run_name=RunName("check-migrations {environment}"))
def check_migrations(environment: str, rehearse: bool = False, longest_lock_seconds: Seconds = 10.0) -> Report:
    """マイグレーションの適用: 状態と履歴の確認 (§1.1)

    Shows the database's revision, the pending migrations, the history, the heads, and scripts whose downgrade is empty.
    Alembic imports the scripts, so their top level runs, as in `alembic history`; upgrade and downgrade do not run. Run
    it before a release, and after a failed one.

    It changes nothing. With `rehearse` the pending migrations run on a scratch copy (up, down, up), which is then
    dropped. That needs twice the database's space and shows the locks and the data loss before anybody confirms.
    Evidence: history, locks, losses.

    Departs from the manual: `alembic history` does not show that a downgrade is empty.

    Args:
        environment: Environment (lab, staging, production …)
        rehearse: Try pending migrations in a copy of the database
        longest_lock_seconds: Warn of locks that would block others longer than this, in seconds
    """
    env = Environment.find(environment)
    with runbook("Check migrations", env, changes=rehearse) as report:
        current = read_revision(env.postgres, env.postgres.database)
        heads = read_heads(env.application)
        revisions.judge_heads(report, heads, current)
        applied = heads.applied(current)
        revisions.show_history(report, heads, applied, current)
        pending = [script for script in reversed(heads.scripts) if script.revision not in applied]
        report.prefer(
            "pending migrations",
            not pending,
            "run apply-migrations",
            value=", ".join(s.revision for s in pending[:5]) or "none",
            expected="none",
            follow=[Next("apply-migrations", "see the plan, then apply them")],
        )
        revisions.judge_downgrades(report, heads.scripts, Status.WARN)
        report.outcome = f"{env.postgres.database} is at {current or 'no revision'}, {len(pending)} pending"
        if pending and rehearse:
            rehearsal.judge_space(report, env, read_database_bytes(env.postgres, env.postgres.database))
            report.fail_if_critical()
            expectations.prepare(env)
            rehearsed = rehearsal.rehearse(
                report, env, current, heads.one(), first="up", longest=longest_lock_seconds, stops=False
            )
            live.judge_upgrade(report, env, rehearsed)
    return report


@flow(name="apply-migrations", flow_run_name=RunName("apply-migrations {environment} {revision}"))
def apply_migrations(
    environment: str, revision: str = "head", longest_lock_seconds: Seconds = 10.0, plan: str = "", confirm: str = ""
) -> Report:
    """マイグレーションの適用 (§1.1)

    Upgrades the application's database to an Alembic revision, by default the newest. Run it with a release that has
    new migrations. Without `confirm` it lists the pending ones and changes nothing.

    First they run on a scratch copy of the database: up, down, up. A failure or a long lock there stops the run before
    it changes the live database, and data loss is reported. Only rehearsed migrations run. In production it needs a
    verified backup younger than the RPO, or takes one. To undo: rollback-migrations, or that backup. Evidence: the
    locks, the losses, the revision, the schema compared with the rehearsal, the expectations.

    Departs from the manual: several heads are an error, and a migration gives up a lock after 10 s. The rehearsal warns
    if env.py's driver (asyncpg) ignores PGOPTIONS and would not give up.

    Args:
        environment: Environment (lab, staging, production …)
        revision: head, +1 (the next one), or the ID of a revision (or its first characters)
        longest_lock_seconds: If a lock on the copy blocks others longer than this (seconds), stop before production is
            touched
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Apply migrations", env, confirm, plan, changes=True) as report:
        name = env.postgres.database
        current, heads = read_revision(env.postgres, name), read_heads(env.application)
        pending = revisions.judge_pending(report, heads, current, revision)
        if not pending:
            report.outcome = f"nothing is pending: {name} is at {current or 'no revision'}"
            return report
        report.pin("revision", pending[-1].revision)
        expectations.prepare(env)
        revisions.judge_downgrades(report, pending, Status.WARN)
        size = read_database_bytes(env.postgres, name)
        rehearsal.judge_space(report, env, size)
        ends = current, pending[-1].revision
        rehearse = _rehearsing(report, env, ends, size, longest_lock_seconds)
        backups = live.backing_up(report, env)
        action = upgrade_live.bind(env.postgres, env.application, Upgrade(current, pending))
        migrate = live.migrating(env, pending, ends, [_up(script) for script in pending], action)
        check = _checking(report, env)
        effect = Effect(
            f"{name} goes from {current or BASE} to {pending[-1].revision} ({counted(len(pending), 'migration')})",
            "rollback-migrations",
            "a rehearsal on a copy finds first what is lost",
            f"a lock waits at most {longest_lock_seconds:g} s",
        )
        pins = [lambda report: pin_database(report, env.postgres)]
        with carrying_out(report, rehearse, *backups, migrate, check, effect=effect, pins=pins) as carry:
            rehearsed = carry(rehearse)
            live.judge_upgrade(report, env, rehearsed)
            live.secure_backup(report, env, carry, backups)
            carry(check, rehearsed, carry(migrate, read_live_schema(env.postgres, name)))
        report.outcome = f"{name} is at {ends[1]}"
    return report


def _rehearsing(
    report: Report, env: Environment, ends: tuple[str, str], size: int, longest: float
) -> Change[[], Rehearsed]:
    name = env.postgres.database
    return Change(
        lambda: rehearsal.rehearse(report, env, *ends, first="up", longest=longest),
        "rehearse up, down, up",
        f"on the scratch copy {scratch_name(name)} (check-migrations with rehearse=true shows locks)",
        size=size,
        seconds=size / rehearsal.COPY_BYTES_PER_SECOND + 5,
        begun=State(f"{name} is unchanged, at {ends[0] or BASE}", FIX),
    )


def _up(script: Script) -> PlannedStep:
    return PlannedStep("migrate", f"{', '.join(script.down) or 'nothing'} → {script.revision}: {script.title}")


def _down(script: Script) -> PlannedStep:
    return PlannedStep("roll back", f"{script.revision} → {', '.join(script.down) or BASE}: {script.title}")


def _checking(report: Report, env: Environment) -> Check[[Rehearsed, MigratedDatabase], None]:
    def check(rehearsed: Rehearsed, done: MigratedDatabase) -> None:
        live.judge_result(report, env, rehearsed, done)
        judge_expectations(report, env, env.postgres.database, "after it")

    sound = ", expectations on the migrated data" * bool(env.suites)
    return Check(check, "check", f"revision, schema as rehearsed{sound}", seconds=2)


@flow(name="rollback-migrations", flow_run_name=RunName("rollback-migrations {environment} {revision}"))
def rollback_migrations(
    environment: str,
    revision: str = "-1",
    lose_rows: Annotated[int, Field(ge=0)] = 0,
    longest_lock_seconds: Seconds = 10.0,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """マイグレーションのロールバック (§1.1)

    Downgrades the application's database to an older revision: one step, several, a named one, or base. Run it when a
    release is rolled back, after the older code is deployed: newer code may fail on an older schema.

    The plan already runs down, up, down on a scratch copy to find the rows and columns that are lost. To confirm a
    loss, enter the number of rows that are deleted or lose a column's value. An empty downgrade is refused. In
    production it needs a verified backup younger than the RPO, or takes one. To undo: apply-migrations restores the
    schema, that backup the data. Evidence: the losses, the locks, the revision.

    Departs from the manual: `downgrade base` deletes everything without a warning.

    Args:
        environment: Environment (lab, staging, production …)
        revision: -1 (the one before), -2 …, the ID of a revision (or its first characters), or base (the initial state)
        lose_rows: Rows of data that may be lost (deleted rows, and rows with values in deleted columns; the plan shows
            the number)
        longest_lock_seconds: If a lock on the copy blocks others longer than this (seconds), stop
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Rollback migrations", env, confirm, plan, changes=True, without_confirm="stages") as report:
        name = env.postgres.database
        current, heads = read_revision(env.postgres, name), read_heads(env.application)
        report.fact("revision of the database", current or "none")
        target, undone = heads.undone(current, revision)
        if not undone:
            report.outcome = f"nothing to roll back: {name} is at {current or BASE}"
            return report
        report.pin("revision", target or BASE)
        report.state_is(f"{name} is unchanged, at {current}", FIX)
        revisions.judge_downgrades(report, undone, Status.CRITICAL)
        size = read_database_bytes(env.postgres, name)
        rehearsal.judge_space(report, env, size)
        live.judge_backend(report, env, target)
        report.fail_if_critical()
        rehearsed = rehearsal.rehearse(report, env, current, target, first="down", longest=longest_lock_seconds)
        undo = live.judge_losses(report, env, rehearsed, MigrationUndo(current, target, undone), lose_rows)
        backups = live.backing_up(report, env)
        action = downgrade.bind(env.postgres, env.application, undo)
        roll_back = live.migrating(env, undone, (current, target), [_down(script) for script in undone], action)
        check = Check(partial(live.judge_result, report, env), "check", "revision, schema as rehearsed", seconds=2)
        effect = Effect(
            f"{name} goes from {current} back to {target or BASE} ({counted(len(undone), 'migration')})",
            "apply-migrations, and the backup for the rows",
            f"data of {counted(undo.rows, 'row')} is lost" if undo.rows else "",
            f"a lock waits at most {longest_lock_seconds:g} s",
        )
        pins = [lambda report: pin_database(report, env.postgres, replaced=True)]
        with carrying_out(report, *backups, roll_back, check, effect=effect, pins=pins) as carry:
            live.secure_backup(report, env, carry, backups)
            carry(check, rehearsed, carry(roll_back, read_live_schema(env.postgres, name)))
        report.outcome = f"{name} is at {target or BASE}"
    return report


@flow(name="create-migration", flow_run_name=RunName("create-migration {environment} {message}"))
def create_migration(environment: str, message: str = "", autogenerate: bool = True) -> Report:
    """新規マイグレーションの作成 (§1.1)

    Writes a new migration into the application's directory: generated from the difference between its models and its
    migrations, or empty. Run it in development, in the repository. Run it again with the same message to check the
    edited file.

    The run is CRITICAL while upgrade or downgrade is empty, or while up, down, up changes the schema of an empty
    scratch database. It reads and changes no live data; to undo, delete the file. Evidence: the file, and the checklist
    of changes that autogenerate misses.

    Departs from the manual: it compares the models with a scratch database at head, not with a live one.

    Args:
        environment: Environment (not production)
        message: Message (required, one line)
        autogenerate: Generate it from the difference to the models. Off: an empty file
    """
    env = Environment.find(environment)
    with runbook("Create migration", env, changes=True) as report:
        title = check_message(message)
        if env.tier == "production":
            raise OpsError(
                f"{env.name} is production: migrations are created in the repository and deployed with a release",
                "run this in development, review and commit the file, deploy it",
            )
        heads = read_heads(env.application)
        current = read_revision(env.postgres, env.postgres.database)
        revisions.judge_heads(report, heads, current)
        report.fail_if_critical()
        script = existing = find_unfinished(heads, heads.applied(current), title)
        if existing or autogenerate:
            with scratch_at(report, env, next(iter(existing.down if existing else heads.names), "")) as scratch:
                script = existing or create_revision(env.postgres, env.application, title, scratch)
                if script and script.upgrade == script.downgrade == "written":
                    rehearse_new(report, env, scratch, script)
        else:
            script = create_revision(env.postgres, env.application, title)
        if not script:
            report.outcome = (
                "nothing was created: models and migrations agree (write changes that autogenerate misses by hand)"
            )
            return report
        judge_new(report, script, generated=autogenerate and not existing)
        report.outcome = f"{script.path.name}: " + ("checked again" if existing else "created, needs a review")
    return report
