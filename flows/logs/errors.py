"""Errors in the logs (§6.3, §7.2)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import Field

from blocks.environment import Environment
from flows.logs.findings import report_files_read, report_undated
from runbook.flow import flow
from runbook.masking import masked
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.logs.figures.errors import COLUMNS, Kind, kinds
from tasks.logs.reading.conditions import Conditions, parse_moment
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.samples import begins_at
from tasks.logs.reading.source import LogSource, offset, reading, utc

LEVELS = ("ERROR", "CRITICAL")
"""As `tasks.logs.reading.conditions.LEVELS` has them: FATAL and error are among them."""
SHOWN = 30
MORE_RATIO, MORE_LINES = 2.0, 20


@flow(name="summarise-errors", flow_run_name=RunName("summarise-errors {environment} {hours}h {until}"))
def summarise_errors(
    environment: str, hours: Annotated[int, Field(ge=1, le=24 * 31)] = 24, until: str = "", warnings: bool = False
) -> Report:
    """エラーログ確認: トップエラーメッセージ集計・時間帯別のエラー数 (§6.3, §7.2)

    Groups the errors of the last hours by message (without numbers, ids and quoted texts), by module and by hour. It
    compares them with the same number of hours before: which kinds are new, and whether there are more. Run it daily.

    It changes nothing. New kinds, and twice as many errors as before, are WARN. Examples are masked.

    Departs from the manual: `jq … | wc -l` counts the lines of pretty-printed objects in the whole file. Here the
    errors of exactly these hours are counted, also in rotated files.

    Args:
        environment: Environment (lab, staging, production …)
        hours: Hours to include. They are compared with as many hours before
        until: End of the period (e.g. 2026-02-15 03:00 or 2026-02-15 03:00+09:00; without a zone: the environment's).
            Empty: now
        warnings: Also count WARNING
    """
    env = Environment.find(environment)
    with runbook("Summarise errors", env) as report:
        end = parse_moment(until, env.zone, "until") or datetime.now(UTC)
        since, before = end - timedelta(hours=hours), end - timedelta(hours=2 * hours)
        levels = (*LEVELS, "WARNING") if warnings else LEVELS
        wanted = Conditions().within(before, end).levels(levels)
        files = find_logs(Path(env.logs.need("app")))
        with reading(files, env.zone, since=before, names=env.logs.fields) as source:
            bad = source.pick_each(picked=wanted.choice(COLUMNS), undated=wanted.undated())
            found = kinds(source, since)
            reaches = (
                len(source.files) < len(files) or (begins_at(files[0], env.logs.field("timestamp")) or end) <= before
            )
            _tell_kinds(report, found, known=reaches)
            _tell_hours(report, source, since, end, env.zone)
            report_files_read(report, source, bad)
            report_undated(report, source)
        total = sum(one.count for one in found)
        report.outcome = f"{total:,} errors of {len(found)} kinds in {hours} h"
    return report


def _tell_kinds(report: Report, found: list[Kind], *, known: bool) -> None:
    """The kinds of errors, the most frequent first, and the new ones."""
    total, before = sum(one.count for one in found), sum(one.before for one in found)
    report.fact("errors", f"{total:,}; the hours before {f'{before:,} of these kinds' if known else 'not known'}")
    report.table(
        f"Kinds of errors (the first {min(len(found), SHOWN)} of {len(found)})",
        ("", "lines", "before", "level", "kind", "modules", "first", "last", "newest example, masked"),
        [
            (
                "new" if known and not one.before else "",
                one.count,
                one.before if known else "?",
                one.level,
                masked(one.text)[:200],
                one.modules,
                f"{one.first:%m-%d %H:%M:%S}",
                f"{one.last:%m-%d %H:%M:%S}",
                masked(one.example)[:300],
            )
            for one in found[:SHOWN]
        ],
    )
    _judge_new(report, found, known=known)


def _judge_new(report: Report, found: list[Kind], *, known: bool) -> None:
    """Kinds that the hours before did not have, and whether there are more errors than then."""
    if not known:
        report.warn(
            "what is new",
            "run it again when the log is old enough",
            value="not measured: the log does not reach back far enough",
        )
        return
    new = [one for one in found if not one.before]
    report.prefer(
        "new kinds of errors",
        not new,
        "check what was deployed or changed since: the table has them",
        value="; ".join(masked(one.text)[:80] for one in new[:3]) or "none",
    )
    total, before = sum(one.count for one in found), sum(one.before for one in found)
    more = total > MORE_RATIO * before and total - before >= MORE_LINES
    report.prefer(
        "errors against the hours before",
        not more,
        "find in the chart when they began",
        value=f"{total:,} errors, {before:,} in the hours before",
        expected=f"at most {MORE_RATIO:g} times as many",
    )


def _tell_hours(report: Report, source: LogSource, since: datetime, end: datetime, zone: ZoneInfo) -> None:
    """By hour and by module. Hours are counted in UTC: when the clock is set back, one local hour comes twice."""
    minutes = (since.astimezone(zone).utcoffset() or timedelta()) % timedelta(hours=1)
    query = (
        "SELECT date_trunc('hour', time + $minutes) - $minutes, count(*) FROM picked WHERE time >= $since GROUP BY 1"
    )
    counts = dict(source.rows(query, {"since": utc(since), "minutes": minutes}))
    hour, lines = (utc(since) + minutes).replace(minute=0, second=0, microsecond=0) - minutes, list[Bar]()
    while hour < utc(end) and len(lines) < 24 * 7:
        here = hour.replace(tzinfo=UTC).astimezone(zone)
        again = f" {offset(here)}" if here.utcoffset() != here.replace(fold=1 - here.fold).utcoffset() else ""
        lines.append(Bar(f"{here:%m-%d %H:00}{again}", (counts.get(hour, 0),), f"{counts.get(hour, 0):,}"))
        hour += timedelta(hours=1)
    report.attach(Evidence(f"Errors by hour ({zone.key})", svg=bars(lines)))
    query = "SELECT module, level, count(*) FROM picked WHERE time >= $since GROUP BY ALL ORDER BY 3 DESC LIMIT 20"
    report.table("By module", ("module", "level", "lines"), source.rows(query, {"since": utc(since)}))
