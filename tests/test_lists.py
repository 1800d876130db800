"""tests/soak.txt and tests/thorough.txt: every line names a test, so that a renamed one does not change its list."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.plugins.lists import COLLECTED, LISTED, names_of

ROOT = Path(__file__).resolve().parents[1]


def known(tests: set[str]) -> set[str]:
    return {name for test in tests for name in names_of(test)}


def test_every_listed_test_exists() -> None:
    """By this run's own collection; only what that did not cover is collected."""
    listed = frozenset().union(*LISTED.values())
    missing = listed - known(COLLECTED)
    files = sorted({name.partition("::")[0] for name in missing})
    if not files:
        return
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    # Options that somebody adds to their own run (`-v`) would print other lines.
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert missing - known(set(done.stdout.splitlines())) == set(), done.stderr


def test_no_test_is_in_both_lists() -> None:
    assert LISTED["soak"] & LISTED["thorough"] == frozenset()
