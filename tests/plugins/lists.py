"""Tests that are listed in files get that file's mark (a plugin), so that `make test` ends while you wait.

tests/thorough.txt: `make test` leaves them to `make test-all`. Each is expensive, and is one more case of a promise that
a quicker test proves. tests/soak.txt: only `make soak` runs them. They cost most of all, and CI proves their promises
elsewhere: another boundary of a kill, another tool that hangs, the other order of two events.

A line is a file, a test function or method, or one of its cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LISTED = {name: frozenset((TESTS / f"{name}.txt").read_text().splitlines()) for name in ("thorough", "soak")}
COLLECTED = set[str]()
"""Every test of this run, also those that its marks leave out."""


def names_of(node_id: str) -> set[str]:
    """The lines that list a test.

    >>> sorted(names_of("tests/test_a.py::test_b[c]"))
    ['tests/test_a.py', 'tests/test_a.py::test_b', 'tests/test_a.py::test_b[c]']
    """
    return {node_id, node_id.partition("[")[0], node_id.partition("::")[0]}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before pytest chooses by the marks."""
    COLLECTED.update(item.nodeid for item in items)
    for item in items:
        for mark, listed in LISTED.items():
            if listed & names_of(item.nodeid):
                item.add_marker(mark)
