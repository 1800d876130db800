"""The priority of a run's own session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tasks.host import priority

SHOW = """
import os
from tasks.host import priority
def show():
    print(priority.read(os.getpid())[1])
show()
first, second = priority.session_lowered(5), priority.session_lowered(10)
first.__enter__()
show()
second.__enter__()
show()
first.__exit__(None, None, None)
show()
second.__exit__(None, None, None)
show()
"""


def test_its_own_processes_yield_in_a_session_of_their_own() -> None:
    """As a worker starts a flow. In a shell's session everything that the shell started would yield."""
    seen = []
    for own in (True, False):
        argv = [sys.executable, "-c", SHOW]
        printed = subprocess.run(argv, start_new_session=own, capture_output=True, text=True, check=False)
        assert printed.returncode == 0, printed.stderr
        seen.append(printed.stdout.split())
    there = Path("/proc/self/autogroup").exists()
    assert seen[0] == (["0", "5", "10", "10", "0"] if there else ["0"] * 5)
    assert len(set(seen[1])) == 1


def test_a_process_without_an_autogroup(tmp_path: Path) -> None:
    """A kernel's thread, or what init started without a session of its own: the file is there, and empty."""
    empty = tmp_path / "autogroup"
    empty.touch()
    assert priority.nice_of(empty) == 0
    assert priority.nice_of(tmp_path / "missing") == 0
