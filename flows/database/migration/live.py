"""Migrations of the live database: backup before, losses, run, and the state after a failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import psycopg
from prefect.context import FlowRunContext

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.migration.rehearsal import (
    MOST_SHOWN,
    Rehearsed,
    compare_live,
    counted,
    dropped_columns,
)
from flows.store import store_for
from runbook.change import Carrier, Change, State
from runbook.errors import OpsError, VerificationFailed
from runbook.guard.permit import PlannedStep
from runbook.kinds import Bound
from runbook.report import Report, Status
from runbook.units import duration
from runbook.wait import until
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup
from tasks.host.services import read_services
from tasks.migrations.alembic import MigratedDatabase, MigrationUndo
from tasks.migrations.program import revision_of
from tasks.migrations.rehearsal import MigrationLoss, differences, read_live_schema
from tasks.migrations.scripts import BASE, Script


def find_verified(report: Report, env: Environment) -> Backup | None:
    """The newest verified backup of this environment, if it is younger than the RPO."""
    store = store_for(env, "postgres")
    for name in reversed(catalogue.names(store, "postgres")):
        try:
            backup = catalogue.open_backup(store, name)
        except VerificationFailed:
            continue
        if backup.age_seconds > env.rpo_seconds:
            break
        if backup.verified and backup.manifest.environment == env.name:
            report.fact("verified backup", f"{name}, taken {duration(backup.age_seconds)} ago")
            return backup
    report.fact("verified backup", f"none younger than {duration(env.rpo_seconds)}: this run takes one first")
    return None


def backing_up(report: Report, env: Environment) -> list[Change[[], str]]:
    """In production a backup, unless a verified one is younger than the RPO when the live database changes."""
    if env.tier != "production":
        return []
    verified, database = find_verified(report, env), env.postgres.database
    detail = f"of {database}: no verified one is younger than the RPO"
    if verified:
        detail = f"of {database}, if {verified.name} is older than the RPO by then"

    def back_up() -> str:
        taken = backup_database(env.name) if FlowRunContext.get() else backup_database.fn(env.name)
        return taken.facts.get("backup", "")

    return [Change(back_up, "take a backup", detail, is_optional=True)]


def secure_backup(report: Report, env: Environment, carry: Carrier, backups: Sequence[Change[[], str]]) -> None:
    """Take the backup, directly before the live database changes. The age is judged again: time has passed."""
    for backup in backups:
        if verified := find_verified(report, env):
            carry.skip(backup, f"{verified.name} is verified, and younger than the RPO")
        else:
            report.fact("backup taken first", carry(backup))


def judge_backend(report: Report, env: Environment, target: str) -> None:
    """Warn about a running backend: newer code may fail on an older schema, and its version is unknown here."""
    report.fact(
        "before you roll back", f"deploy the release whose migrations end at {target or BASE}, or stop the backend"
    )
    if not env.has("services") or "backend" not in env.services.names:
        return
    running = read_services(env.services, ["backend"]).running["backend"]
    report.prefer(
        "backend",
        not running,
        "stop it, or deploy the older release first: newer code may fail on the older schema",
        value="running" if running else "stopped",
        expected="stopped, or the older release",
    )


def show_losses(report: Report, env: Environment, rehearsed: Rehearsed) -> list[MigrationLoss]:
    """Deleted rows (found on the copy), and rows that lose a column's value (counted in the live database)."""
    lost = counted(env, rehearsed.lost)
    rows = [(x.table, f"{x.rows:,}", x.what) for x in lost]
    report.table("Data loss", ("table", "rows", "loss"), rows, most=MOST_SHOWN)
    if emptied := [loss for loss in lost if loss.columns]:
        report.warn(
            "columns that are lost",
            "copy the values before the migration if you need them: later they are only in the backup",
            value="; ".join(f"{x.table} ({x.rows:,} rows): {x.what}" for x in emptied[:3]),
        )
    return lost


def judge_upgrade(report: Report, env: Environment, rehearsed: Rehearsed) -> None:
    """The data that an upgrade loses. It may be intended, but nobody would notice it later."""
    rows = [loss for loss in show_losses(report, env, rehearsed) if loss.rows and not loss.columns]
    report.prefer(
        "rows that are lost",
        not rows,
        "have the migration copy them to another table if the loss is not intended: later they are only in the backup",
        value="; ".join(f"{x.table}: {x.rows:,} rows, {x.what}" for x in rows[:3]) or "none",
        expected="none",
    )


