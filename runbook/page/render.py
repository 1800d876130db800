"""The report as a page: Markdown with tables, and pictures as SVG data URIs, which the Prefect UI renders."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import replace

from runbook import clock
from runbook.language.say import label, say
from runbook.next import Next
from runbook.page.form import Forms
from runbook.page.markdown import before_fence, code, escaped
from runbook.page.timeline import timeline
from runbook.report import Evidence, Finding, Report, Status
from runbook.units import duration, size

MARK = {Status.PLANNED: "📝", Status.OK: "✅", Status.WARN: "⚠️", Status.CRITICAL: "🛑"}
MOST_OPEN_ROWS = 20
MOST_ROWS = 200
MOST_CHARACTERS = 300
_LINE = re.compile(r"^(- |\d+\. |)([^|#`\s].*)$", re.MULTILINE)
AT_ONCE = ("lost", "acknowledged writes lost", "writes lost", "outage", "outage for clients", "undo")
"""Facts that lead the page."""


def key(report: Report) -> str:
    """The artifact's key and the file's name: `full-restore`."""
    return re.sub(r"[^a-z0-9]+", "-", report.runbook.lower()).strip("-")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; says how many rows it leaves out."""
    lines = ["| " + " | ".join(map(_name, columns)) + " |", "|" + "---|" * len(columns)]
    cells = [_shortened if name else _name for name in columns]  # a column without a heading has names
    for row in rows[:MOST_ROWS]:
        lines.append("| " + " | ".join(show(str(cell)) for show, cell in zip(cells, row, strict=True)) + " |")
    if len(rows) > MOST_ROWS:
        lines.append(f"\n… {say(f'{len(rows) - MOST_ROWS} more rows in the JSON report')}")
    return "\n".join(lines)


def markdown(report: Report, forms: Forms | None = None) -> str:
    """The whole page, in the order in which it is read at night: what happened and what to do now, the plan, findings,
    evidence, steps. Each name of a runbook is a link to its form, as far as `forms` has it."""
    forms = forms or Forms()
    title = f"# {MARK[report.status]} {_name(report.runbook)} · {escaped(report.environment)} · {report.status}"
    parts = [title, escaped(report.sentence(say, label))]
    if first := _at_once(report, forms):
        parts.append(first)
    if report.planned:
        parts.append(f"## {label('Plan (nothing was changed)')}\n{_plan(report)}")
        parts.append(f"**{label('To carry it out')}:** {_carry_out(report)}")
    parts.append(f"## {label('Findings')}\n{_findings(report, forms)}")
    facts = [(label("started"), clock.text(report.started)), (label("took"), duration(report.seconds))]
    facts += report.facts.items()
    parts.append(f"## {label('Facts')}\n{table(('', ' '), facts)}")
    parts += [f"## {_name(item.name)}\n{_evidence(item, report)}" for item in report.evidence]
    if report.steps:
        seconds = _folded(label("seconds"), _steps(report))
        parts.append(f"## {label('Steps')}\n{image('steps', timeline(report))}\n\n{seconds}")
    parts.append(_folded(label("chain"), say(f"`{report.hash}` follows `{report.previous}`")))
    return forms.linked("\n\n".join(parts) + "\n", report.environment)


def _at_once(report: Report, forms: Forms) -> str:
    """What to do now, what is lost, for how long it was down, how to undo it: as far as the run says so."""
    bad = [one for one in report.most_urgent if one.status in (Status.WARN, Status.CRITICAL)]
    todo = next((what for one in bad if (what := _what_to_do(one, forms, report.environment))), "")
    lines = [f"- **{label('do now')}:** {_line(todo)}"] if todo else []
    shown = {name: _shortened(report.facts[name]) for name in AT_ONCE if name in report.facts}
    if report.undo:
        shown["undo"] = _line(", ".join(forms.next(_spoken(one), report.environment) for one in report.undo))
    lines += [f"- **{label(name)}:** {text}" for name, text in shown.items()]
    return "\n".join(lines)


