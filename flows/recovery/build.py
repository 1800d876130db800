"""First phase of a full restore: copies of everything beside the live ones, proven and migrated. Nothing live is
touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blocks.environment import STOP_ORDER, Environment
from flows.database import steps as database
from flows.recovery import check
from flows.recovery.choose import Chosen
from flows.recovery.revive import Found
from flows.redis.steps import tell_redis_proof
from runbook.permit import Permit
from runbook.render import size
from runbook.report import Report
from tasks.files import FilesCopy, build_files_copy
from tasks.migrations import upgrade
from tasks.postgres.content import read_counts
from tasks.postgres.copy import Copy, analyze, create_copy, fill_copy
from tasks.postgres.sequences import advance_sequences, find_rewound
from tasks.postgres.server import Identity
from tasks.redis.copy import RedisCopy, build_redis_copy

START_ESTIMATE_SECONDS = 8.0


@dataclass
class Copies:
    """What stands beside the live data. `rows` are the copy's, after the migration, per table."""

    database: Copy
    redis: RedisCopy | None
    files: FilesCopy | None
    rows: dict[str, int]


def plan(report: Report, env: Environment, chosen: Chosen, found: Found, when: str) -> None:
    """Every step with its bytes and an estimate of its seconds."""
    stop = ", ".join(env.services_in(STOP_ORDER))
    if found.presence != "up":
        report.plan(
            "bring back the database server", "start it" if found.presence == "down" else "initdb, then start it"
        )
    if when == "first":
        report.plan("stop services", stop, seconds=2)
    database.plan_database(report, env, chosen.database)
    swap = report.plan_steps.pop()
    for name, backup, live in (
        ("Redis", chosen.redis, env.redis.data_directory if chosen.redis else ""),
        ("application files", chosen.files, env.application.directory if chosen.files else ""),
    ):
        if backup:
            report.plan(f"restore {name} beside", f"{backup.name} into {live}.restoring, and prove it",
                        size=backup.manifest.bytes, seconds=1)  # fmt: skip
    report.plan("expectations and migration of the copy", "great-expectations suites, alembic upgrade head, ANALYZE",
                seconds=4)  # fmt: skip
    if when == "at_swap":
        report.plan("stop services", stop, seconds=2)
    report.plan_steps.append(swap)
    report.plan("start services", ", ".join(env.services_in(("redis", "backend", "frontend"))),
                seconds=START_ESTIMATE_SECONDS)  # fmt: skip
    report.plan("check", "health, expectations again, log in, create a session, get an AI answer, read it back")


def build(report: Report, permit: Permit, env: Environment, chosen: Chosen, jobs: int) -> Copies:
    """All three beside, at the same time: none needs another."""
    empty = create_copy(permit, env.postgres, chosen.database)
    filling = fill_copy.submit(permit, env.postgres, chosen.database, empty, jobs)
    redis = build_redis_copy.submit(permit, env.redis, chosen.redis) if chosen.redis else None
    files = build_files_copy.submit(permit, env.application, chosen.files) if chosen.files else None
    redis_copy = redis.result() if redis else None
    files_copy = files.result() if files else None
    copy = filling.result()
    report.fact("database restored in", f"{copy.seconds:.1f} s with {jobs} jobs")
    return Copies(copy, redis_copy, files_copy, {})


def prove(
    report: Report,
    permit: Permit,
    env: Environment,
    chosen: Chosen,
    copies: Copies,
    live: Identity,
    *,
    advance: bool,
    jobs: int,
) -> None:
    """Compare every copy with its manifest, run the expectations, migrate, run them again.

    Raises:
        RunbookFailed: a copy is not what its manifest says. Nothing live was touched.
    """
    if chosen.redis and copies.redis:
        tell_redis_proof(report, env, chosen.redis, copies.redis)
    _prove_files(report, copies.files)
    name = copies.database.database
    analyzing = analyze.submit(env.postgres, name, jobs)
    checking = check.start(report, env, name)  # beside the comparison: both only read
    content = database.prove_database(report, env, chosen.database, copies.database)
    analyzing.result()
    check.tell(report, checking, "on the copy", migrated=False)
    rewound = find_rewound(env.postgres, live.database, name) if live.oid else ()
    if advance:
        advance_sequences(permit, env.postgres, copies.database, rewound)
    database.tell_rewound(report, rewound, advanced=advance)
    copies.rows = {table: found.rows for table, found in content.tables.items()}
    if _migrate(report, permit, env, copies):
        analyze(env.postgres, name, jobs, everything=True)
        check.tell(report, check.start(report, env, name), "on the migrated copy", migrated=True)
        copies.rows = dict(read_counts(env.postgres, name).rows)
    database.try_application_login(report, env, copies.database)
    report.fail_if_critical()


def _migrate(report: Report, permit: Permit, env: Environment, copies: Copies) -> bool:
    """`alembic upgrade head` on the copy, with the code that will run on it. Returns whether it changed anything."""
    backend = Path(env.application.backend_directory)
    if copies.files:
        inside = backend.relative_to(env.application.directory)
        backend = copies.files.path / inside
    done = upgrade(permit, env.postgres, env.application, copies.database.database, backend_directory=backend)
    changed = done.before != done.after
    report.fact("Alembic revision", f"{done.before} → {done.after}" if changed else f"{done.after}, nothing pending")
    return changed


def _prove_files(report: Report, copy: FilesCopy | None) -> None:
    if not copy:
        return
    report.expect("files equal to the backup", not copy.differences, "choose another backup; nothing live was touched",
                  value="; ".join(copy.differences[:3]) or f"{copy.entries:,} entries, {size(copy.bytes)}",
                  expected="every entry's content, mode and owner")  # fmt: skip
    report.fail_if_critical()
