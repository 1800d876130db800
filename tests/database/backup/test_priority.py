"""The sessions of a dump in the server have a lower priority than the application's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocks.postgres.server import execute
from runbook.wait import until
from tasks.host.priority import read
from tasks.postgres.dump import priority
from tasks.postgres.dump.snapshot import exported_snapshot
from tests.database.conftest import Trial


def niceness(pid: int) -> tuple[int, int]:
    """Of the process, and of its autogroup (`/autogroup-25 nice 19`), where the kernel has one."""
    of_process, of_group = read(pid)
    return of_process, of_group if Path("/proc/self/autogroup").exists() else of_process


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
