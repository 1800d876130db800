"""Which of an environment's nodes is the primary: real servers that fail over, freeze and die."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.config import toml
from blocks.environment import Environment
from blocks.postgres.nodes import ask
from flows.monitoring.sources import find_primary
from runbook.errors import OpsError
from runbook.wait import until
from tests.fixtures.postgres.clusters import Cluster

ONE_NODE = """
name = "one"
[objectives]
rpo = "1h"
rto = "4h"
[postgres]
port = {port}
database = "grc_db"
user = "grc_user"
password_env = "ONE_PASSWORD"
admin_password_env = "ONE_PASSWORD"
[services]
names = {{}}
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here who lives answers, however busy the machine is."""
    monkeypatch.setattr("blocks.postgres.nodes.ASK_SECONDS", 120)


def roles(environment: Environment) -> tuple[str, str]:
    """The services of the primary and of the other one."""
    return (environment.postgres.service, environment.standby.service)


def test_the_primary_is_the_one_that_is_not_in_recovery(cluster: Cluster) -> None:
    environment = cluster.environment
    assert [node.service for node in environment.nodes()] == ["postgres", "standby"]
    assert roles(environment) == ("postgres", "standby")
    primary, standby = ask(environment.postgres), ask(environment.standby)
    assert primary is not None
    assert standby is not None
    assert (primary.in_recovery, primary.timeline) == (False, 1)
    assert (standby.in_recovery, standby.timeline) == (True, 0)
    assert primary.system == standby.system == cluster.node("postgres").system


def test_after_a_failover_the_roles_are_found_anew_when_they_are_forgotten(cluster: Cluster) -> None:
    environment = cluster.environment
    assert roles(environment) == ("postgres", "standby")
    cluster.crash("postgres")
    cluster.promote("standby")
    assert roles(environment) == ("postgres", "standby"), "one run keeps to the server that it judged"
    environment.forget_roles()
    assert roles(environment) == ("standby", "postgres")
    assert environment.postgres.port == cluster.node("standby").port
    assert roles(cluster.environment) == ("standby", "postgres"), "the next run asks"


def test_two_primaries_are_both_named_and_none_is_chosen(cluster: Cluster) -> None:
    """The old primary still runs: as long as nobody has fenced it, it takes writes too."""
    cluster.promote("standby")
    assert not cluster.is_standby("postgres")
    with pytest.raises(OpsError, match="two servers take writes") as caught:
        roles(cluster.environment)
    for role, timeline in (("postgres", 1), ("standby", 2)):
        assert f"127.0.0.1:{cluster.node(role).port} ({role}, timeline {timeline}" in caught.value.message
    assert "rejoin-standby" in caught.value.hint
    with pytest.raises(OpsError, match="two servers take writes"):
        find_primary(cluster.environment)
    cluster.stop("postgres")
    assert roles(cluster.environment) == ("standby", "postgres")


def test_where_all_that_answer_follow_it_is_the_one_that_does_not_answer(cluster: Cluster) -> None:
    with cluster.crashed("postgres"):
        assert roles(cluster.environment) == ("postgres", "standby")
    until(lambda: "standby" in cluster.streaming(), what="the standby's return", seconds=120)
    cluster.stop("postgres")  # returns when the standby has its shutdown checkpoint
    cluster.promote("standby")
    cluster.follow("postgres")
    assert cluster.is_standby("postgres")
    assert roles(cluster.environment) == ("standby", "postgres")
    cluster.crash("standby")
    assert roles(cluster.environment) == ("standby", "postgres"), "the configuration names the other one first"


def test_the_only_one_that_takes_writes_is_it_whatever_its_timeline(cluster: Cluster) -> None:
    cluster.crash("postgres")
    cluster.promote("standby")
    cluster.start("postgres")
    cluster.crash("standby")
    assert roles(cluster.environment) == ("postgres", "standby")


@pytest.mark.parametrize("missing", [False, True], ids=["dead", "dead and half replaced"])
def test_where_nobody_answers_the_data_directories_tell_who_follows(cluster: Cluster, *, missing: bool) -> None:
    """After a failover and a rejoin: what the configuration names first is the standby."""
    cluster.stop("postgres")
    cluster.promote("standby")
    cluster.follow("postgres")
    data = cluster.node("standby").data
    with cluster.crashed("postgres"), cluster.crashed("standby"):
        aside = data.rename(data.with_name("aside")) if missing else data
        try:
            assert roles(cluster.environment) == ("standby", "postgres")
        finally:
            aside.rename(data)


@pytest.mark.parametrize("how", ["dead", "frozen"])
def test_where_nobody_answers_it_is_the_configured_one(
    cluster: Cluster, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.promote("standby")
    with contextlib.ExitStack() as faults:
        for role in ("postgres", "standby"):
            faults.enter_context(cluster.crashed(role) if how == "dead" else cluster.frozen(role))
        for name in ("blocks.postgres.server.CONNECT_SECONDS", "blocks.postgres.nodes.ASK_SECONDS"):
            monkeypatch.setattr(name, 2)
        assert [ask(node) for node in cluster.environment.nodes()] == [None, None]
        assert roles(cluster.environment) == ("postgres", "standby")


def test_one_that_refuses_the_password_says_nothing(cluster: Cluster) -> None:
    environment = cluster.environment
    cluster.sql("postgres", "ALTER ROLE postgres PASSWORD 'another'")
    assert ask(environment.nodes()[0]) is None


@contextlib.contextmanager
def counted() -> Iterator[tuple[int, list[object]]]:
    """A port, and who connected to it."""
    callers: list[object] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, address = listener.accept()
                callers.append(address)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], callers
        listener.shutdown(socket.SHUT_RDWR)


def test_a_single_node_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_PASSWORD", "x")
    with counted() as (port, callers):
        path = tmp_path / "one.toml"
        path.write_text(ONE_NODE.format(port=port))
        environment = toml.read(path)
        assert environment.postgres is environment.postgres is environment.nodes()[0]
        assert callers == []
        assert ask(environment.postgres) is None
        assert len(callers) == 1, "this test would have seen it"
