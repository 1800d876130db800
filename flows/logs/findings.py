"""What every search of the logs tells: what was read, and what could not be."""

from __future__ import annotations

from typing import Literal

from blocks.environment import Environment
from runbook.masking import masked
from runbook.report import Report
from runbook.units import size
from tasks.logs.reading.samples import find_bad_lines, is_half_written
from tasks.logs.reading.source import Source, count_undated

Log = Literal["app", "audit"]


def tell_read(report: Report, source: Source, bad: int, of: str = "") -> None:
    """Files, lines that are no JSON, and files that cannot be read: nothing is left out silently."""
    names = ", ".join(file.path.name for file in source.files) or "none of the files was written to in that time"
    report.fact(f"{of}read", f"{size(source.bytes)} in {len(source.files)} files: {names}")
    if not source.bytes:
        report.warn(
            f"{of}something to read",
            "not measured, rather than well: look whether the application still logs",
            value="no line was written in that time",
        )
    for name, why in sorted(source.unreadable.items()):
        report.warn(
            f"{of}{name} is whole",
            "what it holds is not counted: look at the file, and at this user's rights",
            value=why,
        )
    if bad and is_half_written(source.files):
        bad -= 1
        report.fact(f"{of}half-written", "the newest line is not at its end yet: it is not counted")
    if not bad:
        report.passed(f"{of}lines that are no JSON objects", value="none")
        return
    report.warn(
        f"{of}lines that are no JSON objects",
        "they are in none of the counts: find out who writes them",
        value=f"{bad:,}",
        expected="none",
    )
    samples = [(one.file, one.line, masked(one.text)) for one in find_bad_lines(source.files)]
    report.table(f"{of}Lines that are no JSON objects (the first ones)", ("file", "line", "text"), samples)


def tell_undated(report: Report, source: Source, of: str = "") -> None:
    """Valid lines of what was looked for without a readable time, of the table `undated`: they may be of that time."""
    if count := count_undated(source):
        report.warn(
            f"{of}lines without a readable time",
            "they are in none of the counts, and may be of that time: correct the application's formatter (§6.1)",
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
    """Where a log is.

    Raises:
        OpsError: the environment does not say.
    """
    return env.logs.need("app" if log == "app" else "audit")
