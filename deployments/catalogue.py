"""The catalogue of runbooks, the manual's coverage and the table of thresholds: generated from the code.

python -m deployments.catalogue [--check]
"""

from __future__ import annotations

import functools
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from deployments.generated import with_table, write_or_check
from deployments.runbooks import ROOT, Runbook, read_runbooks
from runbook.drivers import exit_code
from runbook.metrics import BACKUP_AGE, CATALOGUE, REDIS_LOSS

DOCS = ROOT / "docs"
MADE = "<!-- Made by `make catalogue` from the flows and prefect.yaml: edit those. -->"


@functools.cache
def manual() -> Mapping[str, Mapping[str, str]]:
    """Titles of the manual's chapters and of its sections by number, and what each folder of flows carries out."""
    return tomllib.loads((ROOT / "deployments" / "manual.toml").read_text(encoding="utf-8"))


def covered(runbooks: Sequence[Runbook]) -> dict[str, list[Runbook]]:
    """The runbooks of each section; a runbook of a whole chapter (§1) is told under that."""
    known = [*manual()["sections"], *(f"§{chapter}" for chapter in manual()["chapters"] if chapter.isdigit())]
    return {section: [one for one in runbooks if section in one.sections] for section in known}


def catalogue_page(runbooks: Sequence[Runbook]) -> str:
    """Every runbook: title, section, tags, description, parameters, deployments."""
    parts = [
        f"# Runbooks (手順カタログ)\n\n{len(runbooks)} flows. ✍ marks those that take `confirm`: left empty they show "
        "their plan and change nothing.\n\nDeployed as `<flow>/<environment>`. In the UI: Deployments, by a tag "
        "(section, owner, chapter, frequency)."
    ]
    for chapter in dict.fromkeys(one.chapter for one in runbooks):
        parts.append(f"## {chapter}")
        parts += [_entry(one) for one in runbooks if one.chapter == chapter]
    return MADE + "\n\n" + "\n\n".join(parts) + "\n"


def _entry(one: Runbook) -> str:
    rows = [
        (f"`{parameter.name}`", parameter.kind, parameter.default, _escaped(parameter.help))
        for parameter in one.parameters
    ]
    facts = [
        f"**{_escaped(one.title)}**",
        f"`{one.entrypoint}` · " + " · ".join([*one.tags, *(["✍ `confirm`"] if one.confirms else [])]),
        "Schedule: " + "; ".join(one.schedules) if one.schedules else "",
        one.description,
        _table(("parameter", "field", "default", "help"), rows),
    ]
    return "\n\n".join([f"### {one.name}", *filter(None, facts)])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With nothing cut off, as a report's tables are."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def _escaped(text: str) -> str:
    """As it is written, in Markdown."""
    return re.sub(r"([*_`<\[\]])", r"\\\1", text)


def coverage_page(runbooks: Sequence[Runbook]) -> str:
    """Each section of the manual, and the runbooks that carry it out."""
    chapters, sections = manual()["chapters"], manual()["sections"]
    found = covered(runbooks)
    parts = ["# The manual's coverage (マニュアル対応表)\n\nEach section of the operations manual, and its flows."]
    for chapter, title in chapters.items():
        parts.append(f"## {chapter}. {title}" if chapter.isdigit() else f"## {title}")
        own = [key for key in sections if re.match(rf"§?{chapter}[.A-C]", key)]
        rows = [(key, sections[key], _links(found[key])) for key in own]
        if whole := found.get(f"§{chapter}"):
            rows.append((f"§{chapter}", "(章全体)", _links(whole)))
        parts.append(_table(("section", "title", "flows"), rows))
    return MADE + "\n\n" + "\n\n".join(parts) + "\n"


def _links(runbooks: Sequence[Runbook]) -> str:
    return ", ".join(f"[{one.name}](catalogue.md#{one.name})" for one in runbooks) or "—"


def thresholds_page() -> str:
    """Every metric of `[thresholds]` with its default limits."""
    rpo = "the RPO", "a day, or twice the RPO"
    by_rpo = {BACKUP_AGE.name: rpo, REDIS_LOSS.name: ("half the RPO", "the RPO")}
    rows = [
        (f"`{one.name}`", one.measures, *by_rpo.get(one.name, map(one.show, one.limits)), one.section or "—")
        for one in CATALOGUE.values()
    ]
    return (
        f"# Which limits are there, and where are they set?\n\n{MADE}\n\n`[thresholds]` in the environment's TOML sets "
        'them: `"metric" = [warn above, critical above]`, in seconds, bytes, or as a ratio (0.85 is 85 %). '
        "A metric that is not listed there has the limits below. Register the environment again after a change: "
        "`python -m deployments.register`.\n\n"
        + _table(("metric", "measures", "WARN above", "CRITICAL above", "manual"), rows)
        + "\n\nThe defaults are in `runbook/metrics.py`.\n"
    )


def chapters_table(runbooks: Sequence[Runbook], columns: Sequence[str]) -> str:
    """For a README: how many runbooks each chapter has, with a link to them in the catalogue."""
    rows = []
    for folder, chapter in manual()["folders"].items():
        if count := sum(one.chapter == folder for one in runbooks):
            rows.append((f"[{folder}](docs/catalogue.md#{folder})", chapter, str(count)))
    return _table(columns, rows)


def pages() -> dict[Path, str]:
    """What is made, by the file that it is kept in."""
    runbooks = read_runbooks()
    readmes = {
        ROOT / "README.md": ("chapter", "manual", f"{len(runbooks)} runbooks"),
        ROOT / "README.ja.md": ("章", "マニュアル", f"手順 ({len(runbooks)})"),
    }
    return {
        DOCS / "catalogue.md": catalogue_page(runbooks),
        DOCS / "coverage.md": coverage_page(runbooks),
        DOCS / "thresholds.md": thresholds_page(),
        **{path: with_table(path, MADE, chapters_table(runbooks, columns)) for path, columns in readmes.items()},
    }


def main() -> int:
    """The command line: 0 when the pages are current."""
    return write_or_check(pages, __doc__ or "", "make catalogue")


if __name__ == "__main__":
    sys.exit(exit_code(main))
