"""Two environments that describe one server or directory: what is changed holds the lock, not its description."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from blocks import exclusion
from blocks.exclusion import PREFIX, Cluster, Directory, Exclusion, Keyspace, LockedPart, keyspaces
from blocks.postgres.server import Postgres
from blocks.redis.server import Redis
from runbook import run
from runbook.errors import Locked, LockLost
from runbook.guard import lock
from runbook.guard.permit import Act, Permit
from runbook.kinds import action
from runbook.report import Report
from runbook.run import runbook
from runbook.wait import until
from tests.fixtures.servers import PostgresServer, free_port
from tests.redis.servers import MASTER, RedisServer, replicated, running_redis
from tests.runbook.system import EFFECT, System

ACT = Act("replace", "it")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusion, "ENDING_SECONDS", 2.0)


@dataclass(frozen=True)
class Described(System):
    """An environment that describes some parts."""

    parts: Callable[[str], list[LockedPart]] = field(default=lambda run: [])

    def exclusion(self, runbook: str) -> Exclusion:
        return Exclusion(self.parts(f"interview-ops {self.name}: {runbook}"))


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def described(
    request: pytest.FixtureRequest, postgres_server: PostgresServer, redis_server: RedisServer, tmp_path: Path
) -> tuple[Described, Described, Callable[[], None]]:
    """Two environments that describe the same system, and what ends the first one's session."""
    (tmp_path / "data").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    paths = itertools.cycle(["data", "alias"])
    block, served = postgres_server.block(), redis_server.block()
    parts: dict[str, Callable[[str], list[LockedPart]]] = {
        "postgres": lambda run: [Cluster(block, run)],
        "redis": lambda run: [Keyspace(served, run)],
        "directory": lambda run: [Directory(str(tmp_path / next(paths)), run)],
    }

    def end() -> None:
        if request.param == "postgres":
            postgres_server.sql(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
                "WHERE application_name LIKE 'interview-ops %'"
            )
        else:
            with served.client() as client:
                for one in client.client_list():
                    if one["name"].startswith(PREFIX):
                        client.client_kill_filter(_id=one["id"])

    make = parts[request.param]
    return Described(tmp_path / "one", parts=make), Described(tmp_path / "two", parts=make), end


def change(system: Described, inside: Callable[[Report, Permit], None] = lambda report, permit: None) -> Report:
    with runbook("Restore", system, system.name, changes=True, rank="recovery") as report:
        inside(report, report.permit(ACT, effect=EFFECT))
    return report


@pytest.mark.parametrize("described", ["postgres", "redis", "directory"], indirect=True)
def test_two_environments_on_one_system_exclude_each_other(
    described: tuple[Described, Described, Callable[[], None]],
) -> None:
    one, two, _ = described
    refused: list[Locked] = []

    def inside(report: Report, permit: Permit) -> None:
        assert report.facts["also locked"]
        with runbook("Restore", one, one.name, changes=True) as again:  # a runbook inside a runbook
            again.permit(ACT, effect=EFFECT)
        with pytest.raises(Locked) as error:
            change(two)
        refused.append(error.value)

    change(one, inside)
    assert "is being changed by" in refused[0].message
    assert f"interview-ops-{one.name}--Restore" in re.sub("[ :]", "-", refused[0].message)
    assert "two environments describe the same" in refused[0].hint
    assert change(two).status == "OK", "it is free again"


