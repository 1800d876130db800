"""check_corruption: bytes flipped in the files of a stopped server, with and without a checksum that tells."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from flows.database.server.corruption import check_corruption
from lab.processes import run
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.postgres.upkeep import amcheck
from tasks.postgres.upkeep.amcheck import check_relations, find_relations
from tests.database.conftest import NAME, Trial, write_environment
from tests.fixtures.reports import beginning as finding
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, running_postgres

DATABASE = "grc_db"
PAGE = 8192
MISSED = "Damaged, or not checked"


def check(**parameters: object) -> Report:
    """The report, CRITICAL or not."""
    try:
        return check_corruption.fn(NAME, **parameters)  # type: ignore[arg-type]
    except RunbookFailed as error:
        return error.report


def bad(report: Report) -> list[str]:
    return [found.name for found in report.findings if found.status is not Status.OK]


def rows(report: Report, name: str) -> list[tuple[str, ...]]:
    return [row for item in report.evidence if item.name == name for row in item.rows]


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    with running_postgres(settings=("autovacuum=off",)) as server:  # it would meet the damage, and count it once more
        yield server


@pytest.fixture
def damaged(own_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """A server whose files a test may damage, with a table and its index, amcheck installed."""
    own_server.create_database(DATABASE)
    own_server.sql(
        "CREATE TABLE people (id int PRIMARY KEY, name text); "
        "INSERT INTO people SELECT g, 'name ' || g FROM generate_series(1, 20000) g; "
        "CREATE EXTENSION amcheck",
        database=DATABASE,
    )
    own_server.sql("VACUUM people", database=DATABASE)  # hint bits: reading writes nothing from here on
    own_server.sql("CHECKPOINT")
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(own_server, DATABASE, tmp_path)))
    monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
    yield own_server
    own_server.drop_database(DATABASE)


def alter(
    server: PostgresServer, relation: str, block: int, change: Callable[[bytearray], None], *, sums: bool
) -> None:
    """Change one page of a stopped server's file; with `sums` all checksums are right again afterwards."""
    path = server.data / str(server.sql(f"SELECT pg_relation_filepath('{relation}')", database=DATABASE)[0][0])
    server.stop()
    if sums:
        checksums(server, "--disable")
    with path.open("r+b") as file:
        file.seek(block * PAGE)
        page = bytearray(file.read(PAGE))
        change(page)
        file.seek(block * PAGE)
        file.write(page)
    if sums:
        checksums(server, "--enable")
    server.start()


def checksums(server: PostgresServer, how: str) -> None:
    argv = [server.programs / "pg_checksums", how, "--no-sync", "-D", server.data]
    run(argv, cwd=server.root, account=server.account)


def flip(page: bytearray) -> None:
    """One bit in the middle of the rows."""
    page[6000] ^= 0x10


def first_item(page: bytearray, number: int = 0) -> int:
    """Where a line pointer of a page leads: 15 bits of offset."""
    return int.from_bytes(page[24 + 4 * number : 28 + 4 * number], "little") & 0x7FFF


def break_row(page: bytearray) -> None:
    """The first row's header claims to be longer than the row (t_hoff)."""
    page[first_item(page) + 22] = 250


def break_order(page: bytearray) -> None:
    """The key of the third entry of a leaf becomes the smallest of all (an index tuple's header has 8 bytes)."""
    at = first_item(page, 2) + 8
    page[at : at + 4] = bytes(4)


def point_elsewhere(page: bytearray) -> None:
    """The third entry of a leaf leads to another row of its page: the order of the keys is kept."""
    at = first_item(page, 2) + 4
    page[at : at + 2] = (int.from_bytes(page[at : at + 2], "little") + 100).to_bytes(2, "little")


def swap_items(page: bytearray) -> None:
    """The first two entries of a page stand in the other order: their line pointers are exchanged."""
    page[24:28], page[28:32] = page[28:32], page[24:28]


@pytest.mark.contrib
def test_a_sound_database(damaged: PostgresServer) -> None:
    before = damaged.sql("SELECT pg_current_wal_insert_lsn()")
    report = check(heapallindexed=True)
    assert bad(report) == []
    assert report.status is Status.OK
    assert not {"public.people", "public.people_pkey"} & {row[0] for row in rows(report, MISSED)}
    assert int(report.outcome.split()[0]) > 150  # with the catalogue
    assert finding(report, "failed checksums").value == "0"
    assert report.lock is None
    written = damaged.sql("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s)", before[0][0])[0][0]
    assert written < 20_000, "the check writes nothing (a standby snapshot of the background writer may come between)"


