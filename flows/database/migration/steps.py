"""What every flow on migrations does: judge scripts and revision, have a backup, run, say what a failure left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import psycopg
from prefect.context import FlowRunContext

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.migration.rehearsal import (
    COPY_BYTES_PER_SECOND,
    MOST_SHOWN,
    Rehearsed,
    compare_live,
    counted,
    dropped_columns,
)
from flows.store import store_for
from runbook.errors import OpsError, VerificationFailed
from runbook.report import Report, Status
from runbook.units import duration
from runbook.wait import until
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup
from tasks.host.services import read_services
from tasks.migrations.alembic import Migrated, Undo
from tasks.migrations.program import revision_of
from tasks.migrations.rehearsal import Loss, differences, read_live_schema
from tasks.migrations.scratch import scratch_name
from tasks.migrations.scripts import BASE, Heads, Script

UNREVERSIBLE_HINT = "write it in the application's repository; until then the only way back is a backup"


def judge_heads(report: Report, heads: Heads, current: str) -> None:
    """Where the database and the application's migrations are; several heads are an error."""
    report.fact("revision of the database", current or "none")
    report.fact("heads of the application", ", ".join(heads.names) or "none")
    report.require(
        "one head",
        len(heads.names) < 2,
        "merge them (`alembic merge heads`) in the application's repository, test it, and deploy that",
        value=", ".join(heads.names) or "none",
        expected="one",
    )


def judge_pending(report: Report, heads: Heads, current: str, revision: str) -> tuple[Script, ...]:
    """What is pending. Several heads, an unknown revision, and a schema newer than the code end the run here."""
    judge_heads(report, heads, current)
    report.fail_if_critical()
    pending = heads.pending(current, revision)
    value = ", ".join(script.revision for script in pending) or f"none up to {revision}"
    report.passed("pending migrations", value=value)
    return pending


def judge_downgrades(report: Report, scripts: Sequence[Script], otherwise: Status) -> None:
    """Scripts whose downgrade does not lead back, found by reading them."""
    bad = [script for script in scripts if not script.reversible]
    report.require(
        "downgrades",
        not bad,
        UNREVERSIBLE_HINT,
        value="; ".join(f"{s.revision} ({s.path.name}): {s.downgrade}" for s in bad[:5])
        + (f" and {len(bad) - 5} more" if bad[5:] else "")
        or f"{len(scripts)} written",
        expected="one that undoes its upgrade, in every script",
        worst=otherwise,
    )


def tell_history(report: Report, heads: Heads, applied: set[str], current: str) -> None:
    """Every migration, newest first."""
    rows = [
        (
            script.revision,
            script.title,
            ", ".join(script.down) or "—",
            "current" if script.revision == current else "applied" if script.revision in applied else "pending",
            script.downgrade if script.reversible else f"🛑 {script.downgrade}",
            "" if script.transactional else "commits in between",
        )
        for script in heads.scripts
    ]
    more = f" (the newest {MOST_SHOWN}; {len(rows) - MOST_SHOWN} more)" if rows[MOST_SHOWN:] else ""
    report.table(
        f"History{more}", ("revision", "title", "after", "state", "downgrade", "transaction"), rows[:MOST_SHOWN]
    )


def find_verified(report: Report, env: Environment) -> Backup | None:
    """The newest backup of this environment whose restore was proven, if it is younger than the RPO."""
    store = store_for(env, "postgres")
    for name in reversed(catalogue.names(store, "postgres")):
        try:
            backup = catalogue.open_backup(store, name)
        except VerificationFailed:
            continue
        if backup.age_seconds > env.rpo_seconds:
            break
        if backup.verified and backup.manifest.environment == env.name:
            report.fact("verified backup", f"{name}, {duration(backup.age_seconds)} old")
            return backup
    report.fact("verified backup", f"none younger than {duration(env.rpo_seconds)}: one is taken first")
    return None


def plan_backup(report: Report, env: Environment) -> None:
    """In production a verified backup younger than the RPO, or a new one."""
    if env.tier == "production" and not find_verified(report, env):
        report.plan("take a backup", f"of {env.postgres.database}, since no verified one is younger than the RPO")


def secure_backup(report: Report, env: Environment) -> None:
    """Take it, as the last thing before the live database is touched. Time has passed since the plan: judged again."""
    if env.tier == "production" and not find_verified(report, env):
        taken = backup_database(env.name) if FlowRunContext.get() else backup_database.fn(env.name)
        report.fact("backup taken first", taken.facts.get("backup", ""))


def plan_rehearsal(report: Report, env: Environment, size_bytes: int, ways: str) -> None:
    """The copy and the ways on it."""
    report.plan(
        f"rehearse {ways}",
        f"on {scratch_name(env.postgres.database)}, a copy (its locks beforehand: check-migrations with rehearse=true)",
        size=size_bytes,
        seconds=size_bytes / COPY_BYTES_PER_SECOND + 5,
    )


def judge_backend(report: Report, env: Environment, target: str) -> None:
    """Newer code may not run on an older schema: this flow cannot see which code runs, only whether it does."""
    report.fact(
        "before you roll back", f"deploy the release whose migrations end at {target or BASE}, or stop the backend"
    )
    if not env.has("services") or "backend" not in env.services.names:
        return
    running = read_services(env.services, ["backend"]).running["backend"]
    report.prefer(
        "backend",
        not running,
        "stop it, or have it run the older release first: newer code fails on an older schema",
        value="running" if running else "stopped",
        expected="not the newer code",
    )


