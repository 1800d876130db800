"""Searching the logs (§6.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from flows.logs.evidence import keep_lines
from flows.logs.findings import Log, path_of, report_files_read, report_searched, report_undated
from runbook.flow import flow
from runbook.masking import masked
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.logs.reading.conditions import Conditions, parse_moment
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import LogSource, by_hour, offset, reading

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
SHOWN, HOURS = 50, 48
COLUMNS = {
    "time": "time",
    "here": "here",
    "level": "level",
    "module": "coalesce(module, logger)",
    "message": "message",
    "line": "line",
}


@flow(name="search-logs", flow_run_name=RunName("search-logs {environment} {log} {since}"))
def search_logs(
    environment: str,
    log: Log = "app",
    level: tuple[Level, ...] = (),
    module: tuple[str, ...] = (),
    user: tuple[str, ...] = (),
    text: str = "",
    regex: str = "",
    fields: tuple[str, ...] = (),
    since: str = "",
    until: str = "",
    first: Annotated[int, Field(ge=1, le=100_000)] = 1000,
) -> Report:
    """ログ検索: grep検索・jqによるJSON解析 (§6.3)

    Finds lines of the application's log or the audit log, in all rotated and compressed files: by level, module, user,
    text, regular expression, time and any field. Shows their number by level, module and hour, and the first lines. The
    evidence file named in the report has up to `first` of them.

    It changes nothing. Secrets, mail addresses and card numbers are masked in the report and in the file. Lines that
    are not JSON are counted and shown separately.

    Departs from the manual: grep for a date mistakes UTC for local time and finds the date anywhere in a line. Here
    times are compared as times, with their zone. A time without a zone is UTC in a log, and local time in this form.

    Args:
        environment: Environment (lab, staging, production …)
        log: Application log (app) or audit log (audit)
        level: Log level. Empty: all
        module: Names of modules. Empty: all
        user: user_id values. Empty: all
        text: Text in the message (upper and lower case are the same). Empty: no condition
        regex: Regular expression for the whole line (RE2). Empty: no condition
        fields: Conditions on any fields (e.g. status>=500, model=gpt-4o, path~^/items/). Empty: no condition
        since: From this time (e.g. 2026-02-15 03:00 or 2026-02-15 03:00+09:00; without a zone: the environment's).
            Empty: from the beginning
        until: Before this time (e.g. 2026-02-15 04:00; without a zone: the environment's). Empty: until now
        first: Most lines to keep in the evidence file
    """
    env = Environment.find(environment)
    with runbook("Search logs", env) as report:
        begin, end = parse_moment(since, env.zone, "since"), parse_moment(until, env.zone, "until")
        wanted = Conditions().within(begin, end).levels(level).equals("user_id", user)
        if module:
            wanted.equals("coalesce(module, logger)", module)
        wanted.contains(text).matches(regex).fields(fields)
        with reading(find_logs(Path(path_of(env, log))), env.zone, since=begin, names=env.logs.fields) as source:
            bad = source.pick_each(picked=wanted.choice(COLUMNS), undated=wanted.undated())
            count = _tell_counts(report, env, source)
            asked = {"level": ", ".join(level), "module": ", ".join(module), "user": ", ".join(user), "text": text}
            asked |= {"regex": regex, "fields": ", ".join(fields)}
            report_searched(report, asked, (begin, end), count)
            _keep(report, env, source, first)
            report_files_read(report, source, bad)
            if wanted.times:  # otherwise the search has found them
                report_undated(report, source)
        report.outcome = f"{count:,} lines found"
    return report


def _tell_counts(report: Report, env: Environment, source: LogSource) -> int:
    """The number of lines, by level, module and hour."""
    count, undated, begin, end = source.rows(
        "SELECT count(*), count(*) - count(time), arg_min(here, time), arg_max(here, time) FROM picked"
    )[0]
    report.fact(
        "found",
        f"{count:,} lines"
        + (f", from {begin:%Y-%m-%d %H:%M:%S} to {end:%Y-%m-%d %H:%M:%S} {env.zone.key}" if begin else ""),
    )
    if undated:
        report.warn("lines without a time", "search without since and until to find them", value=f"{undated:,}")
    groups = source.rows("SELECT level, module, count(*) FROM picked GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT 30")
    report.table("By level and module", ("level", "module", "lines"), groups)
    hours = [(f"{hour:%Y-%m-%d %H:00} {offset(hour)}", lines) for hour, (lines,) in by_hour(source)[: -HOURS - 1 : -1]]
    report.table(f"By hour ({env.zone.key}, the newest {HOURS})", ("hour", "lines"), hours)
    return int(count)


def _keep(report: Report, env: Environment, source: LogSource, first: int) -> None:
    """The first lines: some in the report, up to `first` in the evidence file."""
    query = "SELECT strftime(here, '%Y-%m-%d %H:%M:%S'), level, module, message, line FROM picked ORDER BY time, line"
    rows = source.rows(f"{query} LIMIT $first", {"first": first})
    shown = [(time, level, module, masked(message or "")[:300]) for time, level, module, message, _ in rows[:SHOWN]]
    report.table(f"The first {len(shown)}", (f"time ({env.zone.key})", "level", "module", "message"), shown)
    keep_lines(report, env, [row[4] for row in rows])