@pytest.mark.contrib
def test_flipped_bytes_in_the_heap(damaged: PostgresServer) -> None:
    alter(damaged, "people", 3, flip, sums=False)
    report = check()
    table = finding(report, "table public.people")
    assert table.status is Status.CRITICAL
    assert "invalid page in block 3" in table.value
    assert "restore-database" in table.hint
    failed = finding(report, f"failed checksums in {DATABASE}")
    assert failed.status is Status.CRITICAL
    assert failed.value.startswith("1, the last at 20")
    assert "index public.people_pkey" not in bad(report)


@pytest.mark.contrib
def test_flipped_bytes_in_an_index(damaged: PostgresServer) -> None:
    alter(damaged, "people_pkey", 1, flip, sums=False)
    report = check(tables=["public.people"])
    index = finding(report, "index public.people_pkey")
    assert index.status is Status.CRITICAL
    assert "invalid page in block 1" in index.value
    assert index.hint == "REINDEX INDEX CONCURRENTLY public.people_pkey: its table is intact"
    assert "table public.people" not in bad(report)
    damaged.sql("REINDEX INDEX CONCURRENTLY people_pkey", database=DATABASE)
    assert "index public.people_pkey" not in bad(check(tables=["people"]))


@pytest.mark.contrib
def test_a_damaged_row_under_a_right_checksum(damaged: PostgresServer) -> None:
    alter(damaged, "people", 3, break_row, sums=True)
    report = check(tables=["people"])
    table = finding(report, "table public.people")
    assert table.status is Status.CRITICAL
    assert "block 3 row 1: " in table.value
    assert not [name for name in bad(report) if name.startswith("failed checksums")]


@pytest.mark.contrib
def test_an_index_out_of_order_under_a_right_checksum(damaged: PostgresServer) -> None:
    alter(damaged, "people_pkey", 1, break_order, sums=True)
    report = check(tables=["people"])
    index = finding(report, "index public.people_pkey")
    assert index.status is Status.CRITICAL
    assert "item order invariant violated" in index.value
    assert report.outcome == "3 intact, 1 damaged"


@pytest.mark.contrib
def test_a_row_that_the_index_lacks_is_found_only_with_heapallindexed(damaged: PostgresServer) -> None:
    alter(damaged, "people_pkey", 1, point_elsewhere, sums=True)
    assert "index public.people_pkey" not in bad(check(tables=["people"]))
    report = check(tables=["people"], heapallindexed=True)
    assert "lacks matching index tuple" in finding(report, "index public.people_pkey").value


@pytest.mark.contrib
def test_damage_that_nobody_would_notice(damaged: PostgresServer) -> None:
    damaged.sql("ALTER SYSTEM SET zero_damaged_pages = on")
    damaged.stop()
    checksums(damaged, "--disable")
    damaged.start()
    report = check(tables=["people"])
    assert finding(report, "data checksums").status is Status.WARN
    assert finding(report, "data checksums").value == "off: failures are not measured"
    assert finding(report, "settings that hide damage").status is Status.CRITICAL
    assert "failed checksums" not in {found.name for found in report.findings}
    damaged.sql("ALTER SYSTEM RESET zero_damaged_pages")
    damaged.stop()
    checksums(damaged, "--enable")
    damaged.start()
    assert bad(check(tables=["people"])) == []


@pytest.mark.contrib
def test_damage_is_found_where_the_server_is_told_to_hide_it(damaged: PostgresServer) -> None:
    """zero_damaged_pages would read the page as empty, and lose its rows with the next write."""
    damaged.sql("ALTER ROLE postgres SET zero_damaged_pages = on")
    try:
        alter(damaged, "people", 3, flip, sums=False)
        assert "invalid page in block 3" in finding(check(tables=["people"]), "table public.people").value
    finally:
        damaged.sql("ALTER ROLE postgres RESET zero_damaged_pages")


@pytest.mark.contrib
def test_a_server_that_dies_meanwhile_is_no_pass(damaged: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amcheck, "LOCK_WAIT_MS", 600_000)

    def kill() -> None:
        waits = "SELECT 1 FROM pg_stat_activity WHERE query ~ 'heapam|index_check' AND wait_event_type = 'Lock'"
        until(lambda: damaged.sql(waits), what="a check that waits", seconds=120)
        damaged.stop(signal.SIGQUIT)

    with contextlib.suppress(psycopg.OperationalError), damaged.connect(DATABASE) as other:
        other.execute("BEGIN; LOCK TABLE people")
        killer = threading.Thread(target=kill)
        killer.start()
        report = check(tables=["people"])
        killer.join()
    damaged.start()
    assert report.status is Status.CRITICAL
    assert "does not answer" in report.sentence()
    assert "the server ended the session" in finding(report, "relations that could not be checked").value
    assert bad(check(tables=["people"])) == []


