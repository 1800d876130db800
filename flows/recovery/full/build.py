"""The first phase of a full restore: staged copies of all three parts, proven and migrated. Nothing live is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from blocks.environment import STOP_ORDER, Environment
from flows.database import expectations as check
from flows.database import restore_steps as database
from flows.recovery.full import migration
from flows.recovery.full.choose import Chosen, OtherParts, other_master
from flows.recovery.full.database_server import FoundServer
from flows.recovery.full.start import plan_of
from flows.redis.restore import capture, sources
from flows.redis.restore.steps import plan_detaching, report_redis_proof
from flows.store import mark_failed
from runbook.errors import OTHER_BACKUPS, ending_the_run
from runbook.guard.permit import CarriesOut, Permit
from runbook.kinds import Pending, permitted_by
from runbook.report import Report
from runbook.units import size
from tasks.application.health import smoke_check, wait_healthy
from tasks.application.staged_files import FilesCopy, build_files_copy
from tasks.backups.catalogue import Backup
from tasks.host.services import start_services, stop_services
from tasks.integrity import Expectations, run_expectations
from tasks.postgres.content.changes import TableStates, read_states
from tasks.postgres.content.content import read_counts
from tasks.postgres.restore.planner_statistics import analyze
from tasks.postgres.restore.staged_copy import Copy, content_in, create_copy, dump_in, fill_copy
from tasks.postgres.server.new_cluster import create_cluster
from tasks.redis.restore.copy import RedisCopy, build_redis_copy
from tasks.redis.restore.swap import start_redis, stop_redis

START_ESTIMATE_SECONDS = 8.0


@dataclass
class StagedCopies:
    """The copies next to the live data. `rows`: those of the database's copy per table; `login`: the last step of its
    proof; `rules`: the expectations on it; `states`: of its tables, when they were judged; `strict`: whether a broken
    rule ends the run."""

    redis: RedisCopy | None
    files: FilesCopy | None
    rows: dict[str, int] = field(default_factory=dict)
    login: object = None
    origin: check.ExpectationsOrigin = check.NOW
    rules: Expectations | None = None
    states: TableStates | None = None
    strict: bool = False


@dataclass
class SystemCopies(StagedCopies):
    """All three: the database's is on the live server."""

    database: Copy = field(kw_only=True)


def plan(report: Report, env: Environment, chosen: Chosen, found: FoundServer, when: str) -> None:
    """Plan every step with its bytes and estimated seconds."""
    if found.presence != "up":
        alone = "; standby and WAL receiver are left out, and commits wait for no standby" * env.has("standby")
        how = plan_of(found.others) if found.presence == "down" else f"initdb, then start it{alone}"
        create: list[CarriesOut] = [stop_services, create_cluster] if found.presence == "absent" else []
        report.plan("start the database server", how, by=[*create, start_services])
    if when == "first":
        plan_stop(report, env)
    database.plan_database(report, env, chosen.database)
    swap = report.plan_steps.pop()
    plan_others(report, env, chosen)
    check.plan(report, env)
    suites = "great-expectations suites, " * bool(env.suites)
    judges: list[CarriesOut] = [run_expectations] if env.suites else [analyze]  # at the same time
    report.plan("expectations and statistics of the copy", f"{suites}ANALYZE", seconds=4, by=judges)
    migration.judge(report, env, content_in(chosen.database).revision, chosen.files)
    if chosen.redis_topology:
        plan_detaching(report, env, chosen.redis_topology)
    if when == "at_swap":
        plan_stop(report, env)
    plan_redis_stop(report, env, chosen)
    report.plan_steps.append(swap)
    plan_start(report, env, chosen)


def plan_others(report: Report, env: Environment, chosen: OtherParts) -> None:
    """Plan the copies of Redis and the files."""
    if chosen.redis_kept:
        sources.plan_kept(report, chosen.redis_kept)
    if other := other_master(env, chosen):
        report.plan("keep", f"Redis's data of {other.address} as a backup: it is in no directory that is kept")
    if chosen.redis_survivor:
        capture.plan(report, env, chosen.redis_survivor)
    others: tuple[tuple[str, Backup | None, str, CarriesOut], ...] = (
        ("Redis", chosen.redis, env.redis.data_directory if chosen.redis else "", build_redis_copy),
        ("application files", chosen.files, env.application.directory if chosen.files else "", build_files_copy),
    )
    for name, backup, live, by in others:
        if backup:
            report.plan(
                f"restore a staged copy of {name}",
                f"{backup.name} into {live}.restoring, then prove it",
                size=backup.manifest.bytes,
                seconds=1,
                by=[by],
            )


def plan_start(report: Report, env: Environment, chosen: OtherParts) -> None:
    """Plan the start and the checks."""
    started = _without_kept(env.services_in(("redis", "backend", "frontend")), chosen)
    starts: list[CarriesOut] = [start_services, start_redis, wait_healthy]
    report.plan("start services", ", ".join(started), seconds=START_ESTIMATE_SECONDS, by=starts)
    checks = ["health", *["expectations again"] * env.has("postgres"), "smoke checks"]
    report.plan("check", ", ".join(checks), by=[smoke_check])


