"""What a report says, for tests: its findings and tables by name."""

from __future__ import annotations

from runbook.report import Finding, Report, Status


def finding(report: Report, name: str) -> Finding:
    """The finding of that name."""
    return next(one for one in report.findings if one.name == name)


def beginning(report: Report, start: str) -> Finding:
    """The first finding whose name begins so."""
    return next(one for one in report.findings if one.name.startswith(start))


def values(report: Report) -> dict[str, str]:
    """The values of all findings, by name."""
    return {one.name: one.value for one in report.findings}


def bad(report: Report) -> dict[str, str]:
    """The values of the findings that are not OK, by name."""
    return {one.name: one.value for one in report.findings if one.status is not Status.OK}


def text_of(report: Report, part: str) -> str:
    """Status, value and hint of all findings whose name has that in it."""
    return " | ".join(f"{one.status} {one.value} {one.hint}" for one in report.findings if part in one.name)


def rows(report: Report, name: str) -> list[tuple[str, ...]]:
    """The rows of the table of that name."""
    return list(next(item.rows for item in report.evidence if item.name == name))