@pytest.mark.contrib
def test_a_damaged_gin_index_and_the_missing_end_of_a_table_are_found(damaged: PostgresServer) -> None:
    damaged.sql(
        "CREATE TABLE papers (id int PRIMARY KEY, words tsvector); "
        "INSERT INTO papers SELECT g, to_tsvector('simple', 'w' || g) FROM generate_series(1, 5000) g; "
        "CREATE INDEX papers_words ON papers USING gin (words); CREATE INDEX papers_order ON papers USING gin (words); "
        "CREATE TABLE heap AS SELECT g AS id, repeat('x', 500) AS text FROM generate_series(1, 5000) g; "
        "CREATE TABLE cut AS SELECT * FROM heap",
        database=DATABASE,
    )
    for table in ("papers", "heap", "cut"):
        damaged.sql(f"VACUUM ANALYZE {table}", database=DATABASE)
    damaged.sql("CHECKPOINT")
    damaged.sql("DELETE FROM cut WHERE id > 1000", database=DATABASE)
    damaged.sql("VACUUM cut", database=DATABASE)  # the file is shorter at once, its map's with the next checkpoint
    assert damaged.sql("SELECT pg_relation_size('cut') < pg_relation_size('heap') / 2", database=DATABASE) == [(True,)]
    assert bad(check(tables=["cut", "heap"])) == []
    damaged.sql("UPDATE pg_class SET relpages = relpages + 100 WHERE relname = 'papers'", database=DATABASE)
    damaged.sql("CHECKPOINT")
    sound = check()
    assert bad(sound) == [], "an old count of pages is no damage"
    has_check = damaged.sql("SELECT 1 FROM pg_proc WHERE proname = 'gin_index_check'", database=DATABASE)
    paths = damaged.sql("SELECT pg_relation_filepath('people'), pg_relation_filepath('heap')", database=DATABASE)[0]
    alter(damaged, "papers_order", 3, swap_items, sums=True)
    alter(damaged, "papers_words", 3, flip, sums=False)
    damaged.stop()
    for path in (damaged.data / str(name) for name in paths):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // PAGE // 2 * PAGE)
    os.utime(path, (before := time.time() - 3600, before))  # no VACUUM of just now
    damaged.start()
    report = check()
    found = [name for name in bad(report) if not name.startswith("failed checksums")]
    tables = ["table public.heap", "table public.people"]
    assert sorted(found) == [
        *(["index public.papers_order", "index public.papers_words"] if has_check else []),
        *tables,
    ]
    assert "the visibility map covers" in finding(report, "table public.heap").value
    assert "public.cut" in report.facts["ends of files"]
    assert "could not read blocks" in finding(report, "table public.people").value
    if has_check:
        assert "invalid page" in finding(report, "index public.papers_words").value
        assert "wrong tuple order on entry tree page, block 3" in finding(report, "index public.papers_order").value


@pytest.mark.contrib
def test_nothing_is_installed_silently(trial: Trial) -> None:
    report = check()
    assert finding(report, "heap and indexes").status is Status.WARN
    assert finding(report, "heap and indexes").value == "not measured: amcheck is not installed"
    assert f"CREATE EXTENSION amcheck in {trial.database}" in finding(report, "heap and indexes").hint
    assert check(install=True).status is Status.PLANNED
    installed = "SELECT count(*) FROM pg_extension WHERE extname = 'amcheck'"
    assert trial.sql(installed) == [(0,)]
    report = check(install=True, confirm=NAME, heapallindexed=True)
    assert bad(report) == []
    assert trial.sql(installed) == [(1,)]
    not_checked = rows(report, MISSED)
    assert all("amcheck has no check for" in row[3] for row in not_checked)
    report = check(install=True, confirm=NAME, tables=["answers", "Über tisch; DROP"])
    assert bad(report) == []
    names = {row[0] for row in rows(report, "Intact, slowest checks first")}
    assert {"public.answers_2026_01", "public.answers_rest", 'public."Über tisch; DROP"'} <= names
    assert "public.people" not in names


@pytest.mark.contrib
def test_another_database_and_one_that_is_not_there(trial: Trial) -> None:
    copy = f"{trial.database}_copy"
    trial.server.create_database(copy)
    trial.sql("CREATE SCHEMA checks; CREATE EXTENSION amcheck SCHEMA checks", database=copy)
    report = check(database=copy)
    assert bad(report) == []
    assert report.facts["database"] == copy
    with pytest.raises(OpsError, match=f"there is no table nothing in {copy}"):
        check_corruption.fn(NAME, database=copy, tables=["nothing"])
    with pytest.raises(OpsError, match="nowhere"):
        check_corruption.fn(NAME, database="nowhere")


