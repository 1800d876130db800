"""tests/soak.txt: every line names a test that there is, so that one that was renamed is not in CI by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.plugins.soaked import COLLECTED, LISTED

ROOT = Path(__file__).resolve().parents[1]


def test_every_listed_test_is_there() -> None:
    """By this run's own collection; only of what that did not cover is a collection made."""
    files = sorted({name.partition("::")[0] for name in LISTED - COLLECTED})
    if not files:
        return
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "soak", *files]
    # What somebody adds to their own run (`-v`) would print other lines.
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert LISTED - COLLECTED - set(done.stdout.splitlines()) == set(), done.stderr
