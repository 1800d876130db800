"""diagnose-database of a pair whose commits wait for one of two."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from flows.troubleshooting import database_replication
from flows.troubleshooting.database import diagnose_database
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.troubleshooting.conftest import cause, following


def diagnosed() -> Report:
    """Its report, critical or not."""
    try:
        return diagnose_database.fn(environment=NAME)
    except RunbookFailed as error:
        return error.report


def test_a_standby_that_replays_nothing_and_one_that_takes_writes(cluster: Cluster) -> None:
    """The primary measures no lag of a standby whose replay is paused."""
    cluster.sql("postgres", "CREATE TABLE held (id int)")
    cluster.settle()
    cluster.sql("standby", "SELECT pg_wal_replay_pause()")
    paused = "SELECT pg_get_wal_replay_pause_state() = 'paused'"
    until(lambda: cluster.sql("standby", paused)[0][0], what="the pause", seconds=120)
    cluster.sql("postgres", "INSERT INTO held SELECT generate_series(1, 1000)")
    report = diagnosed()
    assert report.status is Status.WARN
    assert cause(report).startswith("replication lags: 127.0.0.1:")
    assert cause(report).endswith("its replay is paused")
    assert "pg_wal_replay_resume" in report.findings[0].hint
    role = cluster.environment.postgres.user
    cluster.sql("postgres", f"ALTER ROLE {role} SET default_transaction_read_only = on")
    report = diagnosed()
    cluster.sql("postgres", f"ALTER ROLE {role} RESET default_transaction_read_only")
    assert "rejects writes" in cause(report)
    assert report.findings[1].value.startswith("replication lags")

    cluster.sql("standby", "SELECT pg_wal_replay_resume()")
    cluster.promote("standby")
    report = diagnosed()
    assert cause(report).startswith("two servers take writes: 127.0.0.1:")
    assert "find out which one the application writes to" in report.findings[0].hint
    assert "rejoin-standby" in following(report)


def test_a_healthy_pair_and_one_whose_commits_wait(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_replication, "WAITED_SECONDS", 0.2)
    node, env_file = cluster.environment.postgres, Path(cluster.environment.application.env_file)
    env_file.parent.mkdir(parents=True, exist_ok=True)
    login = f"{node.user}:{quote(node.password.get_secret_value(), safe='')}"
    env_file.write_text(f"DATABASE_URL=postgresql+asyncpg://{login}@{node.host}:{node.port}/{node.database}\n")
    report = diagnose_database.fn(environment=NAME)
    assert (report.status, cause(report)) == (Status.OK, "nothing found")

    cluster.sql("postgres", "CREATE TABLE waits (id int)")
    cluster.stop("standby", "receiver")
    writer = cluster.connect("postgres")
    commit = threading.Thread(target=writer.execute, args=("INSERT INTO waits VALUES (1)",))
    commit.start()
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND clock_timestamp() - state_change "
        "> interval '0.3 s'"
    )
    until(lambda: cluster.sql("postgres", waiting)[0][0], what="a commit that waits", seconds=120)
    report = diagnosed()
    cluster.start("standby")
    commit.join(120)
    writer.close()
    assert cause(report).startswith("the standby at"), "the commits wait because of it"
    assert "supervisorctl start postgresql-standby" in report.findings[0].hint
    assert [one.status for one in report.findings[:2]] == [Status.CRITICAL] * 2
    assert report.findings[1].value.startswith("1 commit waits, the longest for")
    assert "never cancel" in report.findings[1].hint
    assert "check-replication" in following(report)
