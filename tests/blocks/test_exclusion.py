"""Two environments that describe one server or directory: what is changed holds the lock, not its description."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blocks import exclusion
from blocks.exclusion import PREFIX, Cluster, Directory, Exclusion, Keyspace, Part
from blocks.postgres import Postgres
from blocks.redis import Redis
from runbook.errors import Locked, LockLost
from runbook.kinds import action
from runbook.permit import Act, Permit
from runbook.report import Report
from runbook.run import runbook
from tests.redis.servers import RedisServer, running_redis
from tests.runbook.system import System
from tests.servers import PostgresServer, free_port

ACT = Act("replace", "it")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusion, "ENDING_SECONDS", 2.0)


@dataclass(frozen=True)
class Described(System):
    """An environment that describes some parts."""

    parts: Callable[[str], list[Part]] = field(default=lambda run: [])

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
    parts: dict[str, Callable[[str], list[Part]]] = {
        "postgres": lambda run: [Cluster(block, run)],
        "redis": lambda run: [Keyspace(served, run)],
        "directory": lambda run: [Directory(str(tmp_path / next(paths)))],
    }

    def end() -> None:
        if request.param == "postgres":
            postgres_server.sql("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
                                "WHERE application_name LIKE 'interview-ops %'")  # fmt: skip
        else:
            with served.client() as client:
                for one in client.client_list():
                    if one["name"].startswith(PREFIX):
                        client.client_kill_filter(_id=one["id"])

    make = parts[request.param]
    return Described(tmp_path / "one", parts=make), Described(tmp_path / "two", parts=make), end


def change(system: Described, inside: Callable[[Report, Permit], None] = lambda report, permit: None) -> Report:
    with runbook("Restore", system, system.name, changes=True, rank="recovery") as report:
        inside(report, report.permit(ACT))
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
            again.permit(ACT)
        with pytest.raises(Locked) as error:
            change(two)
        refused.append(error.value)

    change(one, inside)
    assert "is being changed by" in refused[0].message
    assert one.name in refused[0].message or "another run of this host" in refused[0].message
    assert "two environments describe the same" in refused[0].hint
    assert change(two).status == "OK", "it is free again"


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
    ours = Exclusion([Directory(str(live))])
    assert ours.take() == str(live)
    live.rename(kept)
    ours.require()
    live.mkdir()
    ours.require()
    for path in (live, kept):
        with pytest.raises(Locked):
            Directory(str(path)).take()
    ours.close()
    assert Directory(str(live)).take()


def test_what_cannot_be_reached_keeps_no_recovery_away(tmp_path: Path) -> None:
    """A dead server is the reason to restore."""
    port = free_port()
    dead = Postgres(port=port, database="grc_db", user="x", password="", admin_password="")  # type: ignore[arg-type]
    ours = Exclusion([Cluster(dead, "x"), Keyspace(Redis(port=port), "x"), Directory(str(tmp_path / "gone"))])
    assert ours.take() == ""
    ours.require()
