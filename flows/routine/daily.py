"""The daily check (§7.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from flows.database.server.sessions import judge_used
from flows.database.server.wraparound import judge_wraparound
from flows.logs.errors import LEVELS
from flows.logs.findings import report_files_read
from flows.recovery.objectives.check import report_points, serves_elsewhere
from flows.recovery.objectives.points import RecoveryPoints, read_recovery_points, resources_of
from flows.redis.master import judge_master
from flows.redis.memory.limits import judge_memory
from flows.routine.page import Page
from flows.routine.sources.past import AHEAD, CLOCKS, is_ahead
from flows.routine.sources.places import read_places
from runbook import clock, metrics
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.kinds import Pending
from runbook.masking import masked
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.application.health import NO_HEALTH, Health, health_checks, wait_healthy
from tasks.backups.catalogue import Backup
from tasks.backups.retention import StoredBackup, read_stores
from tasks.host.load import HostLoad, read_load
from tasks.logs.figures import errors
from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.samples import begins_at
from tasks.logs.reading.source import count_undated, reading
from tasks.postgres.replication.rates import measure_rates
from tasks.postgres.replication.wraparound import read_wraparound
from tasks.postgres.sessions.connections import SessionActivity, read_activity
from tasks.recovery_points.backups import LOOKED_AT, TAKEN_BY
from tasks.recovery_points.point import Resource
from tasks.redis.memory.info import read_memory
from tasks.redis.sentinels import Watch, read_sentinels
from tasks.stores.store import store_of

# For users, a slower answer is no answer.
HEALTH_SECONDS = 10.0
HOURS = 24
RATE_SECONDS = 1.0
SHOWN = 10


def ask_health(page: Page) -> Judge:
    """Health of backend and frontend, one finding each; a part without a health check is left out."""
    if not page.names("application"):
        return lambda: None
    application, asked = page.env.application, dict[str, Pending[Health]]()
    for name, others in (
        ("backend", {"frontend_health_path": ""}),
        ("frontend", {"health_path": "", "health_port": 0, "health_command": []}),
    ):
        one = application.model_copy(update=others)
        if health_checks(one):
            asked[name] = wait_healthy.submit(one, seconds=HEALTH_SECONDS, in_a_row=1)
    return lambda: _judge_health(page, asked)


def _judge_health(page: Page, asked: Mapping[str, Pending[Health]]) -> None:
    hint = page.launch("diagnose-application")
    for name, pending in asked.items():
        if health := page.part(name, pending.result, hint=hint, otherwise=Status.CRITICAL):
            page.report.passed(name, value=f"{' and '.join(health.targets)} is healthy")
    page.report.fact("health", f"checked: {', '.join(asked)}" if asked else NO_HEALTH)


def judge_errors(page: Page) -> None:
    """The errors of exactly the last hours, also in rotated files; uncountable lines are reported."""
    if page.names("logs"):
        page.part("errors", lambda: _count_errors(page), hint=page.launch("check-logging"))


def _count_errors(page: Page) -> None:
    report, env = page.report, page.env
    end = datetime.now(UTC)
    since = end - timedelta(hours=HOURS)
    files = find_logs(Path(env.logs.need("app")))
    wanted = Conditions().within(since - timedelta(hours=HOURS), end).levels(LEVELS)
    ahead = Conditions().within(end + CLOCKS, None).levels(LEVELS)
    with reading(files, env.zone, since=since - timedelta(hours=HOURS), names=env.logs.fields) as source:
        bad = source.pick_each(
            picked=wanted.choice(errors.COLUMNS), undated=wanted.undated(), ahead=ahead.choice({"time": "time"})
        )
        found = errors.kinds(source, since)
        timeless = count_undated(source)
        future = int(source.rows("SELECT count(*) FROM ahead")[0][0])
        report_files_read(report, source, bad)
    began = begins_at(files[0], env.logs.field("timestamp"))
    if began is None or began > since:
        page.log_begins("all of the day's errors", began, "check its rotation with check-logging")
    if files[-1].modified < since:
        page.not_measured(
            "the log", f"no line was written for {HOURS} h", "check that the application logs to this file"
        )
    _judge_errors(page, found, timeless, future)


def _judge_errors(page: Page, found: list[errors.Kind], timeless: int, future: int) -> None:
    """The errors of the day by kind, and those that no day has."""
    report, count = page.report, sum(one.count for one in found)
    hint = f"{page.launch('summarise-errors')} shows the new kinds and their beginning"
    worst = found[0].text[:60] if found else "none"
    page.judge(metrics.LOG_ERRORS, count, hint, of=f"last {HOURS} h, most: {masked(worst)}")
    if timeless:
        report.warn(
            "errors without a time",
            "correct the application's formatter (§6.1): these errors may be of today",
            value=f"{timeless:,}, not counted",
        )
    if future:
        report.warn(
            "errors with a time in the future",
            "correct the clock of the application's host, or of this one",
            value=f"{future:,}, not counted",
        )
    report.fact("errors", f"{count:,} in {HOURS} h")
    report.table(
        f"Errors of the last {HOURS} h (the first {min(len(found), SHOWN)} of {len(found)} kinds)",
        ("lines", "the day before", "level", "kind", "modules", "last"),
        [
            (one.count, one.before, one.level, masked(one.text)[:200], one.modules, f"{one.last:%m-%d %H:%M:%S}")
            for one in found[:SHOWN]
        ],
    )


def judge_disks(page: Page) -> None:
    """Use of each file system, and what is on it."""
    filled, unknown = read_places(page.env)
    for one in filled:
        free = f"{size(one.disk.free_bytes)} of {size(one.disk.total_bytes)} free"
        shown = ", ".join(one.what[:4]) + (f" and {len(one.what) - 4} more" if len(one.what) > 4 else "")
        hint = (
            f"{page.launch('free-disk-emergency')} finds what uses the space; clean-logs, clean-docker, prune-backups"
        )
        page.judge(metrics.DISK, one.used_ratio, hint, of=f"{shown}; {free}")
    for place, why in unknown:
        page.not_measured(f"disk of {place.what}", why, f"check {place.path} on its host")
    if filled:
        page.report.fact("disk", f"{filled[0].used_ratio:.0%} at most ({filled[0].what[0]})")
    page.report.table(
        "Disks",
        ("used", "free", "of", "what is on it"),
        [
            (f"{one.used_ratio:.0%}", size(one.disk.free_bytes), size(one.disk.total_bytes), ", ".join(one.what))
            for one in filled
        ],
    )


def ask_connections(page: Page) -> Judge:
    """Connections of the primary."""
    if not page.names("postgres"):
        return lambda: None
    pending = read_activity.submit(page.env.postgres)
    return lambda: _judge_connections(page, pending)


def _judge_connections(page: Page, pending: Pending[SessionActivity]) -> None:
    hint = page.launch("diagnose-database")
    activity = page.part("PostgreSQL", pending.result, hint=hint, otherwise=Status.CRITICAL)
    if activity is None:
        return
    judge_used(page.report, activity)
    page.report.fact(
        "connections",
        f"{len(activity.clients) + 1} of {activity.limits.most}, {activity.limits.reserved} of them reserved",
    )
    if activity.hidden:
        page.not_measured(
            "activity of sessions",
            f"{activity.hidden} sessions are hidden: the counts are too low",
            f"make {page.env.postgres.admin_user} a member of pg_read_all_stats",
        )


def ask_wraparound(page: Page) -> Judge:
    """Distance to transaction ID wraparound: a server that reaches it accepts no writes."""
    if not page.names("postgres"):
        return lambda: None
    postgres = page.env.postgres
    ages, rates = read_wraparound.submit(postgres, postgres.database), measure_rates.submit(postgres, RATE_SECONDS)
    return lambda: page.part(
        "transaction ids",
        lambda: judge_wraparound(page.report, ages.result(), rates.result().xids, postgres.database),
        hint=page.launch("check-replication"),
    )


def ask_redis(page: Page) -> Judge:
    """Memory of the Redis master."""
    if not page.names("redis"):
        return lambda: None
    pending = read_sentinels.submit(page.env.redis)
    return lambda: page.part(
        "Redis", lambda: _judge_redis(page, pending), hint=page.launch("diagnose-redis"), otherwise=Status.CRITICAL
    )


def _judge_redis(page: Page, pending: Pending[Watch]) -> None:
    memory = read_memory(judge_master(page.report, page.env.redis, pending.result(), changes=False))
    judge_memory(page.report, memory)
    limit = f"of {size(memory.limit)}" if memory.limit else "without maxmemory"
    page.report.fact("Redis", f"{size(memory.used)} used {limit}")


def ask_load(page: Page) -> Judge:
    """Load of this host; watch-metrics measures other hosts."""
    pending = read_load.submit()
    return lambda: _judge_load(page, page.report, pending.result())


def _judge_load(page: Page, report: Report, found: HostLoad) -> None:
    page.judge(
        metrics.LOAD,
        found.load_ratio,
        "find the processes with top; a running backup is a usual cause",
        of=f"{found.load:.1f} of {found.processors} processors, 15 min",
        worst=Status.WARN,
    )
    free = f"{size(found.available_bytes)} of {size(found.memory_bytes)} available"
    page.judge(
        metrics.MEMORY, found.memory_ratio, "find the processes with top, sorted by memory", of=free, worst=Status.WARN
    )
    report.fact("this host", f"load {found.load:.1f} on {found.processors} processors; memory: {free}")


Part = Literal["all", "health", "backup", "resources"]
Judge = Callable[[], object]
PARTS: Mapping[str, Sequence[Callable[[Page], Judge]]] = {
    "health": (ask_health, lambda page: lambda: judge_errors(page)),
    "backup": (lambda page: lambda: judge_backups(page),),
    "resources": (ask_connections, ask_wraparound, ask_redis, ask_load, lambda page: lambda: judge_disks(page)),
}


@flow(name="daily-check", flow_run_name=RunName("daily-check {environment} {part}"))
def daily_check(environment: str, part: Part = "all") -> Report:
    """日次保守チェック: ヘルスチェック・エラーログ・バックアップ・リソース使用量の確認 (§7.2)

    The manual's six checks on one page, measured in parallel: health of backend and frontend; errors of exactly the
    last 24 hours; age of the newest backups against the RPO, and their last verification; disks with data, logs or
    backups; database connections with the reserved ones, and the distance to transaction ID wraparound; Redis memory
    against its limit. Each row of the maintenance table launches its `part`. Run it every morning.

    It changes nothing. A part that does not answer is a finding with the runbook to launch next; the other checks
    continue. Parts that the environment lacks are left out and named once.

    Departs from the manual: `jq … | wc -l` counts the lines of pretty-printed objects in the current file only; a
    newest file in a directory may not restore; used memory means little without a limit.

    Args:
        environment: Environment (lab, staging, production …)
        part: What to check (health: health checks and error logs; backup: backups; resources: resources)
    """
    env = Environment.find(environment)
    with runbook("Daily check", env) as report:
        if elsewhere := serves_elsewhere(env):
            report.outcome = f"users are sent to {elsewhere}: this region is not checked"
            return report
        page = Page.of(report, env)
        wanted = [ask for name, asks in PARTS.items() if part in ("all", name) for ask in asks]
        for judge in [ask(page) for ask in wanted]:  # all start before the first result is awaited
            judge()
        bad = sum(finding.hint != "" for finding in report.findings)
        report.outcome = f"{len(report.findings)} checks, {bad} findings" if bad else "all checks passed"
    return report


# A week, and a day of grace: verify-backup and backup-cluster run weekly.
WEEKLY = LOOKED_AT + timedelta(days=1)
PATIENCE_SECONDS = 5.0


def judge_backups(page: Page) -> None:
    """Backups of the database, Redis and the files."""
    if page.names("backups"):
        page.part("backups", lambda: _judge(page))


def _judge(page: Page) -> None:
    resources = resources_of(page.env)
    if not resources:
        page.not_measured("backups", "the environment has no resource to back up", "add [postgres], [redis] …")
        return
    reach = read_recovery_points(page.env)
    for resource in resources:
        _judge_resource(page, reach, resource)
    if "database" in resources:
        page.part("base backups", lambda: _judge_bases(page))
    report_points(page.report, reach)


def _judge_resource(page: Page, reach: RecoveryPoints, resource: Resource) -> None:
    stored, name = reach.stored["backups", resource], f"newest backup of {resource}"
    take = page.launch(TAKEN_BY[resource])
    if isinstance(stored, OpsError):
        page.report.fail(name, stored.hint, value=f"not measured: {stored.message}")
        return
    for bad in stored.unreadable:
        page.report.warn(f"{bad} in the store", "check the backup: its manifest cannot be read", value="not known")
    if ahead := stored.from_the_future():
        page.report.warn(
            f"clock, by the backups of {resource}",
            "correct the clock of the host that took them",
            value=f"in the future: {', '.join(ahead[:3])}",
        )
    there = [one for one in stored.backups if one.age_seconds >= 0]
    if not there:
        page.report.fail(name, f"{take} takes one now", value="there is no backup")
        return
    _judge_age(page, reach, resource, there[-1], take)
    _judge_proof(page, resource, there)


def _judge_age(page: Page, reach: RecoveryPoints, resource: Resource, newest: Backup, take: str) -> None:
    """The backup's age against the RPO; if point-in-time recovery loses less and is proven, its loss counts."""
    env, age = page.env, newest.age_seconds
    told = f"{newest.name} is {duration(age)} old"
    page.report.fact(f"backup of {resource}", told)
    best, rpo = reach.best(resource, "data corrupted"), f"at most {duration(env.rpo_seconds)} (RPO)"
    loss = best.loss_seconds(reach.now) if best else None
    if newest.failed:
        page.report.fail(
            f"newest backup of {resource}",
            f"{take} takes another; its report has the reason",
            value=f"{newest.name} failed its verification ({newest.failed})",
        )
    if age > env.rpo_seconds and best and loss is not None and best.means != "backup" and loss <= env.rpo_seconds:
        page.report.prefer(
            f"newest backup of {resource}",
            age <= WEEKLY.total_seconds(),
            f"{take} takes one now",
            value=f"{told}; recovered by {best.told}: {reach.loss(best, 'data corrupted').text}",
            expected=rpo,
        )
        return
    hint = f"{take} takes one now; to meet {duration(env.rpo_seconds)}, archive WAL or back up more often"
    page.judge(metrics.BACKUP_AGE, age, hint, of=f"{resource}: {told}, RPO {duration(env.rpo_seconds)}")


