"""Writes that a recovery left behind: found by primary key, reviewed, written back."""

from __future__ import annotations

import stat
import tracemalloc
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.restore import restore_database
from flows.database.undo_restore import undo_restore
from flows.recovery.forensics.salvage import salvage_writes
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError
from runbook.report import Report, Status
from tests.database.backup.test_backup import run
from tests.database.conftest import NAME, Trial, trial
from tests.fixtures.postgres.clusters import NAME as PAIR
from tests.fixtures.postgres.clusters import Cluster
from tests.fixtures.reports import values as findings

__all__ = ["trial"]  # the fixture

ORDERS = """
SET ROLE grc_user;
CREATE TABLE orders (id bigserial PRIMARY KEY, person bigint REFERENCES people, parent bigint REFERENCES orders, note text);
INSERT INTO orders (person, note) SELECT g, 'n' || g FROM generate_series(1, 50) g;
CREATE TABLE pairs (a text, b int, v numeric, PRIMARY KEY (b, a)) PARTITION BY RANGE (b);
CREATE TABLE pairs_low PARTITION OF pairs FOR VALUES FROM (0) TO (100);
CREATE TABLE pairs_high PARTITION OF pairs FOR VALUES FROM (100) TO (1000);
INSERT INTO pairs SELECT 'k' || g % 3, g, g FROM generate_series(1, 150) g;
"""
LATE = r"""
INSERT INTO people (name, mood, tags, doc, raw, place, price, wait, t)
SELECT E'late\n\t\'%s" \\ ' || g, 'ok', ARRAY[E'x\ny', NULL, ''], '{"a": "\n"}', '\x0a00', point(1, 2), 3::money, '1 mon', ''
FROM generate_series(1, 10) g;
INSERT INTO orders (id, person, parent, note) VALUES (60, 2001, 61, 'child before its parent'), (61, 2002, NULL, NULL);
INSERT INTO pairs VALUES ('new', 5, 1.50), ('new', 500, 2);
UPDATE people SET share = 1.5 WHERE id = 7;
UPDATE people SET name = 'late' WHERE id = 8;
UPDATE pairs SET v = -1 WHERE b = 120;
INSERT INTO answers VALUES (1, '2026-01-21', 'nobody can match it')
"""
PEOPLE = "SELECT p::text FROM people p WHERE id = 7 OR id > 2000 ORDER BY id"


def counts(report: Report) -> dict[str, tuple[str, ...]]:
    """By table: only in the source, only live, differing, conflicts, INSERTs, UPDATEs."""
    (found,) = [one.rows for one in report.evidence if one.name == "Rows by primary key"]
    return {row[0]: row[1:] for row in found if set(row[1:]) != {"0"}}


@pytest.fixture
def left_behind(trial: Trial) -> str:
    """A restore that left writes behind; the name of the database that has them."""
    trial.sql(ORDERS)
    backup_database.fn(NAME)
    trial.sql(LATE)
    restore_database.fn(NAME, confirm=NAME)
    (kept,) = [name for name in trial.databases() if name.startswith(f"{trial.database}__old_")]
    return kept


def test_what_a_restore_left_behind_comes_back_in_every_type(trial: Trial, left_behind: str) -> None:
    trial.sql("UPDATE people SET name = 'live' WHERE id = 8; INSERT INTO \"Empty Table\" VALUES (1)")
    plan = salvage_writes.fn(NAME)
    assert plan.status is Status.PLANNED
    assert counts(plan) == {
        "public.people": ("10", "0", "2", "1", "10", "1"),
        "public.orders": ("2", "0", "0", "0", "2", "0"),
        "public.pairs": ("2", "0", "1", "0", "2", "1"),
        'public."Empty Table"': ("0", "1", "0", "0", "0", "0"),
    }
    assert "public.answers" in findings(plan)["tables that were not compared"]
    assert trial.sql("SELECT count(*) FROM people") == [(2000,)], "a plan changes nothing"
    place = Path(plan.facts["SQL to review"]).parent
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert plan.path
    assert "late" not in plan.path.read_text(), "nobody's data in a report"
    assert "late" in (place / "salvage.sql").read_text()
    done = salvage_writes.fn(NAME, reviewed=str(plan.pins["reviewed"]), confirm=NAME)
    assert done.status is Status.WARN
    assert "14 rows inserted and 2 updated" in done.outcome
    assert trial.sql(PEOPLE) == trial.sql(PEOPLE, database=left_behind)
    for table in ("orders", "pairs"):
        rows = f"SELECT t::text FROM {table} t ORDER BY 1"
        assert trial.sql(rows) == trial.sql(rows, database=left_behind)
    assert trial.sql("SELECT name, t FROM people WHERE id = 8") == [("live", "touched")], "a conflict stays"
    assert trial.sql("SELECT nextval('people_id_seq') > 2010, nextval('orders_id_seq') > 61") == [(True, True)]
    assert "applied already" in salvage_writes.fn(NAME, reviewed=str(plan.pins["reviewed"]), confirm=NAME).outcome
    again = salvage_writes.fn(NAME, confirm=NAME)
    assert again.outcome == "no row has to be written"
    assert counts(again)["public.people"] == ("0", "0", "1", "1", "0", "0")
    forced = salvage_writes.fn(NAME, tables=("people",), differing="overwrite", confirm=NAME)
    assert "0 rows inserted and 1 updated" in forced.outcome
    assert trial.sql("SELECT name FROM people WHERE id = 8") == [("late",)]


