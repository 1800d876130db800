"""tests/soak.txt: every line names a test that there is, so that one that was renamed is not in CI by accident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.soaked import LISTED

ROOT = Path(__file__).resolve().parents[1]


def test_every_listed_test_is_there() -> None:
    files = sorted({name.partition("::")[0] for name in LISTED})
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "soak", *files]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(LISTED) - set(done.stdout.splitlines()) == set(), done.stderr