def _judge_proof(page: Page, resource: Resource, there: list[Backup]) -> None:
    """The last verification of a backup of this resource."""
    proven = max((one.verified for one in there if one.verified), default="")
    page.report.fact(f"last proven backup of {resource}", proven or "never")
    at = datetime.fromisoformat(proven) if proven else None
    recent = at is not None and not is_ahead(at) and clock.now() - at <= WEEKLY
    page.report.prefer(
        f"a backup of {resource} was proven by a restore",
        recent,
        f"{page.launch('verify-backup', kind=_KIND[resource])} restores a staged copy and compares it",
        value=f"last at {proven}" if proven else "never",
        expected=f"within {WEEKLY.days} days",
    )


_KIND: dict[Resource, str] = {"database": "postgres", "redis": "redis", "files": "files"}


def _judge_bases(page: Page) -> None:
    """The newest base backup: point-in-time recovery starts from it, so an environment that archives WAL needs one."""
    env = page.env
    (stored,) = read_stores([(store_of(env, "cluster", patience_seconds=PATIENCE_SECONDS), ("cluster",))], env.name)
    found = stored.backups if isinstance(stored, StoredBackup) else ()
    if isinstance(stored, OpsError) and env.has("wal"):
        page.not_measured("newest base backup", stored.message, stored.hint)
        return
    if not found and not env.has("wal"):
        page.report.fact("base backups", "none; the environment archives no WAL")
        return
    newest = found[-1] if found else None
    if newest and is_ahead(newest.manifest.taken):
        page.report.warn("newest base backup", AHEAD, value=f"{newest.name} has a time in the future")
        return
    fresh = newest is not None and newest.age_seconds <= WEEKLY.total_seconds() and not newest.failed
    value = f"{newest.name} is {duration(newest.age_seconds)} old" if newest else "there is no base backup"
    failed = f"; it failed its verification ({newest.failed})" if newest and newest.failed else ""
    page.report.require(
        "newest base backup",
        fresh,
        f"{page.launch('backup-cluster')} takes one",
        value=value + failed,
        expected=f"within {WEEKLY.days} days",
        worst=Status.WARN if newest else Status.CRITICAL,
    )
