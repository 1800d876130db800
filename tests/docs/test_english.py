"""The sources are English: a Japanese reader's texts come from the catalogues of runbook/language."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.commands import ROOT

FOLDERS = ("runbook", "blocks", "tasks", "flows", "deployments")
JAPANESE = re.compile("[ぁ-んァ-ヶ一-龥]")
ALLOWED = {
    "blocks/postgres/refusals.py": "recognises a server's messages",
    "blocks/postgres/server.py": "recognises a server's messages",
    "tasks/host/restarts.py": "recognises a server's log lines",
    "tasks/postgres/server/log_reasons.py": "recognises a server's log lines",
    "tasks/postgres/upkeep/vacuum.py": "recognises a server's messages",
    "tasks/ai/interview.py": "test data: a question to an AI provider",
    "tasks/drill/ledger.py": "test data: what a drill writes",
    "tasks/load/users.py": "test data: what a load test writes",
    "flows/monitoring/wording.py": "recognises tags of deployments: the manual's names of owners",
    "flows/routine/checklist/forms.py": "recognises answers in older reports",
    "flows/routine/checklist/texts.py": "writes the manual's headings",
    "flows/troubleshooting/symptoms.py": "each symptom is written in both languages",
    "runbook/language/catalogue.py": "recognises the end of a Japanese sentence",
    "deployments/catalogue.py": "writes pages for the docs",
    "deployments/forms.py": "reads the manual's numbers of sections",
    "deployments/maintenance.py": "reads and writes the manual's table of maintenance",
}


def literals(path: Path) -> Iterator[str]:
    """A module's texts but for docstrings: a flow's begins with the manual's title."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}
    for one in ast.walk(tree):
        if isinstance(one, ast.Constant) and isinstance(one.value, str) and id(one) not in docstrings:
            yield one.value


def test_no_module_has_a_japanese_text_but_those_that_read_japanese() -> None:
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(modules) > 500
    found = {str(path.relative_to(ROOT)) for path in modules if any(map(JAPANESE.search, literals(path)))}
    assert found == set(ALLOWED)
