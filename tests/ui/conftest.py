"""A place to work at: a lab with every runbook deployed, and somebody in front of its Prefect UI.

`make screenshots` runs these tests in a lab that is called `lab`, as a reader's own would be, and keeps the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.client import Lab
from tests.ui.browser import Operator, operator

ROOT = Path(__file__).resolve().parents[2]
KEEP = "OPS_SCREENSHOTS"


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The session's lab; one of the usual name for pictures that are kept."""
    if not os.environ.get(KEEP):
        yield request.getfixturevalue("deployed")
        return
    named = Lab.up("lab", megabytes=3, runbooks=True)
    try:
        yield named
    finally:
        named.down()


@pytest.fixture
def somebody(place: Lab, tmp_path: Path) -> Iterator[Operator]:
    """An operator with a fresh browser."""
    kept = os.environ.get(KEEP)
    address, auth = (place.environ()[name] for name in ("PREFECT_UI_URL", "PREFECT_API_AUTH_STRING"))
    with operator(address, place.name, ROOT / kept if kept else tmp_path, auth) as one:
        yield one
