"""What a rehearsal shows: the locks that migrations take, and whether the migrated data is sound."""

from __future__ import annotations

from blocks.environment import Environment
from flows.database.expectations import FACT, NONE, tell_not_applicable
from runbook.render import duration, size
from runbook.report import Report, Status
from tasks import integrity
from tasks.migrations.locks import Lock, Watched

# A table is large where it has more than either: a scan or rewrite of it is seconds, and everybody waits that long.
LARGE_BYTES, LARGE_ROWS = 100_000_000, 100_000
MOST_SHOWN = 50
LARGE_HINT = (
    "index: CREATE INDEX CONCURRENTLY in `with op.get_context().autocommit_block()`; constraint: NOT VALID, then "
    "VALIDATE in the next migration; type: a new column, filled in batches; else in a window, with the backend stopped"
)


def tell_locks(report: Report, watched: Watched, longest: float, *, stops: bool) -> None:
    """The locks of one way on the copy; `longest` seconds, and `stops` where more ends the run."""
    if not watched.complete:
        report.warn(
            "locks",
            "let the administrator's login be a superuser: it must create event triggers in the copy",
            value="not measured",
        )
        return
    report.expect(
        "giving up on a lock",
        not watched.unlimited,
        "set lock_timeout in alembic/env.py, whose driver ignores PGOPTIONS (asyncpg: connect_args={'server_settings': "
        "{'lock_timeout': '10s'}}), or in the migration that unset it; until then stop the backend before",
        value=f"never: {', '.join(watched.unlimited[:5])} waits, and everybody behind it" * bool(watched.unlimited)
        or "in time",
        expected="a lock_timeout in every migration's session",
        otherwise=Status.WARN,
    )
    report.table(
        "Migrations on the copy", ("revision", "took"), [(r, duration(s)) for r, s in watched.seconds[:MOST_SHOWN]]
    )
    found = sorted(watched.locks, key=lambda lock: (-lock.seconds, -lock.rows))
    more = f" ({len(found) - MOST_SHOWN} more)" if found[MOST_SHOWN:] else ""
    report.table(
        f"Locks on tables that were there before, held until the transaction ends{more}",
        ("migration", "table", "lock", "blocks others'", "rewritten", "held on the copy", "size", "rows"),
        [_row(lock) for lock in found[:MOST_SHOWN]],
    )
    large = [lock for lock in found if lock.bytes > LARGE_BYTES or lock.rows > LARGE_ROWS]
    report.expect(
        "locks on large tables",
        not large,
        LARGE_HINT,
        value="; ".join(map(str, large[:3])) or "none that block writes",
        expected=f"none that block writes to more than {size(LARGE_BYTES)} or {LARGE_ROWS:,} rows",
        otherwise=Status.WARN,
    )
    worst = found[0] if found else None
    report.expect(
        "longest lock",
        not worst or worst.seconds <= longest,
        f"stop the backend and launch this again with longest_lock_seconds above {worst.seconds if worst else 0:.0f}; "
        f"or: {LARGE_HINT}",
        value=str(worst) if worst else "none that blocks writes",
        expected=f"at most {longest:g} s",
        otherwise=Status.CRITICAL if stops else Status.WARN,
    )


def _row(lock: Lock) -> tuple[str, ...]:
    rewritten = "yes" if lock.rewrites else ""
    held = duration(lock.seconds)
    return lock.revision, lock.table, lock.mode, lock.blocks, rewritten, held, size(lock.bytes), f"{lock.rows:,}"


def expect_sound(report: Report, env: Environment, database: str, where: str) -> None:
    """The expectations on migrated data, where the environment has any."""
    if not env.suites:
        report.fact(FACT, NONE)
        return
    evidence = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}"
    found = integrity.run_expectations(env.postgres, database, evidence, env.suites)
    report.table(f"Expectations {where}", ("table", "expectation", "holds", "observed"), found.rows)
    report.expect(
        f"expectations {where}",
        found.ok,
        "look at the table of expectations: the migrated data breaks the application's rules",
        value="; ".join(found.failed[:3]) or f"{sum(row.ok for row in found.rows)} hold",
        expected="all hold",
    )
    tell_not_applicable(report, found, where)
