"""Two environments that describe one server or directory: what is changed holds the lock, not its description."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from blocks import exclusion
from blocks.exclusion import PREFIX, Cluster, Directory, Exclusion, Keyspace, LockedPart, keyspaces
from blocks.postgres.refusals import Starting
from blocks.postgres.server import Postgres
from blocks.redis.server import Redis
from lab.state.base import CHECKOUT
from runbook import run
from runbook.errors import Locked, LockLost, OpsError
from runbook.guard import lock
from runbook.guard.permit import Act, Permit
from runbook.kinds import action
from runbook.report import Report
from runbook.run import runbook
from runbook.wait import until
from tests.fixtures.postgres.clusters import PROGRAMS
from tests.fixtures.postgres.clusters import Cluster as RunningCluster
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
    assert ours.take() == str(tmp_path / "gone")
    ours.require()


def test_a_directory_is_locked_where_it_is_missing_and_while_it_is_made_again(tmp_path: Path) -> None:
    live = tmp_path / "17" / "data"
    ours = Exclusion([Directory(str(live), "x")])
    assert ours.take() == str(live)
    with pytest.raises(Locked, match="is being changed by “x”"):
        Directory(str(live), "y").take()
    live.mkdir(parents=True)
    ours.require()
    with pytest.raises(Locked):
        Directory(str(live), "y").take()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in left} == {0o600}, "nobody else can hold it"
    ours.close()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    theirs = Directory(str(live), "y")
    assert theirs.take()
    theirs.close()


def test_a_planted_lock_file_is_neither_followed_nor_given_away(tmp_path: Path) -> None:
    live, secret = tmp_path / "data", tmp_path / "secret"
    secret.write_text("")
    secret.chmod(0o640)
    os.chown(tmp_path, 65534, 65534)
    (tmp_path / ".data.interview-ops-lock").symlink_to(secret)
    assert not Directory(str(live), "x").take()
    (tmp_path / ".data.interview-ops-lock").unlink()
    (tmp_path / ".data.interview-ops-lock").hardlink_to(secret)
    ours = Directory(str(live), "x")
    ours.take()
    ours.close()
    assert (secret.stat().st_uid, secret.stat().st_mode & 0o777) == (os.geteuid(), 0o640)


def test_the_key_is_the_cluster_whichever_database_an_environment_names(postgres_server: PostgresServer) -> None:
    block = postgres_server.block()
    ours = Cluster(block, "interview-ops one: Restore")
    assert ours.take()
    with pytest.raises(Locked, match="interview-ops one"):
        Cluster(block.model_copy(update={"database": "another"}), "interview-ops two: Restore").take()
    ours.close()


def test_a_server_that_answers_later_is_locked_then(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusion, "AGAIN_SECONDS", 0.0)
    block = postgres_server.block()
    part = Cluster(block.model_copy(update={"port": free_port()}), "interview-ops one: Restore")
    ours = Exclusion([part])
    assert ours.take() == ""
    part.postgres = block
    ours.require()
    with pytest.raises(Locked, match="interview-ops one"):
        Cluster(block, "interview-ops two: Restore").take()
    ours.close()


def test_what_another_environment_changes_is_waited_for_before_anything_is_judged(tmp_path: Path) -> None:
    one, two = (Described(tmp_path / name, parts=lambda run: [Directory(str(tmp_path / "x"), run)]) for name in "ab")
    judged = list[str]()

    def judge() -> None:
        with runbook("Restore", two, two.name, changes=True) as report:
            judged.append("pins")
            report.permit(ACT, effect=EFFECT)

    ours = one.exclusion("Restore")
    ours.take()
    with pytest.raises(Locked):
        judge()
    ours.close()
    assert judged == []


OTHER = """
import sys
from blocks.config import toml
from runbook.errors import Locked
try:
    print("locked", toml.environment("twin").exclusion("Restore").take())
except Locked as error:
    print("refused", error.message)
"""


def _starts(postgres: Postgres) -> bool:
    try:
        postgres.connect().close()
    except OpsError as error:
        return isinstance(error, Starting)
    return False


@pytest.mark.parametrize("host", ["this host", pytest.param("another network", marks=pytest.mark.system)])
@pytest.mark.parametrize("state", ["down", "starting", "hung", "missing"])
def test_two_environments_on_one_server_exclude_each_other_when_it_does_not_answer(
    cluster: RunningCluster, state: str, host: str, tmp_path: Path
) -> None:
    """The disaster itself: of the parts that they share, only places on the disk are left."""
    node = cluster.node("postgres")
    with contextlib.ExitStack() as stack:
        if state == "hung":
            pid = int((node.data / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        else:
            cluster.crash("postgres")
        if state == "missing":
            shutil.rmtree(node.data)
        if state == "starting":
            (node.data / "recovery.signal").touch()
            with (node.data / "postgresql.auto.conf").open("a", encoding="utf-8") as file:
                file.write("restore_command = 'sleep 60; false'\n")
            cluster.supervisor.start(PROGRAMS["postgres"])
            until(lambda: _starts(cluster.environment.postgres), what="a server that starts", seconds=30)
        ours = cluster.environment.exclusion("Restore")
        assert str(node.data) in ours.take()
        stack.callback(ours.close)
        twin = cluster.root / "twin.toml"
        twin.write_text((cluster.root / "pair.toml").read_text().replace('name = "pair"', 'name = "twin"'))
        argv = [sys.executable, "-c", OTHER]
        if host == "another network":
            space = f"ops-{os.getpid()}"
            subprocess.run(["ip", "netns", "add", space], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "delete", space], check=True)
            argv = ["ip", "netns", "exec", space, *argv]
        variables = {**os.environ, **cluster.variables, "OPS_ENVIRONMENT": "twin", "OPS_ENVIRONMENT_FILE": str(twin)}
        said = subprocess.run(argv, env=variables, cwd=CHECKOUT, capture_output=True, text=True)
        assert said.stdout.startswith("refused"), said.stdout + said.stderr
        assert "“interview-ops pair: Restore”" in said.stdout
