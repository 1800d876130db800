"""Commits that wait for a standby: seen, freed, and made to wait again, on a real pair."""

from __future__ import annotations

import pytest

from runbook.errors import NotConfirmed, OpsError
from runbook.guard.permit import Act, Permit
from runbook.kinds import permitted_by
from runbook.wait import until
from tasks.postgres.replication.synchronous import (
    ALONE,
    Synchrony,
    commit_alone,
    commit_together,
    read_synchrony,
)
from tests.fixtures.postgres.clusters import Cluster
from tests.fixtures.servers import running_postgres

NAMES = "ANY 1 (standby, receiver)"


def test_who_confirms_is_told(cluster: Cluster) -> None:
    primary = cluster.environment.postgres
    assert read_synchrony.work(primary) == Synchrony(NAMES, 1, ("receiver", "standby"))
    cluster.crash("standby")
    until(lambda: cluster.streaming() == {"receiver"}, what="the break of its stream", seconds=120)
    found = read_synchrony.work(primary)
    assert (found.connected, found.hangs) == (("receiver",), False)
    cluster.crash("receiver")
    until(lambda: not cluster.streaming(), what="the break of its stream", seconds=120)
    found = read_synchrony.work(primary)
    assert (found.connected, found.hangs) == ((), True)


def test_a_commit_that_waits_returns_when_commits_wait_for_nobody_and_later_ones_wait_again(cluster: Cluster) -> None:
    primary = cluster.environment.postgres
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with cluster.writing(sessions=1) as writes:
        writes.wait(5)
        with cluster.crashed("standby"), cluster.crashed("receiver"):
            until(lambda: cluster.sql("postgres", waiting) == [(1,)], what="a commit that waits", seconds=120)
            with pytest.raises(NotConfirmed), permitted_by(Permit("test", (Act(ALONE, "another:5432"),))):
                commit_alone.bind(primary)()
            assert cluster.sql("postgres", waiting) == [(1,)]
            found = commit_alone.work(primary)
            assert (found.names, found.needed, found.hangs) == ("", 0, False)
            writes.wait(20)
            assert commit_alone.work(primary) == found, "done twice it is done"
            assert cluster.sql("postgres", "SHOW synchronous_standby_names") == [("",)]
        until(lambda: cluster.streaming() == {"standby", "receiver"}, what="their return", seconds=120)
        commit_together.work(primary)
        writes.wait(5)
    until(lambda: read_synchrony.work(primary).names == NAMES, what="the reload", seconds=120)
    assert len(read_synchrony.work(primary).connected) == 2
    assert writes.lost(cluster.sql("postgres", "SELECT id FROM writes")) == set()


def test_what_stands_above_alter_system_is_said() -> None:
    with running_postgres(settings=("synchronous_standby_names=nobody",)) as server:
        primary = server.block("postgres")
        assert read_synchrony.work(primary) == Synchrony("nobody", 1, ())
        with pytest.raises(OpsError, match="does not change: .* — remove it from the server's command line"):
            commit_alone.work(primary)
