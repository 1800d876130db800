"""Whether the logs are what everything else relies on (§6.1, §6.2, §6.4)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.logs.findings import Log, path_of, tell_read
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.units import size
from tasks.logs.figures.form import APP, AUDIT, Form, find_leaks, read_form
from tasks.logs.reading.files import LogFile, find_logs
from tasks.logs.reading.source import reading
from tasks.logs.rotation.cleaning import read_holders
from tasks.logs.rotation.handlers import find_handlers
from tasks.logs.rotation.rotation import read_rotation

REQUIRED = {"app": APP, "audit": AUDIT}


@flow(name="check-logging", flow_run_name="check-logging {environment}")
def check_logging(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 7) -> Report:
    """構造化ログ・ログローテーションの確認 (§6.1, §6.2)

    Looks at both logs: whether their lines are JSON with the manual's fields, times have a zone and the clock is right,
    token counts reach the log, secrets or personal data stand in it; how they are rotated (logrotate asked with -d,
    which changes nothing), whether the application writes to the new file after that, and how long the disk lasts. Run
    it weekly, and after a change of the application's logging.

    It changes nothing. Where logrotate is not installed it says so and goes on.

    Departs from the manual: its formatter reads record.extra, which never exists, so that token counts do not reach the
    log; its RotatingFileHandler and logrotate both rotate the same file. Both are found here.

    Args:
        environment: 対象の環境
        days: 最近この日数に書かれたファイルを調べる
    """
    env = Environment.find(environment)
    with runbook("Check logging", env) as report:
        for log in ("app", "audit"):
            try:
                files = find_logs(Path(path_of(env, log)))
            except OpsError as error:
                report.fail(f"{log}: the log", error.hint, value=error.message)
                continue
            _check(report, env, log, files, datetime.now(UTC) - timedelta(days=days))
        judge_handlers(report, env)
        judge_disk(report, env)
    return report


def _check(report: Report, env: Environment, log: Log, files: tuple[LogFile, ...], since: datetime) -> None:
    """One of them."""
    with reading(files, env.zone, since=since, names=env.logs.fields) as source:
        form = read_form(source, REQUIRED[log], env.logs.ai_message)
        tell_read(report, source, form.bad, of=f"{log}: ")
    judge_form(report, env, log, form)
    judge_leaks(report, log, files)
    judge_rotation(report, env, log, files)


VALID_RATIO = 0.999
AHEAD_SECONDS = 60
SHORT_DAYS = 14


def judge_form(report: Report, env: Environment, log: Log, form: Form) -> None:
    """JSON, fields, zones, clock, tokens."""
    report.prefer(
        f"{log}: lines that are JSON",
        form.valid_ratio >= VALID_RATIO,
        "look at the samples: who writes them?",
        value=f"{form.valid_ratio:.3%} of {form.lines + form.bad:,}",
        expected=f"at least {VALID_RATIO:.1%}",
    )
    lacking = ", ".join(f"{name} in {count:,}" for name, count in form.missing.items())
    report.prefer(
        f"{log}: fields of every line",
        not lacking,
        "correct the application's formatter (§6.1)",
        value=f"missing: {lacking}" if lacking else "all are there",
    )
    report.prefer(
        f"{log}: times have a zone",
        not form.naive,
        "datetime.now(UTC).isoformat() in place of utcnow()",
        value=f"{form.naive:,} have none: read as UTC" if form.naive else "all",
    )
    if log == "app":
        report.prefer(
            "token counts reach the log",
            not form.tokenless,
            "logging puts extra= on the record itself, and the manual's formatter reads record.extra: merge "
            "the record's own attributes, as docs/logs.md shows",
            value=f"{form.tokenless:,} AI calls without a number of tokens" if form.tokenless else "all",
        )
    _judge_clock(report, env, log, form)


def _judge_clock(report: Report, env: Environment, log: Log, form: Form) -> None:
    if form.newest is None:
        report.warn(f"{log}: the newest line", "nothing was written in that time", value="none has a time")
        return
    ahead = (form.newest.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
    offset = (datetime.now(env.zone).utcoffset() or timedelta()).total_seconds()
    local = offset and abs(ahead - offset) < 3600
    hint = (
        f"the application writes {env.zone.key}'s time as if it were UTC: write the zone too"
        if local
        else "correct that host's clock (chronyc tracking)"
    )
    report.require(
        f"{log}: the clock",
        ahead <= AHEAD_SECONDS,
        hint,
        value=f"the newest line is {ahead:,.0f} s in the future"
        if ahead > 0
        else f"the newest line is {-ahead:,.0f} s old",
        expected="not in the future",
    )


def judge_leaks(report: Report, log: Log, files: Sequence[LogFile]) -> None:
    """Secrets and personal data in the newest lines."""
    newest = files[-1]
    try:
        leaks, looked = find_leaks(newest)
    except OSError as error:
        report.warn(f"{log}: secrets in it", "run the worker as a user that may read it", value=error.strerror)
        return
    report.prefer(
        f"{log}: secrets and personal data",
        not leaks,
        "do not log it; then remove the old files (clean-logs)",
        value=", ".join(f"{leak.kind} in {leak.lines:,} of {looked:,} lines" for leak in leaks) or "none found",
    )
    if leaks:
        report.table(
            f"{log}: what must not stand there",
            ("kind", "lines", "one of them, masked"),
            [(leak.kind, leak.lines, leak.example) for leak in leaks],
        )


def judge_rotation(report: Report, env: Environment, log: Log, files: Sequence[LogFile]) -> None:
    """As §6.2 says, once; and the application writes to the new file."""
    if not env.logs.rotation:
        report.fact(f"{log}: rotation", "not checked: [logs] rotation is not configured")
        return
    path, configuration = Path(path_of(env, log)), Path(env.logs.rotation)
    found = read_rotation(configuration, path)
    report.prefer(
        f"{log}: rotated once",
        len(found.blocks) == 1,
        f"write the block of §6.2 into {configuration}" if not found.blocks else "leave one block for it",
        value=f"{len(found.blocks)} blocks of {configuration} cover it",
        expected="1",
    )
    if found.blocks:
        differing = found.differences()
        report.prefer(
            f"{log}: rotation as in the manual",
            not differing,
            "correct it, or leave it where it is meant so",
            value="; ".join(f"{name}: {here} (manual: {wanted})" for name, here, wanted in differing) or "as in §6.2",
        )
        report.require(
            f"{log}: logrotate takes its configuration",
            found.asked and not found.said,
            "correct the file" if found.asked else "apt install logrotate; nothing rotates the logs without it",
            value=found.said or ("yes" if found.asked else "logrotate is not installed"),
            worst=Status.CRITICAL if found.said else Status.WARN,
        )
    rotated = [file for file in files if file.path != path]
    holders = read_holders(rotated)
    stuck = [
        f"{holders.by_inode[file.inode]} into {file.path.name}" for file in rotated if file.inode in holders.writing
    ]
    report.require(
        f"{log}: reopened after rotation",
        not stuck,
        "restart it; then use WatchedFileHandler, or copytruncate",
        value="; ".join(stuck) + " still writes" if stuck else "nobody writes to a rotated file",
    )


def judge_handlers(report: Report, env: Environment) -> None:
    """Two that rotate one file."""
    if not env.has("application") or not env.application.backend_directory:
        return
    handlers = find_handlers(Path(env.application.backend_directory))
    twice = bool(handlers and env.logs.rotation) and Path(env.logs.rotation).exists()
    report.prefer(
        "one that rotates",
        not twice,
        "leave it to logrotate: WatchedFileHandler in the application",
        value=f"logrotate, and {', '.join(handlers[:3])}" if twice else "not both",
    )


def judge_disk(report: Report, env: Environment) -> None:
    """How long the disk lasts, by what the last rotations took."""
    if not env.logs.app:
        return
    directory = Path(env.logs.app).parent
    free = shutil.disk_usage(directory).free if directory.exists() else 0
    daily = 0.0
    for log in ("app", "audit"):
        try:
            files = find_logs.work(Path(path_of(env, log)))
        except (OSError, OpsError):
            continue
        span = (files[-1].modified - files[0].modified).total_seconds() / 86_400
        daily += sum(file.bytes for file in files) / max(span, 1)
    days = free / daily if daily else float("inf")
    report.prefer(
        "disk of the logs",
        days >= SHORT_DAYS,
        "clean-logs, or a larger disk",
        value=f"{size(free)} free, {size(daily)} a day: {min(days, 9999):,.0f} days",
        expected=f"at least {SHORT_DAYS} days",
    )
