"""What the daily check says of health, errors and resources, called with the open page (§7.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.database.session_findings import judge_used
from flows.database.wraparound import judge_wraparound
from flows.logs.errors import LEVELS
from flows.logs.steps import tell_read
from flows.redis.master import judge_master
from flows.redis.memory_findings import judge_memory
from flows.routine.past import CLOCKS
from flows.routine.places import read_places
from flows.routine.steps import Page
from runbook.kinds import Pending
from runbook.render import size
from runbook.report import Report, Status
from tasks.application import NO_HEALTH, Health, health_checks, wait_healthy
from tasks.host_load import Load, read_load
from tasks.logs import errors
from tasks.logs.conditions import Conditions
from tasks.logs.files import find_logs
from tasks.logs.masking import masked
from tasks.logs.samples import begins_at
from tasks.logs.source import count_undated, reading
from tasks.postgres.connections import Activity, read_activity
from tasks.postgres.rates import measure_rates
from tasks.postgres.wraparound import read_wraparound
from tasks.redis.memory.info import read_memory
from tasks.redis.sentinels import Watch, read_sentinels

# An answer that takes longer is none for its users either.
HEALTH_SECONDS = 10.0
HOURS = 24
RATE_SECONDS = 1.0
SHOWN = 10
Judge = Callable[[], object]


def ask_health(page: Page) -> Judge:
    """Backend and frontend, each with its own finding; what has no health check is left out."""
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
            page.report.expect(name, True, "", value=f"{' and '.join(health.targets)} answers well")
    page.report.fact("health", f"asked: {', '.join(asked)}" if asked else NO_HEALTH)


def judge_errors(page: Page) -> None:
    """Those of exactly the last hours, over rotated files too; what cannot be counted is told."""
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
            picked=wanted.choice(errors.COLUMNS),
            undated=wanted.undated(),
            ahead=ahead.choice({"time": "time"}),
        )
        found = errors.kinds(source, since)
        timeless = count_undated(source)
        future = int(source.rows("SELECT count(*) FROM ahead")[0][0])
        tell_read(report, source, bad)
    count = sum(one.count for one in found)
    hint = f"{page.launch('summarise-errors')} says what is new and when it began"
    worst = found[0].text[:60] if found else "none"
    page.judge("logs.errors.day_count", count, hint, of=f"last {HOURS} h, most: {masked(worst)}")
    if timeless:
        report.warn("errors without a time", "they may be of today: correct the application's formatter (§6.1)",
                    value=f"{timeless:,}, in no count")  # fmt: skip
    if future:
        report.warn("errors of the future", "correct the clock of the application's host, or of this one",
                    value=f"{future:,}, in no count")  # fmt: skip
    began = begins_at(files[0], env.logs.field("timestamp"))
    if began is None or began > since:
        page.log_begins("all of the day's errors", began, "look at how it is rotated: check-logging")
    if files[-1].modified < since:
        page.not_measured("the log", f"nothing was written to it for {HOURS} h", "does the application log elsewhere?")
    report.fact("errors", f"{count:,} in {HOURS} h")
    report.table(f"Errors of the last {HOURS} h (the first {min(len(found), SHOWN)} of {len(found)} kinds)",
                 ("lines", "the day before", "level", "kind", "modules", "last"),
                 [(one.count, one.before, one.level, masked(one.text)[:200], one.modules, f"{one.last:%m-%d %H:%M:%S}")
                  for one in found[:SHOWN]])  # fmt: skip


def judge_disks(page: Page) -> None:
    """Each file system once, by what is on it."""
    filled, unknown = read_places(page.env)
    for one in filled:
        free = f"{size(one.disk.free_bytes)} of {size(one.disk.total_bytes)} free"
        shown = ", ".join(one.what[:4]) + (f" and {len(one.what) - 4} more" if len(one.what) > 4 else "")
        hint = (
            f"{page.launch('free-disk-emergency')} finds what holds the space; clean-logs, clean-docker, prune-backups"
        )
        page.judge("host.disk.used_ratio", one.used_ratio, hint, of=f"{shown}; {free}")
    for place, why in unknown:
        page.not_measured(f"disk of {place.what}", why, f"look at {place.path} there")
    if filled:
        page.report.fact("disk", f"{filled[0].used_ratio:.0%} at most, where {filled[0].what[0]} is")
    page.report.table("Disks", ("used", "free", "of", "what is on it"),
                      [(f"{one.used_ratio:.0%}", size(one.disk.free_bytes), size(one.disk.total_bytes),
                        ", ".join(one.what)) for one in filled])  # fmt: skip


def ask_connections(page: Page) -> Judge:
    """Of the primary."""
    if not page.names("postgres"):
        return lambda: None
    pending = read_activity.submit(page.env.postgres)
    return lambda: _judge_connections(page, pending)


def _judge_connections(page: Page, pending: Pending[Activity]) -> None:
    hint = page.launch("diagnose-database")
    activity = page.part("PostgreSQL", pending.result, hint=hint, otherwise=Status.CRITICAL)
    if activity is None:
        return
    judge_used(page.report, activity)
    page.report.fact("connections", f"{len(activity.clients) + 1} of {activity.limits.most}, "
                     f"{activity.limits.reserved} of them reserved")  # fmt: skip
    if activity.hidden:
        page.not_measured("what sessions do", f"{activity.hidden} sessions hide it: the counts are too low",
                          f"make {page.env.postgres.admin_user} a member of pg_read_all_stats")  # fmt: skip


def ask_wraparound(page: Page) -> Judge:
    """How far transaction ids are from their end: a server that reaches it takes no more writes."""
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
    """Of the master."""
    if not page.names("redis"):
        return lambda: None
    pending = read_sentinels.submit(page.env.redis)
    return lambda: page.part("Redis", lambda: _judge_redis(page, pending), hint=page.launch("diagnose-redis"),
                             otherwise=Status.CRITICAL)  # fmt: skip


def _judge_redis(page: Page, pending: Pending[Watch]) -> None:
    memory = read_memory(judge_master(page.report, page.env.redis, pending.result(), changes=False))
    judge_memory(page.report, memory)
    limit = f"of {size(memory.limit)}" if memory.limit else "and no limit is set"
    page.report.fact("Redis", f"{size(memory.used)} used {limit}")


def ask_load(page: Page) -> Judge:
    """Of the host on which this runs; others are watched by watch-metrics."""
    pending = read_load.submit()
    return lambda: _judge_load(page, page.report, pending.result())


def _judge_load(page: Page, report: Report, found: Load) -> None:
    page.judge("host.load.per_processor", found.load_ratio, "look who takes them: top; is a backup running?",
               of=f"{found.load:.1f} of {found.processors} processors, 15 min", worst=Status.WARN)  # fmt: skip
    free = f"{size(found.available_bytes)} of {size(found.memory_bytes)} to be had"
    page.judge("host.memory.used_ratio", found.memory_ratio, "look who takes it: top, by memory", of=free,
               worst=Status.WARN)  # fmt: skip
    report.fact("this host", f"load {found.load:.1f} on {found.processors} processors; memory: {free}")
