"""diagnose-database: each cause alone and in pairs; the first finding is the true cause, and its hint mends it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from blocks.postgres import nodes
from flows.database.server import connections
from flows.troubleshooting import database_sessions
from runbook.report import Status
from tasks.postgres.server import greeting
from tests.fixtures.servers import ADMIN
from tests.troubleshooting.conftest import Host, cause, following
from tests.troubleshooting.seeds import Faults, assert_order, carry_out
from tests.troubleshooting.test_database import diagnosed

DOWN, HANGS, LIMIT = "is down: the server's process is dead", "hangs", "has reached its connection limit"
LOCKS, IDLE, RESTARTED = "a lock pile-up", "are idle in a transaction", "the process before it ended without a shutdown"
STALE, STANDBY = "refuses the password of the application's own", "the standby at"
FULL, NEARLY = "the disk of PostgreSQL is full", "the disk of PostgreSQL is nearly full"
ARCHIVER, SLOT, TWO = "archiving of WAL fails", "replication slots are lost: gone_4717", "two servers take writes"
PAIRS = [  # what is seeded → what is found first, what comes next, a part of the first hint
    (("postgres_dead", "stale_password"), DOWN, "", "supervisorctl start postgresql"),
    (("postgres_dead", "standby_dead"), DOWN, STANDBY, "supervisorctl start postgresql"),
    (("postgres_halted", "standby_dead"), HANGS, STANDBY, "kill -CONT"),
    (("blind", "stale_password"), LIMIT, "", "stop one of the application's processes"),
    (("full",), LIMIT, "", "no session is idle in a transaction"),
    (("full_of_idle_transactions",), IDLE, LIMIT, "end them"),
    (("full_behind_a_lock",), LOCKS, LIMIT, "end the blocking session"),
    (("one_locked", "idle_transactions"), LOCKS, IDLE, "end the blocking session"),
    (("locked", "password_of_the_runbooks"), LOCKS, "refuses the password of role", "end the blocking session"),
    (("locked", "stale_password"), STALE, LOCKS, "restart the backend"),
    (("locked", "read_only"), "rejects writes", LOCKS, "release-containment"),
    (("locked", "standby_dead"), LOCKS, STANDBY, "end the blocking session"),
    (("read_only", "standby_dead"), "rejects writes", STANDBY, "release-containment"),
    (("stale_password", "read_only"), STALE, "rejects writes", "restart the backend"),
    (("role_limit", "idle_transactions"), IDLE, "its own connection limit of 6", "end them"),
    (("locked_by_a_prepared_transaction",), LOCKS, "", "forgotten-4717"),
    (("full_disk", "postgres_dead"), FULL, DOWN, "never delete files in pg_wal"),
    (("full_disk", "locked"), FULL, LOCKS, "never delete files in pg_wal"),
    (("nearly_full_disk",), NEARLY, "", "free disk space"),
    (("nearly_full_disk", "locked"), LOCKS, NEARLY, "end the blocking session"),
    (("failing_archiver",), ARCHIVER, "", "fix archive_command"),
    (("failing_archiver", "nearly_full_disk"), NEARLY, ARCHIVER, "free disk space"),
    (("failing_archiver", "locked"), LOCKS, ARCHIVER, "end the blocking session"),
    (("lost_slot",), SLOT, "", "base backup"),
    (("lost_slot", "standby_dead"), STANDBY, SLOT, "start it"),
    (("lost_slot", "read_only"), "rejects writes", SLOT, "release-containment"),
    (("two_primaries",), TWO, "", "find out which one the application writes to"),
    (("two_primaries", "locked"), TWO, "", "find out which one the application writes to"),
    (("two_primaries", "full_disk"), TWO, "", "find out which one the application writes to"),
]


@pytest.fixture
def faults(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Faults:
    monkeypatch.setattr(greeting, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(greeting, "UNPROMPTED_SECONDS", 0.25)
    monkeypatch.setattr(nodes, "ASK_SECONDS", 2)
    return Faults(host, tmp_path, request)


@pytest.mark.parametrize(("seeds", "first", "second", "hint"), PAIRS, ids=["+".join(one[0]) for one in PAIRS])
def test_the_first_finding_is_the_true_cause(
    faults: Faults, seeds: tuple[str, ...], first: str, second: str, hint: str
) -> None:
    report = faults.diagnose(diagnosed, seeds, first, second, hint)
    if "standby_dead" in seeds:
        assert "postgres-failover" not in [one.flow for one in report.findings[0].follow if first != "rejects writes"]


def test_a_restart_after_a_kill_is_found_by_the_uptime_and_explains_nothing_worse(faults: Faults) -> None:
    with contextlib.ExitStack() as stack:
        faults.open(stack, "postgres_killed")
        report = diagnosed()
        assert report.status is Status.WARN
        assert_order(report, RESTARTED)
        assert "automatic recovery in progress" in cause(report)
        assert "terminated by SIGKILL; not expected" in cause(report)
        faults.open(stack, "locked")
        assert_order(diagnosed(), LOCKS, RESTARTED)
    assert diagnosed().status is Status.OK, "an orderly restart is none"
    with contextlib.ExitStack() as stack:
        faults.open(stack, "backend_process_killed")
        report = diagnosed()
        assert_order(report, RESTARTED)
        assert "terminated by signal 9" in cause(report)


def test_the_hint_is_one_that_ends_this_blocker(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LEAST_SECONDS", 0)
    with faults.locked(1, by=ADMIN) as pid:
        report = diagnosed()
        assert f"SELECT pg_terminate_backend({pid})" in report.findings[0].hint
        assert "close-idle-connections" not in following(report)
    with faults.locked(1, statement="SELECT pg_sleep(120)") as pid:
        report = diagnosed()
        assert f"SELECT pg_cancel_backend({pid})" in report.findings[0].hint
    with faults.locked():
        report = diagnosed()
        assert_order(report, LOCKS)
        assert report.findings[0].follow[0].parameters["min_seconds"] >= database_sessions.LEAST_IDLE_SECONDS
        assert carry_out(report, min_seconds=0).outcome.startswith("1 of 1 sessions closed")
        after = diagnosed()
    assert after.status is Status.OK, cause(after)