def tell_losses(report: Report, env: Environment, rehearsed: Rehearsed) -> list[Loss]:
    """Rows that go (seen on the copy), and rows that lose what is in a column (counted in the live database)."""
    lost = counted(env, rehearsed.lost)
    report.table(
        "What is lost", ("table", "rows", "what"), [(x.table, f"{x.rows:,}", x.what) for x in lost[:MOST_SHOWN]]
    )
    if emptied := [loss for loss in lost if loss.columns]:
        report.warn(
            "columns that are lost",
            "what is in them stays in the newest backup only",
            value="; ".join(f"{x.table} ({x.rows:,} rows): {x.what}" for x in emptied[:3]),
        )
    return lost


def judge_upgrade(report: Report, env: Environment, rehearsed: Rehearsed) -> None:
    """What an upgrade loses: it may be meant, and nobody is left to find it out afterwards."""
    rows = [loss for loss in tell_losses(report, env, rehearsed) if loss.rows and not loss.columns]
    report.prefer(
        "rows that are lost",
        not rows,
        "they stay in the newest backup only: have the migration keep them aside, where that is not meant",
        value="; ".join(f"{x.table}: {x.rows:,} rows, {x.what}" for x in rows[:3]) or "none",
        expected="none",
    )


def judge_losses(report: Report, env: Environment, rehearsed: Rehearsed, undo: Undo, accepted: int) -> Undo:
    """What a rollback loses. Whoever confirms types the number of rows."""
    lost = tell_losses(report, env, rehearsed)
    tables = tuple(dict.fromkeys(loss.table for loss in lost if loss.rows))
    rows = sum(loss.rows for loss in lost)
    value = f"{rows:,} in {len(tables)} tables"
    report.fact("rows that are lost", value)
    if report.confirm:
        hint = f"if that is meant, launch it with lose_rows={rows}"
        report.require("rows that are lost", rows <= accepted, hint, value=value, expected=f"at most {accepted:,}")
    elif rows:
        report.plan("lose rows", f"{value} (What is lost names them): confirm with lose_rows={rows}")
    return replace(
        undo,
        tables=tables,
        dropped=tuple(loss.table for loss in lost if loss.dropped),
        columns=dropped_columns(rehearsed.lost),
        deleted=sum(loss.rows for loss in lost if not (loss.dropped or loss.columns)),
        rows=max(rows, accepted),
    )


# How long a server that went away is waited for, to say in which state it is.
ANSWER_SECONDS = 60.0


def carry_out(
    report: Report,
    env: Environment,
    scripts: Sequence[Script],
    ends: tuple[str, str],
    rehearsed: Rehearsed,
    work: Callable[[], Migrated],
) -> None:
    """Run it on the live database, and compare its schema with the rehearsed one; where it fails say in which state
    the database is. `ends` are its revision before and after."""
    database, (before, target) = env.postgres.database, ends
    schema = read_live_schema(env.postgres, database)
    report.state_is(
        f"{database} is at {before or BASE}, or on its way to {target or BASE}",
        "check-migrations tells where; then launch this again",
    )
    try:
        done = work()
    except (OpsError, psycopg.Error) as error:
        _tell_state(report, env, scripts, ends, schema)
        if isinstance(error, OpsError):
            raise
        raise OpsError(str(error).splitlines()[0], "look at the server's log") from None
    report.state_is(f"{database} is at {done.after or BASE}", "launch this again: it finds nothing to do")
    report.fact("Alembic revision", f"{done.before or 'none'} → {done.after or 'none'}")
    report.fact("took", duration(done.seconds))
    report.table("What Alembic said", ("line",), [(line,) for line in done.output.splitlines()])
    other = compare_live(report, env, rehearsed)
    report.prefer(
        "schema",
        not other,
        "somebody changed it meanwhile, or the migration depends on the moment: look at both",
        value="; ".join(other[:3]) or f"{len(rehearsed.after.definitions)} definitions as rehearsed",
        expected="as rehearsed",
    )


def _tell_state(
    report: Report, env: Environment, scripts: Sequence[Script], ends: tuple[str, str], before: Mapping[str, str]
) -> None:
    """What the database is after a failure, compared, not assumed."""
    database, target = env.postgres.database, ends[1]

    def read() -> tuple[str, Mapping[str, str]]:
        return revision_of(env.postgres, database), read_live_schema.work(env.postgres, database)

    try:
        now, schema = until(read, what="an answer of the server", seconds=ANSWER_SECONDS, every_seconds=0.5)
    except (OpsError, psycopg.Error):
        report.state_is(
            f"the server does not answer, so the revision of {database} is unknown: what was open is rolled back when "
            "it starts, what Alembic committed stays",
            "start PostgreSQL, launch check-migrations, then this again: it goes on from where it finds the database",
        )
        return
    other = differences(before, schema)
    if now == ends[0] and not other:
        report.state_is(
            f"nothing was changed: {database} is at {now or BASE}, every definition is what it was",
            "put right what is said above, then launch this again",
        )
    elif now == ends[0]:
        names = ", ".join(script.revision for script in scripts if not script.transactional) or "one of them"
        report.state_is(
            f"{database} is at {now or BASE}, yet half of a migration is there ({names} commits in between): "
            + "; ".join(other[:3]),
            "remove what it left (an invalid index: DROP INDEX CONCURRENTLY), then launch this again",
        )
    else:
        report.state_is(
            f"{database} is at {now or BASE}: " + ("all was done" if now == target else "some of it was done, whole"),
            "launch this again: it does what is left",
        )
