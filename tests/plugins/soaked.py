"""The tests of tests/soak.txt are marked soak (a plugin): `make soak` runs them, `make test` and CI do not.

CI has 45 minutes on two cores. What is listed there costs most of all tests, and is one more place of a promise that
CI proves elsewhere: another boundary of a kill, another tool that hangs, the other order of two events.
"""

from __future__ import annotations

from pathlib import Path

import pytest

LISTED = frozenset((Path(__file__).parents[1] / "soak.txt").read_text().splitlines())
COLLECTED = set[str]()
"""Every test of this run, also those that its marks leave out."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before pytest chooses by the marks."""
    COLLECTED.update(item.nodeid for item in items)
    for item in items:
        if item.nodeid in LISTED:
            item.add_marker(pytest.mark.soak)
