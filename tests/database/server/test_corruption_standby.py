"""check_corruption on a streaming standby: damage of its own files only, and the primary next to it comes out well."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.processes import run
from runbook.report import Status
from runbook.wait import until
from tests.database.conftest import NAME, write_environment
from tests.database.server.test_corruption import DATABASE, PAGE, bad, break_order, check, checksums, flip, rows
from tests.fixtures.reports import beginning as finding
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, running_postgres

pytestmark = pytest.mark.contrib


@dataclass(frozen=True)
class Pair:
    """A primary and what streams from it."""

    primary: PostgresServer
    standby: PostgresServer

    def caught_up(self) -> None:
        def replayed() -> bool:
            lsn = self.primary.sql("SELECT pg_current_wal_lsn()")[0][0]
            return bool(self.standby.sql("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", lsn)[0][0])

        until(replayed, what="the standby's replay", seconds=120)

    def damage(self, relation: str, block: int, change: Callable[[bytearray], None], *, sums: bool) -> None:
        """Change a page in the stopped standby's file (both servers name it alike); `sums`: they stay on, and tell."""
        where = self.primary.sql(f"SELECT pg_relation_filepath('{relation}')", database=DATABASE)[0][0]
        self.standby.stop()
        if not sums:
            checksums(self.standby, "--disable")
        with (self.standby.data / str(where)).open("r+b") as file:
            file.seek(block * PAGE)
            page = bytearray(file.read(PAGE))
            change(page)
            file.seek(block * PAGE)
            file.write(page)
        self.standby.start()


