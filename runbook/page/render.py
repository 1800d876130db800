"""The report as a page: Markdown with tables, and pictures as SVG data URIs, which the Prefect UI renders."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

from runbook import clock
from runbook.page.form import Forms
from runbook.page.markdown import code, escaped
from runbook.page.timeline import timeline
from runbook.report import Evidence, Finding, Report, Status
from runbook.units import duration, size

MARK = {Status.PLANNED: "📝", Status.OK: "✅", Status.WARN: "⚠️", Status.CRITICAL: "🛑"}
MOST_OPEN_ROWS = 20
MOST_ROWS = 200
MOST_CHARACTERS = 300


def key(report: Report) -> str:
    """The artifact's key and the file's name: `full-restore`."""
    return re.sub(r"[^a-z0-9]+", "-", report.runbook.lower()).strip("-")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; says how many rows it leaves out."""
    lines = ["| " + " | ".join(map(_cell, columns)) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        lines.append(f"\n… {len(rows) - MOST_ROWS} more rows in the JSON report")
    return "\n".join(lines)


def markdown(report: Report, forms: Forms | None = None) -> str:
    """The whole page; with links to `forms` of the runbooks that its findings name."""
    title = f"# {MARK[report.status]} {escaped(report.runbook)} · {escaped(report.environment)} · {report.status}"
    parts = [title, escaped(report.sentence())]
    head = {"started": clock.text(report.started), "took": duration(report.seconds)}
    parts.append(table(("", ""), list((head | report.facts).items())))
    if report.planned:
        parts.append("## Plan (nothing was changed)\n" + _plan(report))
        parts.append(
            f"**To carry it out:** open [the form]({report.form}), type {code(report.environment)} in `confirm`."
            if report.form.startswith("http")
            else f"**To carry it out:** {escaped(report.form)}"
        )
    parts.append("## Findings\n" + _findings(report, forms or Forms()))
    parts += [f"## {escaped(item.name)}\n{_evidence(item, report)}" for item in report.evidence]
    if report.steps:
        parts.append("## Steps\n" + image("steps", timeline(report)) + "\n\n" + _steps(report))
    parts.append(f"<details><summary>chain</summary>\n\n`{report.hash}` follows `{report.previous}`\n</details>")
    return "\n\n".join(parts) + "\n"


def image(name: str, svg: str) -> str:
    """An SVG as an image in Markdown."""
    return f"![{escaped(name)}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _plan(report: Report) -> str:
    rows = [
        (number, p.step, p.detail, size(p.bytes) if p.bytes else "", duration(p.seconds) if p.seconds else "")
        for number, p in enumerate(report.plan_steps, 1)
    ]
    return table(("#", "step", "what", "size", "about"), rows)


def _findings(report: Report, forms: Forms) -> str:
    """What needs attention first; what is well is folded."""
    worst = sorted(report.findings, key=lambda f: -list(Status).index(f.status))
    todo = [_what_to_do(one, forms, report.environment) for one in worst]
    rows = [
        (MARK[f.status] + " " + f.status, f.name, f.value, f.expected, what)
        for f, what in zip(worst, todo, strict=True)
    ]
    open_rows = [row for row, finding in zip(rows, worst, strict=True) if finding.status is not Status.OK]
    columns = ("", "finding", "value", "expected", "what to do")
    parts = [table(columns, open_rows)] if open_rows else ["Nothing needs attention."]
    if well := rows[len(open_rows) :]:
        parts.append(_folded(f"{len(well)} checks passed", table(columns[:4], [row[:4] for row in well])))
    return "\n\n".join(parts)


def _what_to_do(finding: Finding, forms: Forms, environment: str) -> str:
    """The hint, and each runbook to follow as a link to its form."""
    named = (forms.next(one, environment) for one in finding.follow)
    return ". ".join(filter(None, (finding.hint.rstrip("."), *named)))


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _steps(report: Report) -> str:
    steps = sorted(report.steps, key=lambda step: step.started)
    rows = [(s.name, clock.time_of_day(s.started), f"{s.seconds:.2f}", s.status) for s in steps]
    return table(("step", clock.heading("started"), "seconds", "status"), rows)


def _evidence(item: Evidence, report: Report) -> str:
    parts = [item.text] if item.text else []
    if item.svg:
        parts.append(image(item.name, item.svg))
    if len(item.rows) > MOST_OPEN_ROWS:
        rows = table(item.columns, item.rows)
        parts.append(_folded(f"{len(item.rows)} rows", rows))
    elif item.columns:
        parts.append(table(item.columns, item.rows) if item.rows else "none")
    if item.csv and report.path:
        parts.append(f"All rows as CSV: {code(str(item.csv_path(report.path)))}")
    return "\n\n".join(parts)


def _cell(value: object) -> str:
    text = " ".join(str(value).split())
    whole = len(text) <= MOST_CHARACTERS or "](" in text  # a link that is cut is none
    return escaped(text if whole else text[:MOST_CHARACTERS] + "…")
