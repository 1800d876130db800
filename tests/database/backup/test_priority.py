"""The sessions of a dump in the server have a lower priority than the application's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocks.postgres.server import execute
from runbook.wait import until
from tasks.postgres.dump import priority
from tasks.postgres.dump.snapshot import exported_snapshot
from tests.database.conftest import Trial


def niceness(pid: int) -> tuple[int, int]:
    """Of the process, and of its autogroup (`/autogroup-25 nice 19`), where the kernel has one."""
    group = Path(f"/proc/{pid}/autogroup")
    of_process = os.getpriority(os.PRIO_PROCESS, pid)
    return of_process, int(group.read_text().split()[-1]) if group.exists() else of_process


def test_only_its_own_sessions_yield_and_only_while_it_runs(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    postgres = trial.environment.postgres
    with (
        exported_snapshot(postgres) as (exporter, _, _),
        trial.server.connect(trial.database) as others,
        postgres.connect(trial.database) as dumping,
    ):
        mine = [exporter.info.backend_pid, dumping.info.backend_pid]
        with priority.lowered(postgres, exporter, priority.LEAST_BYTES) as lower:
            lower(exporter.info.backend_pid)
            assert niceness(exporter.info.backend_pid) == (priority.NICE, priority.NICE), "at once"
            lowered = [(priority.NICE, priority.NICE)] * 2
            until(lambda: [niceness(pid) for pid in mine] == lowered, what="their lower priority", seconds=30)
            assert niceness(others.info.backend_pid) == (0, 0)
        after = [(0, 0)] * 2 if os.geteuid() == 0 else lowered  # only root may raise it again
        assert [niceness(pid) for pid in mine] == after
        with monkeypatch.context() as patched:
            patched.setattr(priority, "is_here", lambda host: pytest.fail("a small dump changes nothing"))
            with priority.lowered(postgres, exporter, priority.LEAST_BYTES - 1):
                pass
        workers = [priority.limit_workers(exporter, jobs) for jobs in (1, 2, 4, 32)]
        assert workers == [0, 0, 0, 0], "a limit stays as low as it was"
        execute(exporter, "SET max_parallel_workers_per_gather = 2")
        assert [priority.limit_workers(exporter, 8), priority.limit_workers(exporter, 4)] == [2, 1]


SHOW = """
import os
import subprocess
import sys
from pathlib import Path
from tasks.postgres.dump import priority
def show():
    print(priority._nice_of(Path("/proc/self/autogroup")))
show()
with priority._own_session():
    show()
show()
"""


def test_its_own_processes_yield_in_a_session_of_their_own() -> None:
    """As a worker starts a flow. In a shell's session everything that the shell started would yield."""
    seen = []
    for own in (True, False):
        argv = [sys.executable, "-c", SHOW]
        printed = subprocess.run(argv, start_new_session=own, capture_output=True, text=True, check=True).stdout
        seen.append(printed.split())
    during = priority.NICE if Path("/proc/self/autogroup").exists() else 0
    assert seen[0] == ["0", str(during), "0"]
    assert len(set(seen[1])) == 1


def test_a_process_without_an_autogroup(tmp_path: Path) -> None:
    """A kernel's thread, or what init started without a session of its own: the file is there, and empty."""
    empty = tmp_path / "autogroup"
    empty.touch()
    assert priority._nice_of(empty) == 0
    assert priority._nice_of(tmp_path / "missing") == 0