@contextlib.contextmanager
def streaming(primary: PostgresServer) -> Iterator[PostgresServer]:
    standby = PostgresServer()
    try:
        login = f"host=127.0.0.1 port={primary.port} user=postgres"
        environ = {**os.environ, "PGPASSWORD": ADMIN_PASSWORD}  # on no command line: another test reads all there are
        argv = [standby.programs / "pg_basebackup", "-D", standby.data, "-R", "-c", "fast", "-X", "stream", "--no-sync"]
        run([*argv, "-d", login], cwd=standby.root, account=standby.account, environment=environ)
        standby.start()
        yield standby
    finally:
        standby.remove()


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Both run; the environment names both; amcheck is in the database."""
    with running_postgres() as primary:
        primary.create_database(DATABASE)
        primary.sql(
            "CREATE TABLE people (id int PRIMARY KEY, name text); CREATE UNLOGGED TABLE cache (id int); "
            "INSERT INTO people SELECT g, 'name ' || g FROM generate_series(1, 20000) g; CREATE EXTENSION amcheck",
            database=DATABASE,
        )
        primary.sql("VACUUM people", database=DATABASE)
        with streaming(primary) as standby:
            path = write_environment(primary, DATABASE, tmp_path)
            section = path.read_text().partition("[postgres]\n")[2].partition("\n[")[0]
            named = section.replace(f"port = {primary.port}", f"port = {standby.port}")
            path.write_text(f"{path.read_text()}[standby]\n{named}\n")
            monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
            monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(path))
            monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
            monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
            primary.sql("CREATE TABLE later ()", database=DATABASE)  # the first commit that the standby replays
            made = Pair(primary, standby)
            made.caught_up()
            yield made


def test_it_reads_the_standby_where_there_is_one(pair: Pair) -> None:
    report = check(heapallindexed=True)
    assert bad(report) == []
    assert report.facts["server"].startswith(f"standby 127.0.0.1:{pair.standby.port}, replayed up to 20")
    assert report.facts["server"].endswith("where=primary reads the primary's disk")
    assert int(report.outcome.split()[0]) > 150
    unlogged = [row for row in rows(report, "Damaged, or not checked") if row[0] == "public.cache"]
    assert unlogged == [("public.cache", "table", "not checked", "unlogged, empty on a standby")]
    primary = check(where="primary")
    assert bad(primary) == []
    assert primary.facts["server"] == f"primary 127.0.0.1:{pair.primary.port}"


def test_damage_of_the_standby_alone(pair: Pair) -> None:
    """With checksums off, so that nobody but amcheck sees it."""
    pair.damage("people_pkey", 1, break_order, sums=False)
    report = check(tables=["people"])
    index = finding(report, "index public.people_pkey")
    assert index.status is Status.CRITICAL
    assert "item order invariant violated" in index.value
    assert "REINDEX" not in index.hint
    assert "run this with where=primary" in index.hint
    assert "rebuild the standby" in index.hint
    assert bad(check(where="primary")) == [], "physical damage does not travel"


def test_a_failed_checksum_of_the_standby_alone(pair: Pair) -> None:
    pair.damage("people", 3, flip, sums=True)
    report = check(where="standby")
    table = finding(report, "table public.people")
    assert table.status is Status.CRITICAL
    assert "invalid page in block 3" in table.value
    assert "pg_basebackup" in table.hint
    failed = finding(report, f"failed checksums in {DATABASE}")
    assert failed.value.startswith("1, the last at 20"), "a standby counts its own"
    assert "pg_basebackup" in failed.hint
    primary = check(where="primary")
    assert bad(primary) == []
    assert finding(primary, "failed checksums").value == "0"


def test_amcheck_comes_from_the_primary(pair: Pair) -> None:
    pair.primary.sql("DROP EXTENSION amcheck", database=DATABASE)
    pair.caught_up()
    report = check()
    assert finding(report, "heap and indexes").value == "not measured: amcheck is not installed"
    assert check(install=True).status is Status.PLANNED
    installed = "SELECT count(*) FROM pg_extension WHERE extname = 'amcheck'"
    assert pair.primary.sql(installed, database=DATABASE) == [(0,)]
    report = check(install=True, confirm=NAME)
    assert bad(report) == []
    assert pair.primary.sql(installed, database=DATABASE) == [(1,)]
    assert report.facts["server"].startswith("standby")
    assert int(report.outcome.split()[0]) > 150


def test_a_standby_that_was_promoted_is_none(pair: Pair) -> None:
    assert pair.standby.sql("SELECT pg_promote(true, 600)") == [(True,)]
    report = check()
    assert report.status is Status.CRITICAL
    assert "two servers take writes" in report.sentence()
    assert "heap and indexes" not in {found.name for found in report.findings}
    assert "two servers take writes" in check(where="primary").sentence()


def test_where_that_is_nowhere(pair: Pair) -> None:
    assert "where is “elsewhere”. Next: choose auto, primary or standby" in check(where="elsewhere").sentence()


def conflicts(standby: PostgresServer, delay: str) -> None:
    """How long replay lets a query stand in its way."""
    standby.sql(f"ALTER SYSTEM SET max_standby_streaming_delay = '{delay}'")
    standby.sql("SELECT pg_reload_conf()")
    until(lambda: standby.sql("SHOW max_standby_streaming_delay") == [(delay,)], what="the reload", seconds=120)


def test_no_false_alarm_while_it_replays(pair: Pair) -> None:
    conflicts(pair.standby, "-1")  # the other test is about what recovery cancels, be it late by half a minute only
    stop = threading.Event()

    def write() -> None:
        with pair.primary.connect(DATABASE) as client:
            while not stop.wait(0.001):
                client.execute("UPDATE people SET name = name || 'x' WHERE id % 50 = (random() * 49)::int")
                client.execute(
                    "INSERT INTO people SELECT max(id) + g, 'n' FROM people, generate_series(1, 50) g GROUP BY g"
                )

    client = threading.Thread(target=write)
    client.start()
    try:
        for _ in range(10):
            assert bad(check(tables=["people"], heapallindexed=True)) == []
    finally:
        stop.set()
        client.join()


def test_a_row_that_the_primary_removes_meanwhile_is_no_damage(pair: Pair) -> None:
    """Recovery cancels what still reads it: nothing is known of that relation, and what to do about it is said."""
    conflicts(pair.standby, "0")
    pair.primary.sql("UPDATE people SET name = name || 'y'", database=DATABASE)
    stop = threading.Event()

    def vacuum() -> None:
        while not stop.is_set():
            pair.primary.sql("UPDATE people SET name = 'z' WHERE id < 5000; ", database=DATABASE)
            pair.primary.sql("VACUUM people", database=DATABASE)

    client = threading.Thread(target=vacuum)
    client.start()
    try:

        def cancelled() -> str:
            report = check(tables=["people"], heapallindexed=True)
            others = [name for name in bad(report) if name != "relations that could not be checked"]
            assert not [name for name in others if "conflict with recovery" not in name], "no damage"
            if others:  # it was not amcheck's statement that recovery cancelled
                return ""
            named = [found for found in report.findings if found.name == "relations that could not be checked"]
            return named[0].value if named else ""

        value = until(cancelled, what="a cancelled check", seconds=120, every_seconds=0)
        assert "conflict with recovery" in value
        assert "hot_standby_feedback = on" in value
    finally:
        stop.set()
        client.join()