def judge_losses(
    report: Report, env: Environment, rehearsed: Rehearsed, undo: MigrationUndo, accepted: int
) -> MigrationUndo:
    """The data that a rollback loses. The operator confirms it with the number of rows (`accepted`)."""
    lost = show_losses(report, env, rehearsed)
    tables = tuple(dict.fromkeys(loss.table for loss in lost if loss.rows))
    rows = sum(loss.rows for loss in lost)
    value = f"{rows:,} in {len(tables)} tables"
    report.fact("rows that are lost", value)
    report.require(
        "rows that are lost",
        rows <= accepted,
        f"run this with lose_rows={rows} if the loss is intended",
        value=value,
        expected=f"at most {accepted:,}",
        worst=Status.CRITICAL if report.confirm or report.unattended else Status.WARN,
    )
    return replace(
        undo,
        tables=tables,
        dropped=tuple(loss.table for loss in lost if loss.dropped),
        columns=dropped_columns(rehearsed.lost),
        deleted=sum(loss.rows for loss in lost if not (loss.dropped or loss.columns)),
        rows=max(rows, accepted),
    )


# How long to wait for a server that stopped answering, to report the state of the database.
ANSWER_SECONDS = 60.0


def migrating(
    env: Environment,
    scripts: Sequence[Script],
    ends: tuple[str, str],
    lines: Sequence[PlannedStep],
    action: Bound[[], MigratedDatabase],
) -> Change[[Mapping[str, str]], MigratedDatabase]:
    """The migrations of the live database, called with its definitions before them.

    After a failure, the database's state is read and compared. `ends`: its revision before and after.
    """
    database, (before, target) = env.postgres.database, ends
    definitions = dict[str, str]()

    def migrate(known: Mapping[str, str]) -> MigratedDatabase:
        definitions.update(known)
        try:
            return action()
        except psycopg.Error as error:
            raise OpsError(str(error).splitlines()[0], "check the server's log") from None

    return Change(
        migrate,
        lines[0].step,
        lines[0].detail,
        more=lines[1:],
        by=[action],
        pins=[lambda report: report.pin_state("revision of the database", before or BASE)],
        begun=State(
            f"{database} is at {before or BASE}, or part of the way to {target or BASE}",
            "run check-migrations to see its revision, then run this again",
        ),
        failed=lambda _: _state_after(env, scripts, ends, definitions),
        done=lambda done: State(f"{database} is at {done.after or BASE}", "run this again: it finds nothing to do"),
    )


def judge_result(report: Report, env: Environment, rehearsed: Rehearsed, done: MigratedDatabase) -> None:
    """Compare the migrated schema with the rehearsed one."""
    report.fact("Alembic revision", f"{done.before or 'none'} → {done.after or 'none'}")
    report.fact("took", duration(done.seconds))
    report.table("Output of Alembic", ("line",), [(line,) for line in done.output.splitlines()])
    other = compare_live(report, env, rehearsed)
    report.prefer(
        "schema",
        not other,
        "compare both schemas: somebody changed the live one, or the migration's result depends on the time",
        value="; ".join(other[:3]) or f"{len(rehearsed.after.definitions)} definitions as rehearsed",
        expected="as rehearsed",
    )


def _state_after(
    env: Environment, scripts: Sequence[Script], ends: tuple[str, str], before: Mapping[str, str]
) -> State:
    """The database's state after a failure, read and compared."""
    database, target = env.postgres.database, ends[1]

    def read() -> tuple[str, Mapping[str, str]]:
        return revision_of(env.postgres, database), read_live_schema.work(env.postgres, database)

    try:
        now, schema = until(read, what="an answer of the server", seconds=ANSWER_SECONDS, every_seconds=0.5)
    except (OpsError, psycopg.Error):
        return State(
            f"the server does not answer, so the revision of {database} is unknown: committed migrations stay, an open "
            "transaction is rolled back at the start",
            "start PostgreSQL, run check-migrations, then run this again: it continues from the revision it finds",
        )
    other = differences(before, schema)
    if now == ends[0] and not other:
        return State(
            f"nothing was changed: {database} is at {now or BASE}, with the same definitions as before",
            "fix the error above, then run this again",
        )
    if now == ends[0]:
        names = ", ".join(script.revision for script in scripts if not script.transactional) or "one of them"
        return State(
            f"{database} is at {now or BASE}, but part of a migration is committed ({names} commits in between): "
            + "; ".join(other[:3]),
            "remove that part (an invalid index: DROP INDEX CONCURRENTLY), then run this again",
        )
    return State(
        f"{database} is at {now or BASE}: "
        + ("all migrations are done" if now == target else "some migrations are done, each complete"),
        "run this again to do the rest",
    )
