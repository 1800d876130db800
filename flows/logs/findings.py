"""Findings of every search in the logs: files read, and lines or files that could not be read."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from blocks.environment import Environment
from runbook import clock
from runbook.masking import masked
from runbook.report import Report
from runbook.units import size
from tasks.logs.reading.samples import find_bad_lines, is_half_written
from tasks.logs.reading.source import LogSource, count_undated

Log = Literal["app", "audit"]


def report_files_read(report: Report, source: LogSource, bad: int, of: str = "") -> None:
    """Files read, lines that are not JSON, and unreadable files: nothing is left out silently."""
    names = ", ".join(file.path.name for file in source.files) or "no file was written in that time"
    report.fact(f"{of}files read", f"{size(source.bytes)} in {len(source.files)} files: {names}")
    if not source.bytes:
        report.warn(
            f"{of}something to read",
            "check whether the application still logs",
            value="not measured: no line was written in that time",
        )
    for name, why in sorted(source.unreadable.items()):
        report.warn(
            f"{of}{name} is whole",
            "check the file and this user's permissions: its lines are not counted",
            value=why,
        )
    if bad and is_half_written(source.files):
        bad -= 1
        report.fact(f"{of}half-written line", "the newest line is incomplete and is not counted")
    if not bad:
        report.passed(f"{of}lines that are not JSON objects", value="none")
        return
    report.warn(
        f"{of}lines that are not JSON objects",
        "find the program that writes them: these lines are not counted",
        value=f"{bad:,}",
        expected="none",
    )
    samples = [(one.file, one.line, masked(one.text)) for one in find_bad_lines(source.files)]
    report.table(f"{of}Lines that are not JSON objects (the first ones)", ("file", "line", "text"), samples)


def report_searched(
    report: Report,
    asked: Mapping[str, str],
    times: tuple[datetime | None, datetime | None],
    found: int,
    whole: LogSource | None = None,
) -> None:
    """What was searched for and in which time. `times`: since and until, None where the form left them empty. `whole`:
    its table `times` has the time of every line. Nothing found proves something about that only."""
    since, until = (clock.text(at) if at else "" for at in times)
    report.fact("searched for", ", ".join(f"{name}={value}" for name, value in asked.items() if value) or "every line")
    report.fact("time asked for", f"{since or 'the first line'} to {until or 'now'}")
    if whole:
        count, first, last = whole.rows("SELECT count(*), min(time), max(time) FROM times")[0]
        span = " to ".join(clock.text(at.replace(tzinfo=UTC)) for at in (first, last) if at)
        report.fact("lines read", f"{count:,} lines, written {span}" if span else f"{count:,}")
    if not found:
        report.fact(
            "nothing matched",
            "no proof that nothing happened: only these files, this time and these conditions were searched. Search "
            "again with fewer conditions, and check how the log spells them",
        )


def report_undated(report: Report, source: LogSource, of: str = "") -> None:
    """Lines of the table `undated`: they match the search but for their time, which is unreadable."""
    if count := count_undated(source):
        report.warn(
            f"{of}lines without a readable time",
            "correct the application's formatter (§6.1): these lines are not counted, and may belong to that time",
            value=f"{count:,}",
            expected="none",
        )
        rows = source.rows("SELECT line FROM undated LIMIT 5")
        report.table(
            f"{of}Lines without a readable time (the first ones)",
            ("line",),
            [(masked(str(row[0])[:300]),) for row in rows],
        )


def path_of(env: Environment, log: Log) -> str:
    """The path of a log.

    Raises:
        OpsError: the environment's TOML does not name it.
    """
    return env.logs.need("app" if log == "app" else "audit")
