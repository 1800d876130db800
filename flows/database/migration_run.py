"""Migrations on the live database: what comes out is as rehearsed, and a failure says in which state it left things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import psycopg

from blocks.environment import Environment
from flows.database.rehearsal import Rehearsed, compare_live
from runbook.errors import OpsError
from runbook.render import duration
from runbook.report import Report, Status
from runbook.wait import until
from tasks.migrations.alembic import Migrated
from tasks.migrations.program import revision_of
from tasks.migrations.rehearsal import differences, read_live_schema
from tasks.migrations.scripts import BASE, Script

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
    report.expect(
        "schema",
        not other,
        "somebody changed it meanwhile, or the migration depends on the moment: look at both",
        value="; ".join(other[:3]) or f"{len(rehearsed.after.definitions)} definitions as rehearsed",
        expected="as rehearsed",
        otherwise=Status.WARN,
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
