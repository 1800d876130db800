"""Which transaction did it: found in real WAL, among others, also of tables that are gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.restore import restore_database
from flows.database.superseded import discard_superseded
from flows.recovery.forensics.transactions import find_transaction
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.wal.archive.destinations import ship_now
from tasks.wal.reading.transactions import Definition, parse_end, trace
from tests.fixtures.postgres.clusters import NAME, Cluster


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is needed where Prefect died too."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def transaction(cluster: Cluster, *statements: str) -> int:
    """Run statements as one transaction, which is returned."""
    with cluster.connect("postgres") as connection, connection.transaction():
        for statement in statements:
            connection.execute(statement.encode())
        row = connection.execute("SELECT pg_current_xact_id()::xid::text::bigint").fetchone()
    assert row
    return int(row[0])


def deeds(report: Report) -> dict[int, tuple[str, int, int]]:
    """By transaction: what, rows deleted, rows updated."""
    (found,) = [one.rows for one in report.evidence if one.name == "Transactions, by time"]
    return {int(row[1]): (row[3], int(row[4]), int(row[5])) for row in found}


def in_tables(report: Report) -> dict[int, set[str]]:
    """By transaction: the tables that it touched."""
    (found,) = [one.rows for one in report.evidence if one.name == "Transactions, by time"]
    return {int(row[1]): set(row[7].split(", ")) for row in found}


def hints(report: Report) -> dict[str, str]:
    return {finding.name: f"{finding.value} {finding.hint}" for finding in report.findings}


def accounts(cluster: Cluster, rows: int = 1000) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY, balance int, note text)")
    cluster.sql("postgres", "CREATE TABLE others (id int PRIMARY KEY, balance int)")
    cluster.sql("postgres", "INSERT INTO accounts SELECT g, g FROM generate_series(1, %s) g", rows)
    cluster.sql("postgres", "INSERT INTO others SELECT g, g FROM generate_series(1, %s) g", rows)


def noise(cluster: Cluster, transactions: int) -> None:
    """Others at work: each a transaction of its own, on both tables."""
    with cluster.connect("postgres") as connection:
        connection.execute(
            b"CREATE PROCEDURE work(times int) LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..times LOOP"
            b" UPDATE others SET balance = i WHERE id = 1 + i % 900;"
            b" IF i % 50 = 0 THEN UPDATE accounts SET balance = i WHERE id = 1 + i % 7; END IF;"
            b" COMMIT; END LOOP; END $$"
        )
        connection.execute("SET synchronous_commit = off")
        connection.execute(f"CALL work({transactions})".encode())
        connection.execute("RESET synchronous_commit")
        connection.execute("DROP PROCEDURE work")  # with it those before it are on disk
    cluster.settle()  # and where WAL is read


def test_a_delete_among_thousands_of_transactions_is_found_and_its_form_goes_before_it(cluster: Cluster) -> None:
    accounts(cluster)
    backup_cluster.fn(NAME)
    noise(cluster, 1500)
    xid = transaction(cluster, "DELETE FROM accounts WHERE id > 400")
    noise(cluster, 1500)
    report = find_transaction.fn(NAME, "accounts", at_least=100)
    assert deeds(report) == {xid: ("DELETE 600", 600, 0)}
    assert f"transaction {xid}" not in report.sentence()  # its number is in the outcome
    assert f"the largest is {xid} (DELETE 600)" in report.sentence()
    assert int(report.facts["commits in the WAL that was read"].replace(",", "")) > 3000
    (way,) = [one.text for one in report.evidence if one.name == "Go back"]
    assert f'restore-to-point/{NAME}, by="before_transaction", target="{xid}", timeline=1' in way
    restore_to_point.fn(
        NAME, by="before_transaction", target=str(xid), mode="tables", tables=["accounts"], timeline=1, confirm=NAME
    )
    assert cluster.sql("postgres", "SELECT count(*) FROM accounts") == [(1000,)]
    smaller = deeds(find_transaction.fn(NAME, "public.accounts", kinds=["UPDATE"]))
    assert len(smaller) == 60
    assert set(smaller.values()) == {("UPDATE 1", 0, 1)}


def test_truncate_rewrite_and_what_was_before_them_is_found_by_old_files(cluster: Cluster) -> None:
    accounts(cluster)
    bug = transaction(cluster, "UPDATE accounts SET balance = 0 WHERE id <= 300")
    cluster.sql("postgres", "VACUUM FULL accounts")
    deleted = transaction(cluster, "DELETE FROM accounts WHERE id = 1")
    both = transaction(cluster, "TRUNCATE others, accounts", "INSERT INTO accounts VALUES (1, 1)")
    rolled_back = [
        "SAVEPOINT a",
        "DELETE FROM accounts",
        "ROLLBACK TO a",
        "SAVEPOINT b",
        "UPDATE accounts SET balance = 2",
    ]
    inner = transaction(cluster, *rolled_back)
    report = find_transaction.fn(NAME, "accounts")
    assert deeds(report) == {
        bug: ("UPDATE 300", 0, 300),
        deleted: ("DELETE 1", 1, 0),
        both: ("TRUNCATE", 0, 0),
        inner: ("UPDATE 1", 0, 1),
    }
    assert list(deeds(find_transaction.fn(NAME, "others"))) == [both]


@pytest.mark.parametrize("anew", [False, True], ids=["gone", "made anew"])
def test_a_dropped_table_is_found_by_its_name_in_the_base_backup(cluster: Cluster, anew: bool) -> None:
    accounts(cluster)
    for catalog in ("pg_database", "pg_class"):  # their files have other names from then on
        cluster.sql("postgres", f"VACUUM FULL {catalog}")
    backup_cluster.fn(NAME)
    emptied = transaction(
        cluster, "TRUNCATE accounts", "INSERT INTO accounts SELECT g, g FROM generate_series(1, 20) g"
    )
    deleted = transaction(cluster, "DELETE FROM accounts WHERE id > 10")
    dropped = transaction(cluster, "DROP TABLE accounts")
    noise_of_others = transaction(cluster, "DELETE FROM others", "DROP TABLE others")
    if anew:
        cluster.sql("postgres", "CREATE TABLE accounts (id int)")
    report = find_transaction.fn(NAME, "accounts")
    assert deeds(report) == {emptied: ("TRUNCATE", 0, 0), deleted: ("DELETE 10", 10, 0), dropped: ("DROP", 0, 0)}
    assert report.facts["name found in"].startswith("base_")
    assert noise_of_others not in deeds(report)


def test_without_a_base_backup_what_was_dropped_is_listed_and_found_by_oid(cluster: Cluster) -> None:
    accounts(cluster)
    ((oid,),) = cluster.sql("postgres", "SELECT 'accounts'::regclass::oid::bigint")
    deleted = transaction(cluster, "DELETE FROM accounts WHERE id > 990")
    dropped = transaction(cluster, "DROP TABLE accounts")
    cluster.stop("standby")  # it might still have it
    with pytest.raises(RunbookFailed) as caught:
        find_transaction.fn(NAME, "accounts")
    (listed,) = [one.rows for one in caught.value.report.evidence if one.name.startswith("Dropped in the window")]
    assert [row[1] for row in listed] == [str(dropped)]
    assert str(oid) in listed[0][2].split(", ")
    found = find_transaction.fn(NAME, str(oid))
    assert deeds(found) == {deleted: ("DELETE 10", 10, 0), dropped: ("DROP", 0, 0)}


def segments(cluster: Cluster) -> list[Path]:
    (archive,) = (cluster.root / "backups" / "wal" / NAME).iterdir()
    return sorted(path for path in archive.iterdir() if ".partial" not in path.name and ".history" not in path.name)


def test_a_missing_segment_is_said_and_nothing_found_is_no_answer_then(cluster: Cluster) -> None:
    accounts(cluster)
    before = transaction(cluster, "DELETE FROM accounts WHERE id = 1")
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    hidden = transaction(cluster, "DELETE FROM accounts WHERE id > 900")
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    after = transaction(cluster, "DELETE FROM accounts WHERE id = 2")
    ((last,),) = cluster.sql("postgres", "SELECT pg_walfile_name(pg_switch_wal())")
    assert list(deeds(find_transaction.fn(NAME, "accounts"))) == [before, hidden, after]
    until(lambda: ship_now(cluster.environment).newest == last, what=f"{last} in the archive", seconds=120)
    lost = segments(cluster)[-2]
    name = lost.name[:24]
    lost.unlink()
    for place in (cluster.wal, cluster.node("postgres").data / "pg_wal", cluster.node("standby").data / "pg_wal"):
        (place / name).unlink(missing_ok=True)
    report = find_transaction.fn(NAME, "accounts")
    assert list(deeds(report)) == [before, after]
    assert report.status is Status.WARN
    assert f"missing: {name}" in hints(report)["WAL without a gap"]
    with pytest.raises(OpsError, match=f"missing: {name}"):
        find_transaction.fn(NAME, "accounts", kinds=["TRUNCATE"])


def test_one_that_is_not_whole_hides_nothing_behind_it(cluster: Cluster) -> None:
    """A segment in the middle of which nothing can be read: what follows in the next ones is read all the same."""
    accounts(cluster)
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    before = transaction(cluster, "DELETE FROM accounts WHERE id = 1")
    with cluster.connect("postgres") as open_, open_.transaction():
        long_one = open_.execute("SELECT pg_current_xact_id()::xid::text").fetchone()
        here = "SELECT file_name, file_offset FROM pg_walfile_name_offset(pg_current_wal_insert_lsn())"
        ((name, cut),) = cluster.sql("postgres", here)
        open_.execute("DELETE FROM accounts WHERE id > 990")
        cluster.sql("postgres", "SELECT pg_switch_wal()")
        transaction(cluster, "UPDATE others SET balance = 0 WHERE id = 1")
        cluster.sql("postgres", "CHECKPOINT")  # it tells what is running
        cluster.sql("postgres", "SELECT pg_switch_wal()")
        transaction(cluster, "UPDATE others SET balance = 0 WHERE id = 1")
        later = cluster.sql("postgres", "SELECT pg_current_wal_insert_lsn()")[0][0]
    for number in range(2, 5):
        last = transaction(cluster, f"DELETE FROM accounts WHERE id = {number}")
        cluster.sql("postgres", "SELECT pg_switch_wal()")
    assert len(deeds(find_transaction.fn(NAME, "accounts"))) == 5
    late = find_transaction.fn(NAME, "accounts", since=str(later), at_least=1)
    assert len(deeds(late)) == 3, "the rows of the fourth are before the window"
    assert long_one
    assert long_one[0] in hints(late)["transactions that began before the window"]
    until((cluster.wal / name).exists, what=f"the end of {name}", seconds=120)
    content = bytearray((cluster.wal / name).read_bytes())
    content[cut:] = bytes(len(content) - cut)
    for place in (cluster.wal, cluster.node("postgres").data / "pg_wal", cluster.node("standby").data / "pg_wal"):
        if (place / name).exists():  # a checkpoint may have taken it away
            (place / name).write_bytes(content)
    report = find_transaction.fn(NAME, "accounts")
    assert f"the end of {name}" in hints(report)["WAL without a gap"]
    assert {before, last} < set(deeds(report))
    assert report.status is Status.WARN


def test_the_window_by_time_and_by_lsn(cluster: Cluster) -> None:
    accounts(cluster)
    first = transaction(cluster, "DELETE FROM accounts WHERE id = 1")
    moment, lsn = cluster.sql("postgres", "SELECT clock_timestamp(), pg_current_wal_insert_lsn()")[0]
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    second = transaction(cluster, "DELETE FROM accounts WHERE id = 2")
    for edge in (moment.isoformat(), str(lsn)):
        assert list(deeds(find_transaction.fn(NAME, "accounts", since=edge))) == [second]
        assert list(deeds(find_transaction.fn(NAME, "accounts", until=edge, since="0/1000000"))) == [first]
    for wrong, said in (
        ({"since": "yesterday"}, "does not fit"),
        ({"since": "FF/0"}, "no WAL in that window"),
        ({"table": "acounts"}, "did you mean"),
        ({"table": " "}, "table is empty"),
        ({"kinds": []}, "kinds is empty"),
    ):
        with pytest.raises(OpsError, match=said):
            find_transaction.fn(**{"environment": NAME, "table": "accounts", **wrong})


def test_what_is_still_open_is_told_and_a_dead_primary_s_wal_is_read(cluster: Cluster) -> None:
    accounts(cluster)
    backup_cluster.fn(NAME)
    done = transaction(cluster, "DELETE FROM accounts WHERE id <= 5")
    with cluster.connect("postgres") as connection, connection.transaction(force_rollback=True):
        connection.execute("DELETE FROM accounts WHERE id > 500")
        transaction(cluster, "INSERT INTO others VALUES (0, 0)")  # its commit brings the other's records to disk
        report = find_transaction.fn(NAME, "accounts")
    assert deeds(report) == {done: ("DELETE 5", 5, 0)}
    assert "500 rows" in hints(report)["transactions without an end in the window"]
    cluster.crash("standby")
    cluster.crash("postgres")
    assert deeds(find_transaction.fn(NAME, "accounts")) == {done: ("DELETE 5", 5, 0)}


def test_a_commit_record_is_read_whole() -> None:
    """As PostgreSQL 18 prints it."""
    end = parse_end(
        0,
        7,
        "COMMIT_PREPARED 900: 2026-11-26 01:02:03.000004 UTC; rels: base/5/20 pg_tblspc/9/PG_18_202506291/5/21"
        " base/5/t3_22; subxacts: 901 902; dropped stats: 2/5/19 1/0/5 2/5/18; inval msgs: catcache 55",
    )
    assert end
    assert (end.xid, end.committed, end.inner) == (900, True, (901, 902))
    assert end.files == ((5, 20), (5, 21))
    assert end.dropped == {(5, 19), (5, 18)}
    ended = parse_end(3, 9, "COMMIT 2026-11-26 01:02:03 UTC; rels: base/5/33 base/5/32 base/5/31")
    assert ended
    made = ((5, 41), (5, 42), (5, 43))
    truncated = Definition(ended, frozenset({(5, 19)}), made, frozenset({"base"}))
    assert truncated.does_to((5, 19)) == "TRUNCATE"
    assert replace(truncated, spaces=frozenset({"pg_tblspc/9"})).does_to((5, 19)) == "rewrite", "moved"
    assert trace([truncated], (5, 19), {(5, 42)}) == {(5, 42), (5, 32)}


def test_a_database_that_a_restore_replaced_in_the_window_is_told_apart_from_the_live_one(cluster: Cluster) -> None:
    accounts(cluster)
    backup_cluster.fn(NAME)
    emptied = transaction(
        cluster, "TRUNCATE accounts", "INSERT INTO accounts SELECT g, g FROM generate_series(1, 100) g"
    )
    bug = transaction(cluster, "DELETE FROM accounts WHERE id > 90")
    backup_database.fn(NAME)
    aside = restore_database.fn(NAME, confirm=NAME).facts["old database"].removeprefix("kept as ")
    live = transaction(cluster, "DELETE FROM accounts WHERE id > 80")
    cluster.sql("postgres", "DELETE FROM accounts WHERE id <= 5", database=aside)
    report = find_transaction.fn(NAME, "accounts")
    tables = in_tables(report)
    then, copy = f"public.accounts in {aside}", "public.accounts before the last swap"
    assert [tables[xid] for xid in (emptied, bug, live)] == [{then}, {then}, {"public.accounts"}]
    assert sorted(str(tables[xid]) for xid in tables.keys() - {emptied, bug, live}) == [str({copy}), str({then})]
    assert f"the largest is {emptied} (TRUNCATE)" in report.outcome, "not what the restore did to its copy"
    assert f"3 of 5 transactions: {aside}" in hints(report)["changes in a database that is not live"]

    discard_superseded.fn(NAME, keep=0, confirm=NAME)
    report = find_transaction.fn(NAME, "accounts")
    assert in_tables(report).keys() >= {emptied, bug, live}, "the base backup knows the table of then"
    assert in_tables(report)[live] == {"public.accounts"}
    for xid in (emptied, bug):
        assert "had this name before" in str(in_tables(report)[xid])
