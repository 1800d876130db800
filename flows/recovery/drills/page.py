"""A report as one self-contained HTML file next to its JSON, to read, print and archive without Prefect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from html import escape

from runbook import clock
from runbook.files import durable
from runbook.language.say import label, say, use_language
from runbook.log import logger
from runbook.page.render import MARK
from runbook.page.timeline import timeline
from runbook.report import Evidence, Report, Status
from runbook.units import duration

_STYLE = """
body{font-family:system-ui,"Noto Sans JP",sans-serif;color:#212529;margin:2rem auto;max-width:70rem;padding:0 1rem}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{border:1px solid #ced4da;padding:.25rem .6rem;
text-align:left;vertical-align:top;overflow-wrap:break-word}th{background:#f1f3f5}h2{margin-top:2rem}
.CRITICAL{background:#ffe3ec}.WARN{background:#fff3bf}svg{max-width:100%;height:auto}
"""


@contextlib.contextmanager
def written_at_end() -> Iterator[list[Report]]:
    """Yields a list for the block's report; its page is written at the end of the block, also after an error."""
    reports = list[Report]()
    try:
        yield reports
    finally:
        for report in reports:
            _write(report)


def _write(report: Report) -> None:
    if report.path is None:  # the report could not be written
        return
    try:
        durable.write(report.path.with_suffix(".html"), html(report), errors="backslashreplace", mode=durable.PRIVATE)
    except OSError as error:
        logger().warning("the page of the report could not be written: %s", error.strerror)


def html(report: Report) -> str:
    """The whole page: facts, findings, tables, plots and steps, in the report's language. It loads nothing from other
    servers."""
    with use_language(report.language):
        return _html(report)


def _html(report: Report) -> str:
    title = f"{MARK[report.status]} {label(report.runbook)} · {report.environment} · {report.status}"
    facts = {"started": f"{clock.text(report.started)}", "took": duration(report.seconds)} | report.facts
    findings = [
        (f.status, label(f.name), f.value, f.expected, f.hint)
        for f in sorted(report.findings, key=lambda f: -list(Status).index(f.status))
    ]
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(report.sentence(say, label))}</p>",
        _table((), [(label(name), value) for name, value in facts.items()]),
        f"<h2>{label('Findings')}</h2>",
        _table(("", "finding", "value", "expected", "next step"), findings, coloured=True),
        *(_evidence(item) for item in report.evidence),
        f"<h2>{label('Steps')}</h2>{timeline(report)}" if report.steps else "",
        f"<p><small>{label('chain')}: {report.hash} ← {report.previous}</small></p>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html><html lang="{report.language}"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _evidence(item: Evidence) -> str:
    said = item.text if "\n" in item.text else say(item.text)
    text = f"<pre>{escape(said)}</pre>" if said else ""
    table = (_table(item.columns, item.rows) if item.rows else f"<p>{label('none')}</p>") if item.columns else ""
    return f"<h2>{escape(label(item.name))}</h2>{text}{item.svg}{table}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, coloured: bool = False) -> str:
    head = "<tr>" + "".join(f"<th>{escape(label(column))}</th>" for column in columns) + "</tr>" if columns else ""
    body = "".join(
        f'<tr class="{escape(str(row[0])) if coloured else ""}">'
        + "".join(f"<td>{escape(say(str(cell)))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table>{head}{body}</table>"
