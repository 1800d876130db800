"""Searching the audit log (§6.4)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from flows.logs.evidence import keep_lines
from flows.logs.findings import report_files_read, report_searched, report_undated
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.logs.figures import logins
from tasks.logs.reading.conditions import Conditions, parse_moment
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import LogChoice, LogSource, reading

SHOWN = 100
FIELDS = logins.FIELDS[1:]
COLUMNS = {"time": "time", "here": "here", "line": "line", **{name: f"coalesce({name}, '')" for name in FIELDS}}


@flow(name="search-audit-log", flow_run_name=RunName("search-audit-log {environment} {since}"))
def search_audit_log(
    environment: str,
    user: str = "",
    action: str = "",
    resource: str = "",
    result: Literal["any", "success", "failure"] = "any",
    address: str = "",
    since: str = "",
    until: str = "",
    failures: Annotated[int, Field(ge=2, le=1000)] = 10,
    minutes: Annotated[int, Field(ge=1, le=1440)] = 10,
    first: Annotated[int, Field(ge=1, le=100_000)] = 1000,
) -> Report:
    """監査ログの検索: ユーザーの全アクション履歴・失敗した認証試行・リソースアクセス履歴 (§6.4)

    Shows who did what, from where and with what result, in the log and all its rotated files. It also reports unusual
    log-ins of that time: bursts of failures by one user or from one address, a success right after a burst, a user's
    first log-in from an address, and log-ins at night by users who never came at night.

    It changes nothing. A success after a burst of failures is CRITICAL; other unusual log-ins are WARN. The evidence
    file named in the report has up to `first` lines. Lines that are not JSON are counted and shown separately.

    Departs from the manual: its queries read the current file only.

    Args:
        environment: Environment (lab, staging, production …)
        user: user_id. Empty: all
        action: Action (login, create_session …). Empty: all
        resource: Resource. Empty: all
        result: Result
        address: IP address. Empty: all
        since: From this time (e.g. 2026-02-15 03:00 or 2026-02-15 03:00+09:00; without a zone: the environment's).
            Empty: from the beginning
        until: Before this time (e.g. 2026-02-15 04:00; without a zone: the environment's). Empty: until now
        failures: This many failures or more count as a brute-force attack
        minutes: Window in which failures are counted, in minutes
        first: Most lines to keep in the evidence file
    """
    env = Environment.find(environment)
    with runbook("Search audit log", env) as report:
        begin, end = parse_moment(since, env.zone, "since"), parse_moment(until, env.zone, "until")
        asked = {"user_id": user, "action": action, "resource": resource, "ip_address": address}
        asked["result"] = "" if result == "any" else result
        fields = [f"{name}={text}" for name, text in asked.items() if text]
        wanted = Conditions(logins.FIELDS).within(begin, end).fields(fields)
        usual = Conditions(logins.FIELDS).within(None, end).holds(logins.LOGIN, "login")  # also from before `begin`
        with reading(
            find_logs(Path(env.logs.need("audit"))), env.zone, fields=logins.FIELDS, names=env.logs.fields
        ) as source:
            bad = source.pick_each(
                picked=wanted.choice(COLUMNS),
                logins=usual.choice(logins.COLUMNS),
                undated=(wanted if wanted.times else usual).undated(),
                times=LogChoice({"time": "time"}),
            )
            count = _tell_history(report, env, source, first)
            report_searched(report, asked, (begin, end), count, source)
            report_files_read(report, source, bad)
            report_undated(report, source)
            judge_logins(report, env, source, begin or datetime.min.replace(tzinfo=UTC), failures, minutes)
        report.outcome = f"{count:,} events found"
    return report


def _tell_history(report: Report, env: Environment, source: LogSource, first: int) -> int:
    """The events, and how many of each kind."""
    count = int(source.rows("SELECT count(*) FROM picked")[0][0])
    report.fact("found", f"{count:,} events")
    groups = source.rows(
        "SELECT action, result, count(*), count(DISTINCT user_id), count(DISTINCT ip_address) "
        "FROM picked GROUP BY ALL ORDER BY 3 DESC LIMIT 30"
    )
    report.table("By action and result", ("action", "result", "events", "users", "addresses"), groups)
    rows = source.rows(
        f"SELECT strftime(here, '%Y-%m-%d %H:%M:%S'), {', '.join(FIELDS)}, line FROM picked "  # noqa: S608
        "ORDER BY time, line LIMIT $first",
        {"first": first},
    )
    report.table(
        f"The first {min(len(rows), SHOWN)}", (f"time ({env.zone.key})", *FIELDS), [row[:-1] for row in rows[:SHOWN]]
    )
    keep_lines(report, env, [row[-1] for row in rows])
    return count


def judge_logins(
    report: Report, env: Environment, source: LogSource, since: datetime, failures: int, minutes: int
) -> None:
    """Unusual log-ins of the table `logins`."""
    bursts = logins.find_bursts(source, since, failures, minutes)
    broken_in = logins.find_broken_in(source, since, failures, minutes)
    unusual = logins.find_unusual(source, since, env.zone)
    report.table(
        f"Failed log-ins, {failures} or more within {minutes} min",
        ("", "of", "most within", "first", "last", "users or addresses"),
        [
            ("user" if one.of == "who" else one.of, one.name, one.most, one.first, one.last, one.others)
            for one in bursts
        ],
    )
    report.table(
        "Unusual log-ins",
        (f"time ({env.zone.key})", "user", "address", "what is unusual"),
        [(one.at, one.who, one.address, one.why) for one in (*broken_in, *unusual)],
    )
    report.require(
        "log-ins after a burst of failures",
        not broken_in,
        "ask these users; if they did not log in, end their sessions (clear-cache) and change their passwords",
        value=", ".join(f"{one.who} from {one.address}" for one in broken_in[:5]) or "none",
    )
    report.prefer(
        "many failed log-ins",
        not bursts,
        "check these addresses, and block them at the proxy",
        value="; ".join(f"{one.name}: {one.most}" for one in bursts[:5]) or "none",
    )
    report.prefer(
        "log-ins from new addresses or at night",
        not unusual,
        "ask these users whether they logged in",
        value=", ".join(f"{one.who} from {one.address}" for one in unusual[:5]) or "none",
    )