@pytest.mark.contrib
def test_what_was_not_reached_or_locked_is_said(trial: Trial) -> None:
    trial.sql("CREATE EXTENSION amcheck")
    tables = ["notes", "long_notes"]
    with trial.server.connect(trial.database) as other, other.transaction():
        other.execute("LOCK TABLE ONLY notes")
        report = check(budget_seconds=1, tables=tables)  # it waits for the lock until the time is used up
        budget = finding(report, "time budget")
        assert budget.status is Status.WARN
        assert budget.hint.endswith("tables=['notes', 'long_notes']")
        assert ("public.long_notes", "table", "not reached", "the time budget was used up") in rows(report, MISSED)
        report = check(tables=tables)
    unchecked = finding(report, "relations that could not be checked")
    assert unchecked.status is Status.WARN
    assert unchecked.value == "public.notes: canceling statement due to lock timeout"
    assert finding(report, "time budget").status is Status.OK


def test_collations_of_another_operating_system(trial: Trial) -> None:
    copy = f"{trial.database}_copy"
    builtin = int(str(trial.sql("SHOW server_version_num")[0][0])) >= 170000  # before, C.UTF-8 has no version
    provider = "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'" if builtin else ""
    collation, actual = ("pg_c_utf8", "1") if builtin else ("C.utf8", "none")
    trial.server.sql(f"CREATE DATABASE {copy} {provider} TEMPLATE template0")
    columns = f'a text PRIMARY KEY, b text COLLATE "{collation}"'
    trial.sql(f"CREATE TABLE t ({columns}); CREATE INDEX t_b ON t (b)", database=copy)
    assert bad(check(database=copy)) == ["heap and indexes"], "amcheck is not installed"
    trial.server.sql("UPDATE pg_database SET datcollversion = '0.9' WHERE datname = %s", copy)
    trial.sql("UPDATE pg_collation SET collversion = '0.9' WHERE collname = %s", collation, database=copy)
    report = check(database=copy)
    database = finding(report, f"version of database {copy}")
    assert database.status is Status.WARN
    assert database.value == f"recorded 0.9, the provider has {actual}"
    assert database.hint.startswith(f'REINDEX t_pkey; then ALTER DATABASE "{copy}" REFRESH COLLATION VERSION. ')
    hint = finding(report, "version of collation pg_catalog.").hint
    assert hint.startswith("REINDEX t_b; then ALTER COLLATION pg_catalog.")
    if builtin:
        trial.server.sql("UPDATE pg_database SET datcollversion = NULL WHERE datname = %s", copy)
        unknown = finding(check(database=copy), "collations without a recorded version")
        assert (unknown.status, unknown.value) == (Status.WARN, f"not measured: database {copy}")


@pytest.mark.contrib
def test_a_damaged_catalogue_is_said_to_be(damaged: PostgresServer) -> None:
    """The last page of pg_class, where the newest tables are described."""
    every = "; ".join(f"CREATE TABLE many_{number} (x int)" for number in range(300))
    damaged.sql(every, database=DATABASE)
    damaged.sql("CREATE TABLE newest AS SELECT 1 AS x", database=DATABASE)
    postgres = damaged.block(DATABASE)
    newest = find_relations.work(postgres, DATABASE, ["newest"])
    where = "SELECT (ctid::text::point)[0]::int FROM pg_class WHERE relname = 'newest'"
    block = int(damaged.sql(where, database=DATABASE)[0][0])
    damaged.sql("CHECKPOINT")
    alter(damaged, "pg_class", block, flip, sums=False)
    (checked,) = check_relations.work(postgres, DATABASE, "public", newest, False, 60.0)
    assert checked.outcome == "damaged"
    assert "and in the system catalogs: invalid page in block" in checked.message
    report = check()
    damage = finding(report, f"the system catalogs of {DATABASE} are damaged")
    assert damage.status is Status.CRITICAL
    assert "invalid page in block" in damage.name
    assert "restore-database" in damage.hint
    assert "the run ended early" not in bad(report)


@pytest.mark.contrib
def test_no_false_alarm_under_write_load(damaged: PostgresServer) -> None:
    damaged.sql("CREATE INDEX ON people (name)", database=DATABASE)
    stop = threading.Event()

    def write() -> None:
        with damaged.connect(DATABASE) as client:
            while not stop.wait(0.001):
                client.execute("UPDATE people SET name = name || 'x' WHERE id % 50 = (random() * 49)::int")
                client.execute("DELETE FROM people WHERE id = (random() * 20000)::int")

    client = threading.Thread(target=write)
    client.start()
    try:
        for _ in range(20):
            assert bad(check(tables=["people"], heapallindexed=True)) == []
    finally:
        stop.set()
        client.join()