def image(name: str, svg: str) -> str:
    """An SVG as an image in Markdown."""
    return f"![{escaped(name)}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _plan(report: Report) -> str:
    rows = [
        (number, label(p.step), p.detail, size(p.bytes) if p.bytes else "", duration(p.seconds) if p.seconds else "")
        for number, p in enumerate(report.plan_steps, 1)
    ]
    return table(("#", "step", "what", "size", "about"), rows)


def _findings(report: Report, forms: Forms) -> str:
    """What needs attention as blocks, which fit any width, worst first; what passed is folded."""
    found = report.most_urgent
    bad = [one for one in found if one.status is not Status.OK]
    parts = [_block(one, forms, report.environment) for one in bad[:MOST_ROWS]] or [say("Nothing needs attention.")]
    if more := len(bad) - MOST_ROWS:
        parts += [f"… {say(f'{more} more findings in the JSON report')}"] if more > 0 else []
    if passed := [(label(one.name), one.value, one.expected) for one in found if one.status is Status.OK]:
        rows = table(("finding", "value", "expected"), passed)
        parts.append(_folded(say(f"{len(passed)} checks passed"), rows))
    return "\n\n".join(parts)


def _block(finding: Finding, forms: Forms, environment: str) -> str:
    """One finding: what was measured, what was expected, what to do."""
    todo = _what_to_do(finding, forms, environment)
    named = (("", finding.value), (f"{label('expected')}: ", finding.expected))
    lines = [f"- {name}{_shortened(text)}" for name, text in named if text]
    lines += [f"- **{label('next step')}:** {_line(todo)}"] if todo else []
    return "\n".join([f"### {MARK[finding.status]} {_name(finding.name)}", *lines])


def _what_to_do(finding: Finding, forms: Forms, environment: str) -> str:
    """The hint, and each runbook to follow as a link to its form."""
    named = (forms.next(_spoken(one), environment) for one in finding.follow)
    return ". ".join(filter(None, (say(finding.hint).rstrip(".。"), *named)))


def _spoken(one: Next) -> Next:
    return replace(one, why=say(one.why), reminder=say(one.reminder))


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _steps(report: Report) -> str:
    steps = sorted(report.steps, key=lambda step: step.started)
    rows = [(s.name, clock.time_of_day(s.started), f"{s.seconds:.2f}", s.status) for s in steps]
    return table(("step", clock.heading("started"), "seconds", "status"), rows)


def _evidence(item: Evidence, report: Report) -> str:
    parts = [_written(item.text)] if item.text else []
    if item.svg:
        parts.append(image(item.name, item.svg))
    if len(item.rows) > MOST_OPEN_ROWS:
        rows = table(item.columns, item.rows)
        parts.append(_folded(say(f"{len(item.rows)} rows"), rows))
    elif item.columns:
        parts.append(table(item.columns, item.rows) if item.rows else label("none"))
    if item.csv and report.path:
        parts.append(f"{label('All rows as CSV')}: {code(str(item.csv_path(report.path)))}")
    return "\n\n".join(parts)


def _written(text: str) -> str:
    """Text and lists line by line. What a program printed is in a fence; a table has its language already."""
    head, printed = before_fence(text)
    return _LINE.sub(lambda found: found[1] + say(found[2]), head) + printed


def _carry_out(report: Report) -> str:
    if not report.form.startswith("http"):
        return escaped(say(report.form))
    form, confirm = f"[{label('the form')}]({report.form})", code(report.environment)
    return say(f"open {form}, type {confirm} in `confirm`.")


def _line(text: str) -> str:
    return escaped(" ".join(text.split()))


def _name(text: str) -> str:
    """Of a finding, a column, a part of the page."""
    return _shortened(label(text))


def _shortened(value: object) -> str:
    text = say(" ".join(str(value).split()))
    whole = len(text) <= MOST_CHARACTERS or "](" in text  # a link that is cut is none
    return escaped(text if whole else text[:MOST_CHARACTERS] + "…")