def plan_stop(report: Report, env: Environment) -> None:
    """Plan the stop of the services. Redis serves on: a migration may need it."""
    names = ", ".join(role for role in env.services_in(STOP_ORDER) if role != "redis")
    report.plan("stop services", names, seconds=2, by=[stop_services])


def plan_redis_stop(report: Report, env: Environment, chosen: OtherParts) -> None:
    """Plan the stop of Redis, directly before the swap."""
    if env.has("redis") and chosen.stops_redis:
        report.plan("stop Redis", f"the service {env.services.name_of('redis')}", seconds=1, by=[stop_redis])


def _without_kept(roles: Iterable[str], chosen: OtherParts) -> list[str]:
    return [role for role in roles if role != "redis" or chosen.stops_redis]


def build(
    report: Report,
    permit: Permit,
    env: Environment,
    chosen: Chosen,
    jobs: int,
    filling: Pending[Copy] | None = None,
) -> SystemCopies:
    """Build all three at the same time: they do not depend on each other. `filling`: the database's copy, where
    `begin_database` has begun it."""
    filling = filling or begin_database(permit, env, chosen, jobs)
    others = build_others(permit, env, chosen)
    with database.noting_failure(report, chosen.database):
        copy = filling.result()
    report.fact("database restored in", f"{copy.seconds:.1f} s with {jobs} jobs")
    return SystemCopies(others.redis, others.files, database=copy, origin=check.origin_of(chosen.database))


def begin_database(permit: Permit, env: Environment, chosen: Chosen, jobs: int) -> Pending[Copy]:
    """Begin to restore the dump into a staged copy, at the same time as the caller goes on: unpacking, too."""
    source, properties = chosen.dump or dump_in(chosen.database), content_in(chosen.database).properties
    with permitted_by(permit):
        empty = create_copy.bind(env.postgres, "", properties)()
        return fill_copy.bind(env.postgres, "", source, properties).submit(empty, jobs)


def build_others(permit: Permit, env: Environment, chosen: OtherParts) -> StagedCopies:
    """Build Redis and the files at the same time."""
    return begin_others(permit, env, chosen)()


def begin_others(permit: Permit, env: Environment, chosen: OtherParts) -> Callable[[], StagedCopies]:
    """Begin to build Redis and the files. The returned function waits for them."""
    with permitted_by(permit):
        redis = build_redis_copy.bind(env.redis, chosen.redis).submit() if chosen.redis else None
        files = build_files_copy.bind(env.application, chosen.files).submit() if chosen.files else None

    @ending_the_run()
    def wait() -> StagedCopies:
        redis_copy = redis.result() if redis else None
        return StagedCopies(redis_copy, files.result() if files else None)

    return wait


def prove(
    report: Report,
    permit: Permit,
    env: Environment,
    chosen: Chosen,
    copies: SystemCopies,
    *,
    jobs: int,
    strict: bool = False,
) -> None:
    """Compare every copy with its manifest, run the expectations, migrate, run them again. An expectation that the
    backup already broke ends the run only if `strict`.

    Raises:
        RunbookFailed: a copy differs from its manifest. Nothing live was touched.
    """
    prove_others(report, env, chosen, copies)
    name, copies.strict = copies.database.database, strict
    analyzing = analyze.after(copies.database).submit(env.postgres, name, jobs)
    # At the same time as the comparison: both only read.
    checking = check.start(report, env, name, after=copies.database, origin=copies.origin, built=True)
    content = database.prove_database(report, env, chosen.database, copies.database)
    database.judge_statistics(report, analyzing.result())
    copies.rules = check.report_results(report, checking, "on the copy", strict=strict)
    copies.rows = {table: found.rows for table, found in content.tables.items()}
    revision = content_in(chosen.database).revision
    migrated = migration.migrate(
        report, permit, env, copies.database.database, copies.files, revision=revision, after=content
    )
    if migrated:
        database.judge_statistics(report, analyze.after(migrated)(env.postgres, name, jobs, everything=True))
        checking = check.start(report, env, name, after=migrated, origin=copies.origin)
        copies.rules = check.report_results(
            report, checking, "on the migrated copy", strict=strict, before=copies.rules
        )
        copies.rows = dict(read_counts.after(migrated)(env.postgres, name).rows)
    copies.states = read_states.after(migrated or content)(env.postgres, name)
    copies.login = database.try_application_login(report, env, copies.database, after=copies.states)
    report.fail_if_critical()


@ending_the_run()
def prove_others(report: Report, env: Environment, chosen: OtherParts, copies: StagedCopies) -> None:
    """Compare the copies of Redis and of the files with their manifests.

    Raises:
        RunbookFailed: one differs from its manifest. Nothing live was touched.
    """
    if chosen.redis and copies.redis:
        report_redis_proof(report, env, chosen.redis, copies.redis)
    if not (copy := copies.files):
        return
    report.require(
        "files equal to the backup",
        not copy.differences,
        f"nothing live was touched; {OTHER_BACKUPS}",
        value="; ".join(copy.differences[:3]) or f"{copy.entries:,} entries, {size(copy.bytes)}",
        expected="content, mode and owner of every entry as in the backup",
    )
    if copy.differences and chosen.files:
        mark_failed(report, chosen.files, copy.differences[0])
    report.fail_if_critical()
