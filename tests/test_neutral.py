"""The code knows no application: its paths, names and tables are in an environment's TOML."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Addresses of documentation, and the REST API of Prefect's own server.
ALLOWED = re.compile(r"https://\S+|/api/(?:health|ready|version|admin|flow_runs|flows|deployments|work_pools|events)\b")
OWN = re.compile(r"/api/|grc|interview_(?:sessions|messages)", re.IGNORECASE)


def own_to_an_application(text: str) -> list[str]:
    """Lines that name a path, a service or a table of one application."""
    return [line for line in text.splitlines() if OWN.search(ALLOWED.sub("", line))]


@pytest.mark.parametrize("folder", ["runbook", "blocks", "tasks", "flows", "deployments"])
def test_no_code_names_a_path_a_service_or_a_table_of_one_application(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules
    found = {str(path.relative_to(ROOT)): own_to_an_application(path.read_text(encoding="utf-8")) for path in modules}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_rule_finds_what_it_is_for() -> None:
    assert own_to_an_application('"/api/auth/login"\nGRC_backend\n"public.interview_sessions"') != []
    assert own_to_an_application("https://docs.docker.com/reference/api/engine/\n{server}/api/flow_runs/filter") == []
