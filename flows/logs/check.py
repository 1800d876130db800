"""The form and the rotation of the logs, on which all other log runbooks rely (§6.1, §6.2, §6.4)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.logs.findings import Log, path_of, report_files_read
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.logs.figures.form import APP, AUDIT, Form, find_leaks, read_form
from tasks.logs.reading.files import LogFile, find_logs
from tasks.logs.reading.source import reading
from tasks.logs.rotation.cleaning import read_holders
from tasks.logs.rotation.handlers import find_handlers
from tasks.logs.rotation.rotation import read_rotation

REQUIRED = {"app": APP, "audit": AUDIT}


@flow(name="check-logging", flow_run_name=RunName("check-logging {environment} {days}d"))
def check_logging(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 7) -> Report:
    """構造化ログ・ログローテーションの確認 (§6.1, §6.2)

    Checks the application's log and the audit log: JSON lines with the manual's fields, times with a zone, a correct
    clock, token counts, no secrets or personal data. It also checks their rotation (`logrotate -d` changes nothing),
    that the application writes to the new file after a rotation, and how long the disk space lasts. Run it weekly, and
    after a change of the application's logging.

    It changes nothing. A missing logrotate is a WARN.

    Departs from the manual: its formatter reads record.extra, which never exists, so token counts are lost; its
    RotatingFileHandler and logrotate rotate the same file. This check finds both.

    Args:
        environment: Environment (lab, staging, production …)
        days: Check files written within this many days
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
        report_files_read(report, source, form.bad, of=f"{log}: ")
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
        "find the program that writes the lines in the samples",
        value=f"{form.valid_ratio:.3%} of {form.lines + form.bad:,}",
        expected=f"at least {VALID_RATIO:.1%}",
    )
    lacking = ", ".join(f"{name} in {count:,}" for name, count in form.missing.items())
    report.prefer(
        f"{log}: fields of every line",
        not lacking,
        "correct the application's formatter (§6.1)",
        value=f"missing: {lacking}" if lacking else "none is missing",
    )
    report.prefer(
        f"{log}: times have a zone",
        not form.naive,
        "use datetime.now(UTC).isoformat() instead of utcnow()",
        value=f"{form.naive:,} have no zone and are read as UTC" if form.naive else "all",
    )
    if log == "app":
        report.prefer(
            "token counts reach the log",
            not form.tokenless,
            "correct the formatter as in docs/logs.md: logging sets extra= as attributes of the record",
            value=f"{form.tokenless:,} AI calls without a number of tokens" if form.tokenless else "all",
        )
    _judge_clock(report, env, log, form)


def _judge_clock(report: Report, env: Environment, log: Log, form: Form) -> None:
    if form.newest is None:
        report.warn(
            f"{log}: the newest line",
            "check that the application logs, and with a timestamp",
            value="no line has a time",
        )
        return
    ahead = (form.newest.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
    offset = (datetime.now(env.zone).utcoffset() or timedelta()).total_seconds()
    local = offset and abs(ahead - offset) < 3600
    hint = (
        f"add the zone to the application's times: it writes {env.zone.key}'s time as UTC"
        if local
        else "correct the host's clock (chronyc tracking)"
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
        report.warn(f"{log}: secrets in it", "run the worker as a user who can read it", value=error.strerror)
        return
    report.prefer(
        f"{log}: secrets and personal data",
        not leaks,
        "stop logging them; then delete the old files (clean-logs)",
        value=", ".join(f"{leak.kind} in {leak.lines:,} of {looked:,} lines" for leak in leaks) or "none found",
    )
    if leaks:
        report.table(
            f"{log}: what must not be in the log",
            ("kind", "lines", "one of them, masked"),
            [(leak.kind, leak.lines, leak.example) for leak in leaks],
        )


def judge_rotation(report: Report, env: Environment, log: Log, files: Sequence[LogFile]) -> None:
    """One block of logrotate as in §6.2; the application writes to the new file after a rotation."""
    if not env.logs.rotation:
        report.fact(f"{log}: rotation", "not checked: [logs] rotation is not configured")
        return
    path, configuration = Path(path_of(env, log)), Path(env.logs.rotation)
    found = read_rotation(configuration, path)
    report.prefer(
        f"{log}: rotated once",
        len(found.blocks) == 1,
        f"write the block of §6.2 into {configuration}" if not found.blocks else "keep one block for it",
        value=f"{len(found.blocks)} blocks of {configuration} cover it",
        expected="1",
    )
    if found.blocks:
        differing = found.differences()
        report.prefer(
            f"{log}: rotation as in the manual",
            not differing,
            "correct the configuration, unless the difference is intended",
            value="; ".join(f"{name}: {here} (manual: {wanted})" for name, here, wanted in differing) or "as in §6.2",
        )
        report.require(
            f"{log}: logrotate takes its configuration",
            found.asked and not found.said,
            "correct the file" if found.asked else "run apt install logrotate: nothing rotates the logs without it",
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
        "restart the process; then use WatchedFileHandler, or copytruncate",
        value="; ".join(stuck) + " still writes" if stuck else "no process writes to a rotated file",
    )


def judge_handlers(report: Report, env: Environment) -> None:
    """Two programs that rotate the same file."""
    if not env.has("application") or not env.application.backend_directory:
        return
    handlers = find_handlers(Path(env.application.backend_directory))
    twice = bool(handlers and env.logs.rotation) and Path(env.logs.rotation).exists()
    report.prefer(
        "one program rotates the log",
        not twice,
        "use WatchedFileHandler in the application, and let logrotate rotate",
        value=f"logrotate, and {', '.join(handlers[:3])}" if twice else "not both",
    )


def judge_disk(report: Report, env: Environment) -> None:
    """How long the disk space lasts at the size of the last rotations."""
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
        "run clean-logs, or enlarge the disk",
        value=f"{size(free)} free, {size(daily)} a day: {min(days, 9999):,.0f} days",
        expected=f"at least {SHORT_DAYS} days",
    )