@pytest.mark.parametrize("described", ["redis", "directory"], indirect=True)
def test_a_scheduled_run_waits_for_what_another_environment_changes_before_it_judges(
    described: tuple[Described, Described, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the environment's lock, and it names the holder. A run that a person launched is refused at once."""
    one, two, _ = described
    told, began = list[str](), list[str]()
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(exclusion, "ENDING_SECONDS", 0.05)
    monkeypatch.setattr(lock, "logger", lambda: SimpleNamespace(info=lambda text, *values: told.append(text % values)))

    def nightly() -> None:
        with runbook("Nightly", two, changes=True) as report:
            began.append("judged")
            report.permit(ACT, effect=EFFECT)
            began.append("done")

    other = one.exclusion("Restore")
    other.take()
    with pytest.raises(Locked):
        change(two)
    assert told == []
    monkeypatch.setattr(run, "is_scheduled", lambda: True)
    monkeypatch.setattr(run, "is_unattended", lambda target: True)
    waiting = threading.Thread(target=nightly)
    waiting.start()
    until(lambda: told, what="its word", seconds=120)
    assert f"interview-ops-{one.name}--Restore" in re.sub("[ :]", "-", told[0])
    assert began == []
    other.close()
    waiting.join(120)
    assert began == ["judged", "done"]
    monkeypatch.setattr(run, "PATIENCE_SECONDS", 0.2)
    other.take()
    with pytest.raises(Locked, match="is being changed by"):
        nightly()
    other.close()


@action
def replace(permit: Permit) -> None:
    """Something that cannot be undone."""


@pytest.mark.parametrize("described", ["postgres", "redis"], indirect=True)
def test_a_lock_that_ended_with_its_session_is_taken_again_unless_another_run_has_it(
    described: tuple[Described, Described, Callable[[], None]],
) -> None:
    one, two, end_sessions = described
    reports: list[Report] = []

    def inside(report: Report, permit: Permit) -> None:
        reports.append(report)
        end_sessions()
        replace(permit)
        with pytest.raises(Locked):
            change(two)
        end_sessions()
        other = two.exclusion("Restore")
        assert other.take()
        try:
            replace(permit)
        finally:
            other.close()

    with pytest.raises(LockLost, match="is being changed by"):
        change(one, inside)
    assert reports[0].permitted_steps == ["replace"]


def test_a_directory_that_is_swapped_is_locked_under_both_names(tmp_path: Path) -> None:
    live, kept = tmp_path / "data", tmp_path / "data.superseded"
    live.mkdir()
    ours = Exclusion([Directory(str(live), "x")])
    assert ours.take() == str(live)
    live.rename(kept)
    ours.require()
    live.mkdir()
    ours.require()
    for path in (live, kept):
        with pytest.raises(Locked):
            Directory(str(path), "x").take()
    ours.close()
    assert Directory(str(live), "x").take()


def test_servers_of_one_data_set_are_locked_by_whatever_address_an_environment_names_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the master, by the replica (which knows its master), or by a dead address and the Sentinels."""
    monkeypatch.setattr(exclusion, "ENDING_SECONDS", 0.1)
    with replicated(sentinels=1) as group:
        (replica,) = group.replicas
        watched = {"sentinels": [group.sentinels[0].address], "sentinel_master": MASTER}
        blocks = [group.master.block(), replica.block(), group.master.block(port=free_port(), **watched)]
        for one, other in itertools.permutations(blocks, 2):
            ours = Exclusion(keyspaces(one, "interview-ops one: Restore"))
            locked = ours.take()
            assert all(server.address in locked for server in group.servers)
            with pytest.raises(Locked, match="is being changed by “interview-ops-one--Restore”"):
                Exclusion(keyspaces(other, "interview-ops two: Restore")).take()
            ours.close()
        ours = Exclusion(keyspaces(blocks[2], "interview-ops one: Restore"))
        ours.take()
        group.master.crash()
        ours.require()
        with pytest.raises(Locked):
            Exclusion(keyspaces(replica.block(), "interview-ops two: Restore")).take()
        ours.close()


def test_what_cannot_be_reached_keeps_no_recovery_away(tmp_path: Path) -> None:
    """A dead server is the reason to restore."""
    port = free_port()
    dead = Postgres(port=port, database="grc_db", user="x", password="", admin_password="")  # type: ignore[arg-type]
    ours = Exclusion([Cluster(dead, "x"), Keyspace(Redis(port=port), "x"), Directory(str(tmp_path / "gone"), "x")])
    assert ours.take() == ""
    ours.require()