def test_what_is_written_after_the_comparison_is_not_overwritten(trial: Trial, left_behind: str) -> None:
    plan = salvage_writes.fn(NAME, tables=("people", "pairs"))
    trial.sql(
        "UPDATE people SET share = 99 WHERE id = 7; INSERT INTO people (id, name) VALUES (2001, 'somebody else');"
        "UPDATE pairs SET v = 0 WHERE b = 120"
    )
    done = salvage_writes.fn(NAME, reviewed=str(plan.pins["reviewed"]), confirm=NAME)
    assert findings(done)["statements without an effect"].startswith("3,")
    assert "11 rows inserted and 1 updated" in done.outcome
    assert trial.sql("SELECT share::int FROM people WHERE id = 7") == [(99,)]
    assert trial.sql("SELECT name FROM people WHERE id = 2001") == [("somebody else",)]
    undo_restore.fn(NAME, confirm=NAME)
    back = counts(salvage_writes.fn(NAME, tables=("people",)))["public.people"]
    assert (back[2], back[3], back[5]) == ("2", "2", "0"), "what an undo put aside may be older than what is live"
    assert left_behind


def test_refused_with_nothing_changed(trial: Trial, left_behind: str) -> None:
    """A row without its parent; a file that was changed after it was read; a source, a table, a name that is not there."""
    rows = "SELECT count(*) FROM orders"
    with pytest.raises(OpsError, match="reference missing rows.*add public.people to tables"):
        salvage_writes.fn(NAME, tables=("orders",), confirm=NAME)
    assert trial.sql(rows) == [(50,)]
    plan = salvage_writes.fn(NAME)
    path = Path(plan.facts["SQL to review"])
    path.write_text(path.read_text().replace("child before", "child  before"))
    with pytest.raises(OpsError, match="was changed since"):
        salvage_writes.fn(NAME, reviewed=str(plan.pins["reviewed"]), confirm=NAME)
    assert trial.sql(rows) == [(50,)]
    for wrong, said in (
        ({"source": "nowhere"}, f"newest first: {left_behind}"),
        ({"tables": ("peple",)}, "no table"),
        ({"reviewed": "x-y"}, "no comparison"),
    ):
        with pytest.raises(OpsError, match=said):
            salvage_writes.fn(**{"environment": NAME, **wrong})


def test_killed_anywhere_and_launched_again(trial: Trial, left_behind: str) -> None:
    plan = salvage_writes.fn(NAME)
    name = plan.pins["reviewed"]
    call = f"flows.recovery.forensics.salvage.salvage_writes dict(environment={NAME!r}, reviewed={name!r}, confirm={NAME!r})"
    for point, there in (("salvage: before commit", 50), ("salvage: after commit", 52)):
        assert run(call, OPS_FAILPOINT=point).returncode == -9, point
        assert trial.sql("SELECT count(*) FROM orders") == [(there,)], point
    done = salvage_writes.fn(NAME, reviewed=str(name), confirm=NAME)
    assert done.status is Status.WARN
    assert "applied before" in findings(done)["statements without an effect"]
    assert salvage_writes.fn(NAME, confirm=NAME).outcome == "no row has to be written"
    assert trial.sql(PEOPLE) == trial.sql(PEOPLE, database=left_behind)


@pytest.mark.soak
def test_memory_does_not_grow_with_the_table(trial: Trial) -> None:
    trial.sql(
        "CREATE TABLE wide (id int PRIMARY KEY, body text);"
        "INSERT INTO wide SELECT g, repeat('x', 1000) FROM generate_series(1, 8000) g"
    )
    kept = f"{trial.database}__old_20260101_000000"
    trial.sql(f'CREATE DATABASE "{kept}" TEMPLATE "{trial.database}"', database="postgres")
    trial.sql("DELETE FROM wide WHERE id % 2 = 0")
    tracemalloc.start()
    plan = salvage_writes.fn(NAME, tables=("wide",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts(plan) == {"public.wide": ("4000", "0", "0", "0", "4000", "0")}
    assert peak < 6e6, "8 MB differ"


def test_what_a_recovery_to_a_point_in_time_left_behind_is_in_the_kept_directory(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
    cluster.sql("postgres", "INSERT INTO accounts SELECT g, g FROM generate_series(1, 100) g")
    backup_cluster.fn(PAIR)
    with cluster.connect("postgres") as connection:
        connection.execute("UPDATE accounts SET balance = 0 WHERE id <= 50")
        row = connection.execute("SELECT xmin::text FROM accounts WHERE id = 1").fetchone()
    assert row
    cluster.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")
    cluster.sql("postgres", "UPDATE accounts SET balance = -90 WHERE id = 90")
    restore_to_point.fn(PAIR, by="before_transaction", target=row[0], confirm=PAIR)
    cluster.sql("postgres", "UPDATE accounts SET balance = 7 WHERE id = 3")
    unknown = salvage_writes.fn(PAIR)
    assert counts(unknown) == {"public.accounts": ("1", "0", "51", "51", "1", "0")}, "nobody can say who was later"
    told = salvage_writes.fn(PAIR, since_transaction=int(row[0]))
    assert counts(told) == {"public.accounts": ("1", "0", "51", "1", "1", "50")}
    assert salvage_writes.fn(PAIR, reviewed=str(unknown.pins["reviewed"]), confirm=PAIR).status is Status.WARN
    assert cluster.sql("postgres", "SELECT count(*), min(balance) FROM accounts") == [(101, 1)]
    (kept,) = cluster.node("postgres").data.parent.glob("data.superseded_*")
    assert (kept / "PG_VERSION").exists()
    assert not (cluster.node("postgres").data.parent / "data.salvaging").exists()
