"""The lab itself: up, again, after a crash, several beside each other, down."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis

from blocks.environment import Environment
from lab import lifecycle
from lab.client import Lab
from lab.control import LabControl
from lab.processes import alive, pid_in
from lab.servers.nodes import nodes
from lab.state.base import CHECKOUT
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tests.fixtures import forked
from tests.fixtures.prefect_client import login
from tests.fixtures.servers import separate_base

SERVICES = [
    *("ai-providers", "grc-backend", "grc-frontend", "postgresql", "postgresql-standby", "redis", "redis-replica"),
    *("redis-sentinel-1", "redis-sentinel-2", "redis-sentinel-3", "wal-archiver", "wal-receiver"),
]
SERVERS_DATA = ("postgresql/data", "postgresql-standby/data", "/wal/")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m lab …` as a user calls it: its output ends with it, whatever it started."""
    return subprocess.run(
        [sys.executable, "-m", "lab", *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def pids(lab: Lab) -> dict[str, int]:
    return {name: row["pid"] for name, row in lab.status()["services"].items()}


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30).status_code == 200
    except httpx.HTTPError as error:
        raise Unreachable(f"{url}: {type(error).__name__}") from None


def command_lines() -> list[str]:
    """Of all processes; one that ends meanwhile has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace"))
    return found


def files(root: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Of a lab, and the control plane's beside it: each with its mode and content. Servers' own data is left out, and
    what is away before it is read."""
    for directory, _, names in (*os.walk(root), next(os.walk(root.parent / "control"))):
        for path in (Path(directory, name) for name in names):
            if not any(part in str(path) for part in SERVERS_DATA):
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                    yield path, stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read()


def kill(pid_file: Path) -> None:
    pid = pid_in(pid_file)
    assert pid
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def own_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A base directory with a Prefect server of its own."""
    with separate_base("own") as base:
        monkeypatch.setenv("OPS_LAB_BASE", str(base))
        yield base
        assert command("down", "--all", "--remove").returncode == 0


@pytest.fixture(scope="module")
def second() -> Iterator[Lab]:
    """Another lab of the same base directory; up or down, as the test before left it."""
    other = Lab(f"second-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
    yield other
    other.down()


def test_status_says_what_there_is(lab: Lab) -> None:
    def said() -> dict[str, Any] | None:
        """What it says once every service runs: another file's tests may have left one that its supervisor restarts."""
        done = command("status", "--name", lab.name, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found if all(row["running"] and alive(row["pid"]) for row in found["services"].values()) else None

    status = until(said, what="that every service runs", seconds=120)
    assert status["environment"] == lab.name
    assert sorted(status["services"]) == SERVICES
    assert status["postgres"]["pid"] == pid_in(Path(status["postgres"]["data"]) / "postmaster.pid")
    assert all(Path(path).is_dir() for path in status["stores"].values())
    assert (Path(status["postgres"]["bin"]) / "pg_dump").exists()
    for url in (status["prefect_api"], status["application"]["url"]):
        until(lambda url=url: answers(f"{url}/health"), what=f"an answer of {url}", seconds=120)  # type: ignore[misc]
    assert httpx.get(status["frontend"]["url"], follow_redirects=True, timeout=120).status_code == 200
    with psycopg.connect(status["postgres"]["dsn"]) as connection:
        assert connection.execute("SELECT count(*) > 100 FROM interview_sessions").fetchone() == (True,)
        assert connection.execute("SHOW timezone").fetchone() == ("Asia/Tokyo",)
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (False,)
    with psycopg.connect(status["postgres"]["admin_dsn"]) as connection:
        assert connection.execute("SHOW data_checksums").fetchone() == ("on",)
        acl = connection.execute("SELECT has_database_privilege('public', 'grc_db', 'CONNECT')").fetchone()
        assert acl == (False,)
    with redis.Redis.from_url(status["redis"]["url"]) as client:
        assert client.dbsize() > 1000, "a restore before this in the same lab has dropped the cache"
        assert client.config_get("appendonly") == {"appendonly": "yes"}


def test_the_shell_gets_the_variables_and_argv_no_password(lab: Lab) -> None:
    status = lab.status()
    script = f'eval "$({sys.executable} -m lab env --name {lab.name})"; printf %s "$OPS_POSTGRES_PASSWORD"'
    bare = {"PATH": os.environ["PATH"], "OPS_LAB_BASE": os.environ["OPS_LAB_BASE"]}
    done = subprocess.run(["sh", "-c", script], cwd=CHECKOUT, env=bare, capture_output=True, text=True, check=True)
    assert f":{done.stdout}@" in status["postgres"]["dsn"]
    secrets = [value for name, value in lab.environ().items() if name.endswith("_PASSWORD")]
    assert len(secrets) == 5
    assert not [line for line in command_lines() if any(secret in line for secret in secrets)]


def test_files_with_passwords_are_the_owners_alone(lab: Lab) -> None:
    secrets = [value for name, value in lab.environ().items() if name.endswith("_PASSWORD")]
    root = Path(lab.status()["root"])
    looked = (found for found in files(root) if any(one.encode() in found[2] for one in secrets))
    holding = {path: mode for path, mode, _ in looked}
    assert {"state.json", "supervisord.conf", "valkey.conf", ".env"} <= {path.name for path in holding}
    assert [path for path, mode in holding.items() if mode & 0o077] == []
    assert [path for path in holding if path.suffix == ".log"] == []
    assert [path for path in holding if path.name.startswith("postgresql")] == [], "a base backup would hold it"


def test_a_killed_supervisor_comes_back_with_its_data(lab: Lab) -> None:
    before = pids(lab)
    with psycopg.connect(lab.status()["postgres"]["dsn"]) as connection:
        rows = connection.execute("SELECT count(*) FROM interview_sessions").fetchone()
    kill(Path(lab.status()["root"]) / "supervisord.pid")
    assert alive(before["postgresql"]), "the orphan that `up` has to deal with"
    down = command("status", "--name", lab.name, "--json")
    assert down.returncode == 1
    assert json.loads(down.stdout)["running"] is False
    Lab.up(lab.name, 3)
    assert [pid for pid in before.values() if alive(pid)] == []
    until(lambda: lab.status()["running"], what="that the lab is up", seconds=120)
    assert lab.environ().items() <= os.environ.items(), "on its ports"
    with psycopg.connect(lab.status()["postgres"]["dsn"]) as connection:
        assert connection.execute("SELECT count(*) FROM interview_sessions").fetchone() == rows


def test_a_killed_control_plane_comes_back_with_the_worker_of_a_lab_that_runs(own_base: Path) -> None:
    """In a base directory of its own: other tests run beside this one."""
    one, two = Lab.up("one", 1), Lab.up("two", 1)
    before = pids(one)
    prefect = LabControl.find(own_base)
    assert prefect
    for lab in (one, two):
        prefect.start_worker(lab.name, lab.environ())
    workers = {name: service.pid for name, service in prefect.supervisor.services().items()}
    kill(prefect.supervisor.pid_file)
    assert not one.status()["running"]
    Lab.up("two", 1)
    assert [pid for pid in workers.values() if alive(pid)] == []
    for lab in (one, two):
        until(lambda lab=lab: lab.status()["running"], what=f"that {lab.name} is up", seconds=120)  # type: ignore[misc]
    assert prefect.supervisor.services().keys() == {"server", "worker-one", "worker-two"}
    assert pids(one) == before


def test_a_killed_service_is_started_again_by_its_supervisor(lab: Lab) -> None:
    before = pids(lab)["redis"]
    os.kill(before, signal.SIGKILL)
    Lab.up(lab.name, 3)
    assert pids(lab)["redis"] not in (before, None)


def test_two_labs_beside_each_other(lab: Lab, second: Lab) -> None:
    before = pids(lab)
    Lab.up(second.name, 1)
    until(lambda: second.status()["running"], what="that the second is up", seconds=120)
    one, two = lab.status(), second.status()
    assert one["prefect_api"] == two["prefect_api"]
    assert not set(pids(lab).values()) & set(pids(second).values())
    with psycopg.connect(two["postgres"]["dsn"]) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS only_here ()")
    with psycopg.connect(one["postgres"]["dsn"]) as connection:
        assert connection.execute("SELECT to_regclass('only_here')").fetchone() == (None,)
    pools = httpx.post(f"{one['prefect_api']}/work_pools/filter", json={}, auth=login(), timeout=120).json()
    assert {lab.name, second.name} <= {pool["name"] for pool in pools}
    second.down(remove=False)
    assert command("status", "--name", second.name).returncode == 1
    assert pids(lab) == before


def test_a_port_that_a_stranger_took_is_given_up(second: Lab) -> None:
    Lab.prepared(second.name)
    second.down(remove=False)
    port = int(second.environ()["OPS_LAB_POSTGRES_PORT"])
    with socket.create_server(("127.0.0.1", port)):
        Lab.up(second.name, 1)
    assert int(second.environ()["OPS_LAB_POSTGRES_PORT"]) != port
    with psycopg.connect(second.status()["postgres"]["dsn"]) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_edited_configuration_stays_and_a_lost_data_directory_is_not_replaced_by_an_empty_one(second: Lab) -> None:
    Lab.up(second.name, 1)
    second.down(remove=False)
    conf = Path(second.status()["root"]) / "etc" / "postgresql" / "postgresql.conf"
    conf.write_text(conf.read_text() + "work_mem = '7MB'\n")
    data = Path(second.status()["postgres"]["data"])
    data.rename(data.with_name("data.lost"))
    try:
        with pytest.raises(OpsError, match="recover it with the runbooks"):
            Lab.up(second.name, 1)
        assert not data.exists()
    finally:
        data.with_name("data.lost").rename(data)
    until(lambda: second.status()["prefect_running"], what="an answer of Prefect", seconds=120)
    Lab.up(second.name, 1)
    with psycopg.connect(second.status()["postgres"]["dsn"]) as connection:
        assert connection.execute("SHOW work_mem").fetchone() == ("7MB",)


def streaming(lab: Lab) -> set[str]:
    with psycopg.connect(lab.status()["postgres"]["admin_dsn"]) as connection:
        rows = connection.execute("SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'")
        return {name for (name,) in rows}


def commit(lab: Lab) -> None:
    with psycopg.connect(lab.status()["postgres"]["dsn"], options="-c statement_timeout=120s") as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS committed (at timestamptz DEFAULT now())")
        connection.execute("INSERT INTO committed DEFAULT VALUES")


@pytest.fixture
def uncommitted(lab: Lab) -> Iterator[None]:
    """The table goes with the test."""
    yield
    with psycopg.connect(lab.status()["postgres"]["dsn"]) as connection:
        connection.execute("DROP TABLE IF EXISTS committed")


@pytest.mark.usefixtures("uncommitted")
def test_commits_wait_for_the_standby_or_the_receiver_and_go_on_without_one_of_them(lab: Lab) -> None:
    status = lab.status()
    until(lambda: streaming(lab) == {"standby", "receiver"}, what="that both stream", seconds=120)
    with psycopg.connect(status["postgres"]["admin_dsn"]) as connection:
        names = connection.execute("SHOW synchronous_standby_names").fetchone()
        assert names == ("ANY 1 (standby, receiver)",)
        slots = connection.execute("SELECT slot_name, active FROM pg_replication_slots ORDER BY 1").fetchall()
        assert slots == [("standby", True), ("wal_archive", True)]
    with psycopg.connect(status["standby"]["admin_dsn"]) as connection:
        assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
    supervisor = lifecycle.existing(lab.name)[0].supervisor
    for name, program in (("standby", "postgresql-standby"), ("receiver", "wal-receiver")):
        supervisor.stop(program)
        try:
            others = {"standby", "receiver"} - {name}
            until(lambda others=others: streaming(lab) == others, what=f"the end of {name}", seconds=120)  # type: ignore[misc]
            commit(lab)
        finally:
            Lab.up(lab.name, 3)
        until(lambda: streaming(lab) == {"standby", "receiver"}, what=f"the return of {name}", seconds=120)


def test_a_lab_of_an_earlier_version_gets_a_standby_and_a_receiver(second: Lab) -> None:
    Lab.up(second.name, 1)
    with psycopg.connect(second.status()["postgres"]["dsn"]) as connection:
        rows = connection.execute("SELECT count(*) FROM interview_sessions").fetchone()
    second.down(remove=False)
    root = Path(second.status()["root"])
    for path in (root / "postgresql-standby", root / "wal", root / "etc" / "postgresql-standby"):
        shutil.rmtree(path)
    shutil.rmtree(root.with_name(f"{second.name}-dr"))
    state = json.loads((root / "state.json").read_text())
    del state["ports"]["postgres_standby"]
    (root / "state.json").write_text(json.dumps(state))
    for slot in (root / "postgresql" / "data" / "pg_replslot").iterdir():
        shutil.rmtree(slot)
    Lab.up(second.name, 1)
    until(lambda: streaming(second) == {"standby", "receiver"}, what="that both stream", seconds=120)
    for node in ("postgres", "standby"):
        with psycopg.connect(second.status()[node]["dsn"]) as connection:
            assert connection.execute("SELECT count(*) FROM interview_sessions").fetchone() == rows


def promoted(lab: Lab) -> None:
    """A failover by hand: the primary stopped, the standby promoted, commits alone."""
    services, _ = lifecycle.existing(lab.name)
    services.supervisor.stop("postgresql")
    with psycopg.connect(lab.status()["standby"]["admin_dsn"], dbname="grc_db", autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("SELECT pg_promote()")
        connection.execute("CREATE TABLE after_failover ()")


def test_a_lab_whose_roles_were_swapped_comes_up_as_it_is(second: Lab) -> None:
    """The old primary, which nobody has rejoined, stays stopped: it would be a second one. With its data put away it is
    made anew, as a standby."""
    Lab.up(second.name, 1)
    before = second.status()
    promoted(second)
    after = second.status()
    assert (after["postgres"]["dsn"], after["standby"]["dsn"]) == (before["standby"]["dsn"], before["postgres"]["dsn"])
    second.down(remove=False)
    services, _ = lifecycle.existing(second.name)
    assert [node.follows for node in nodes(services.layout, services.state)] == [False, False], "each would take writes"
    said: list[str] = []
    lifecycle.up(second.name, said.append, runbooks=False)
    status = second.status()
    assert status["postgres"]["data"] == before["standby"]["data"]
    assert not status["services"]["postgresql"]["running"]
    assert any("postgresql stays stopped" in line and "rejoin" in line for line in said)
    with psycopg.connect(status["postgres"]["dsn"]) as connection:
        assert connection.execute("SELECT to_regclass('after_failover') IS NOT NULL").fetchone() == (True,)
    until(lambda: answers(f"{status['application']['url']}/health"), what="its health", seconds=120)
    commit(second)
    before_again = pids(second)
    Lab.up(second.name, 1)
    assert pids(second) == before_again
    old = Path(before["postgres"]["data"])
    old.rename(old.with_name("left-behind"))
    Lab.up(second.name, 1)
    until(lambda: streaming(second) >= {"standby"}, what="its streaming", seconds=120)
    # It streams before supervisord calls it RUNNING, which is after a second.
    until(lambda: second.status()["services"]["postgresql"]["running"], what="its start", seconds=120)
    assert second.status()["postgres"]["data"] == before["standby"]["data"]
    second.down()


def test_the_second_region_is_prepared_and_runs_nothing(lab: Lab) -> None:
    region = Lab(f"{lab.name}-dr")
    assert region.environ()["OPS_ENVIRONMENT"] == region.name
    assert not set(lifecycle.existing(region.name)[0].state.ports.all()) & set(
        lifecycle.existing(lab.name)[0].state.ports.all()
    )
    status = region.status()
    assert {row["running"] for row in status["services"].values()} == {False}
    assert sorted(status["services"]) == [
        *("grc-backend", "grc-frontend", "postgresql", "postgresql-standby", "redis", "wal-archiver", "wal-receiver")
    ]
    assert lifecycle.existing(region.name)[0].supervisor.is_running()
    assert not Path(status["postgres"]["data"]).exists()
    assert list(Path(status["redis"]["data"]).iterdir()) == []
    environment = Environment.find(region.name)
    assert environment.name == region.name
    assert {role: environment.services.is_running(role) for role in environment.services.names} == dict.fromkeys(
        environment.services.names, False
    )
    endpoint = Path(lab.status()["endpoint"])
    assert endpoint.read_text() == lab.status()["application"]["url"] + "\n"
    assert endpoint == Path(Environment.find(lab.name).endpoint.file)


def test_users_stay_where_a_failover_of_the_region_has_sent_them(lab: Lab) -> None:
    endpoint, there = Path(lab.status()["endpoint"]), Lab(f"{lab.name}-dr").status()["application"]["url"]
    try:
        endpoint.write_text(there + "\n")
        Lab.up(lab.name, 3)
        assert endpoint.read_text().strip() == there
        endpoint.write_text("http://127.0.0.1:1\n")  # of neither: the ports were others once
    finally:
        Lab.up(lab.name, 3)
    assert endpoint.read_text().strip() == lab.status()["application"]["url"]


def test_a_second_region_is_not_brought_up_by_itself(lab: Lab) -> None:
    done = command("up", "--name", f"{lab.name}-dr")
    assert done.returncode == 1
    assert f"bring it up with that: python -m lab up --name {lab.name}" in done.stderr
    with pytest.raises(OpsError, match="is the second region of the lab"):
        lifecycle.prepare(f"{lab.name}-dr")


@pytest.mark.parametrize("name", ["Lab", "1st", "a b", "x" * 32, "control", "../etc", ""])
def test_a_name_that_cannot_be_one_is_refused_in_a_sentence(name: str) -> None:
    for arguments in (("up", "--name", name), ("status", "--name", name, "--json"), ("down", "--name", name)):
        done = forked.run(["-m", "lab", *arguments])
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
        assert "cannot name a lab" in done.stderr


def test_what_a_script_starts_in_its_background_can_be_stopped() -> None:
    show = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {show!r}])"
    heeding = f"from lab.processes import heed_interrupts; heed_interrupts(); {starts}"
    for program, ignores in ((starts, "True"), (heeding, "False")):
        shell = ["sh", "-c", 'trap "" INT; exec "$@"', "_", sys.executable, "-c", program]
        assert subprocess.run(shell, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip() == ignores


def test_a_lab_that_never_was_is_down() -> None:
    done = command("status", "--name", "never-was", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"environment": "never-was", "running": False}
    assert command("env", "--name", "never-was").returncode == 1
