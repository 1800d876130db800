"""watch_metrics on a pair: a paused replay, a standby that is gone, a service that stopped; and what a round costs."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from flows.monitoring.rounds import Round, take_round
from flows.monitoring.sources import read_database, read_service_states
from runbook.wait import until
from tests.fixtures.postgres.clusters import Cluster
from tests.monitoring.watched import be_patient

LAG, STREAMS = "postgres.replication.lag_seconds", "postgres.wal.streams_missing"
MOST_CPU_SECONDS = 2.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


class Minutes:
    """Rounds a minute apart; the limit of the lag is lowered to a second, so that nobody waits for ten."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.now = cluster, datetime.now(UTC)

    def round(self) -> Round:
        self.now += timedelta(minutes=1)
        found = self.cluster.environment
        lowered = found.model_copy(update={"thresholds": {**found.thresholds, LAG: [1.0, 1.0]}})
        return take_round(lowered.with_parts(found.parts()), self.now)


def test_a_replay_that_is_paused_is_a_lag_and_one_that_goes_on_is_none(cluster: Cluster) -> None:
    minutes, environment = Minutes(cluster), cluster.environment
    until(lambda: read_database(environment)[LAG].value == 0, what="a standby that has caught up", seconds=120)
    first = minutes.round()
    assert not first.standings[LAG].exceeded
    assert first.standings[STREAMS].value == 0
    until(lambda: read_service_states(environment)["services.stopped"].value == 0, what="its services", seconds=120)
    spent = time.process_time()
    minutes.round()
    spent = time.process_time() - spent
    print(f"a round took {spent:.2f} s of CPU")
    assert spent <= MOST_CPU_SECONDS
    cluster.sql("standby", "SELECT pg_wal_replay_pause()")
    cluster.sql("postgres", "CREATE TABLE lagging AS SELECT 1")
    until(lambda: (read_database(environment)[LAG].value or 0) > 1, what="a second of lag", seconds=120)
    assert [minutes.round().changed.get(LAG) for _ in range(3)] == [None, None, "exceeded"]
    cluster.sql("standby", "SELECT pg_wal_replay_resume()")

    def caught_up() -> Round:
        """What the server itself writes keeps the standby behind for a moment: as long as since the last commit."""
        cluster.sql("postgres", "INSERT INTO lagging VALUES (2)")
        until(lambda: read_database(environment)[LAG].value == 0, what="the replay", seconds=120)
        return minutes.round()

    assert [caught_up().changed.get(LAG) for _ in range(3)] == [None, None, "recovered"]


def test_a_standby_that_stopped_is_told_by_all_who_miss_it(cluster: Cluster) -> None:
    minutes = Minutes(cluster)
    cluster.stop("standby")
    environment = cluster.environment
    until(lambda: read_database(environment)[STREAMS].value == 1, what="its end", seconds=120)
    # supervisord believes in what it has started after a second only.
    until(lambda: read_service_states(environment)["services.stopped"].value == 1, what="the others", seconds=120)
    found = [minutes.round() for _ in range(3)][-1]
    assert found.changed.items() >= {LAG: "exceeded", STREAMS: "exceeded", "services.stopped": "exceeded"}.items()
    assert not found.standings[LAG].measured
    assert found.standings[STREAMS].told == "not streaming: standby"
    assert found.standings["services.stopped"].told == "stopped: standby"


def test_a_pair_without_a_primary_is_not_measured(cluster: Cluster) -> None:
    cluster.stop("postgres")
    found = read_database(cluster.environment)
    assert {name: one.value for name, one in found.items()} == dict.fromkeys(found)
    assert {one.told for one in found.values()} == {"no database server accepts writes"}
