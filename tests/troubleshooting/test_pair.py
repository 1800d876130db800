"""diagnose-database of a pair whose commits wait for one of two."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from flows.troubleshooting import database_replication
from flows.troubleshooting.database import diagnose_database
from runbook.errors import RunbookFailed
from runbook.report import Status
from runbook.wait import until
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.troubleshooting.conftest import cause, following


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
    with pytest.raises(RunbookFailed) as failed:
        diagnose_database.fn(environment=NAME)
    cluster.start("standby")
    commit.join(120)
    writer.close()
    report = failed.value.report
    assert cause(report).startswith("the standby at"), "the commits wait because of it"
    assert "supervisorctl start postgresql-standby" in report.findings[0].hint
    assert [one.status for one in report.findings[:2]] == [Status.CRITICAL] * 2
    assert report.findings[1].value.startswith("1 commit waits, the longest for")
    assert "never cancel" in report.findings[1].hint
    assert "check-replication" in following(report)
