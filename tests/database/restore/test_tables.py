"""restore_tables: single tables brought back into the live database, while others read and write it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from flows.database.backup import backup_database
from flows.database.superseded import discard_superseded
from flows.database.tables import restore_tables, undo_restore_tables
from runbook import shell
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import manifest
from tasks.postgres.content import pinned_session
from tasks.postgres.content.content import content_of, read_counts
from tasks.postgres.restore.staged_copy import Copy, content_in, rename_copy
from tasks.postgres.tables import swap
from tasks.postgres.tables.kept import find_superseded_tables
from tasks.postgres.tables.pairs import match_tables
from tasks.postgres.tables.scratch import drop_tables_scratch, tables_scratch_name
from tests.database.backup.test_backup import newest, run
from tests.database.conftest import NAME, Trial
from tests.database.restore.test_odd_databases import RATED, values
from tests.database.restore.test_restore import flip, newest_path, reseal
from tests.fixtures import forked
from tests.fixtures.servers import PATIENT

GOOD = (Status.OK, Status.WARN)
FLOW = "flows.database.tables.restore_tables"


def restore(*tables: str, **parameters: Any) -> Report:
    return restore_tables.fn(NAME, list(tables), confirm=NAME, **parameters)


def sums(trial: Trial) -> dict[str, tuple[int, str]]:
    """Rows and hash of every table but those that keep old rows."""
    tables = content_of(trial.environment.postgres, trial.database).tables
    return {name: (one.rows, one.hash) for name, one in tables.items() if "_old_" not in name}


def test_chosen_tables_come_back_and_nothing_else_changes(trial: Trial) -> None:
    """Enums, generated columns, row security, triggers, partitions by range and by the hash of an enum, odd names."""
    trial.sql("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO grc_user, pg_monitor")
    trial.sql("ALTER TABLE people FORCE ROW LEVEL SECURITY")
    backup_database.fn(NAME)
    before = sums(trial)
    oid, identity = trial.oid(), trial.sql("SELECT 'people'::regclass::oid, pg_relation_filenode('people')")
    trial.sql(
        "DELETE FROM answers WHERE at < '2026-02-01'; INSERT INTO answers VALUES (7, '2026-03-01', 'new');"
        "UPDATE people SET name = 'X', mood = NULL WHERE id < 100; DELETE FROM by_mood WHERE mood = 'ok';"
        "INSERT INTO by_mood VALUES ('happy', 4711); INSERT INTO notes VALUES (5, NULL);"
        'DELETE FROM "Über tisch; DROP" WHERE id > 20; INSERT INTO "Empty Table" VALUES (1), (2)'
    )
    now = sums(trial)
    names = ("public.people", "answers", '"Über tisch; DROP"', "Empty Table", 'public."Empty Table"', " by_mood ")
    report = restore(*names)
    assert report.status in GOOD
    assert sums(trial) == {**before, "public.notes": now["public.notes"]}
    assert now["public.notes"] != before["public.notes"]
    assert (trial.oid(), trial.sql("SELECT 'people'::regclass::oid, pg_relation_filenode('people')")) == (oid, identity)
    assert trial.sql("SELECT count(*) FROM people WHERE t = 'touched'") == [(0,)]
    assert trial.sql("SELECT count(*) FROM people WHERE kind = 'people'::regclass") == [(2000,)]
    assert trial.databases().count(tables_scratch_name(trial.database)) == 0

    kept = {one.table: one for one in find_superseded_tables(trial.environment.postgres)}
    assert set(kept) == {
        "public.people",
        "public.answers",
        "public.by_mood",
        'public."Empty Table"',
        'public."Über tisch; DROP"',
    }
    rights = "SELECT relacl::text, pg_get_userbyid(relowner), relpersistence::text FROM pg_class WHERE oid = %s"
    assert trial.sql(rights, kept["public.people"].oid)[0][1:] == ("grc_user", "p")
    assert (
        trial.sql(
            "SELECT r.rolname FROM pg_class c, aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee WHERE c.oid = %s "
            "AND a.grantee <> c.relowner",
            kept["public.people"].oid,
        )
        == []
    )
    assert trial.sql("SELECT count(*) FROM public." + kept["public.people"].relation + " WHERE name = 'X'") == [(99,)]
    told = {finding.name: finding for finding in report.findings}
    assert told["materialised views over these tables"].hint == "REFRESH MATERIALIZED VIEW public.moods"
    assert report.facts["triggers that do not fire"] == "touch of public.people"


def test_undo_puts_the_replaced_rows_back_and_again_forward(trial: Trial) -> None:
    backup_database.fn(NAME)
    backed_up = sums(trial)
    trial.sql("DELETE FROM answers; UPDATE people SET name = 'X' WHERE id < 100; DELETE FROM people WHERE id > 1900")
    before = sums(trial)
    restore("people", "answers")
    first = find_superseded_tables(trial.environment.postgres)[0].stamp
    assert sums(trial) == backed_up
    assert undo_restore_tables.fn(NAME).status is Status.PLANNED
    assert undo_restore_tables.fn(NAME, confirm=NAME).status in GOOD
    assert sums(trial) == before
    undo_restore_tables.fn(NAME, confirm=NAME)
    assert sums(trial) == backed_up
    undo_restore_tables.fn(NAME, kept=first, confirm=NAME)
    assert sums(trial) == before
    with pytest.raises(RunbookFailed, match=f"no kept rows of “20200101_000000”.*newest first: .*{first}"):
        undo_restore_tables.fn(NAME, kept="20200101_000000", confirm=NAME)


def test_a_plan_changes_nothing(trial: Trial) -> None:
    backup_database.fn(NAME)
    trial.sql("DELETE FROM people WHERE id > 1990 AND id NOT IN (SELECT person FROM answers)")
    before, databases = sums(trial), trial.databases()
    report = restore_tables.fn(NAME, ["people", "by_mood"])
    assert report.status is Status.PLANNED
    assert [step.step for step in report.plan_steps] == [
        "restore rows",
        "prove the rows",
        "replace rows",
        "replace rows",
        "VACUUM (ANALYZE)",
    ]
    replaced = report.plan_steps[2:4]
    assert [step.detail.split(";")[0].split(" of ")[0] for step in replaced] == [
        "public.people: 1,990 live rows → 2,000 rows",
        "public.by_mood: 300 live rows → 300 rows",
    ]
    assert all(step.bytes > 0 and step.seconds > 0 for step in replaced)
    with pytest.raises(NotConfirmed):
        restore_tables.fn(NAME, ["people"], confirm="yes")
    assert (sums(trial), trial.databases()) == (before, databases)


NAMES = {
    "peple": "there is no table “peple” in the backup.*did you mean public.people",
    "Answers": "did you mean public.answers",
    "answers_2026_01": "answers_2026_01 is a partition of public.answers.*name public.answers",
    "happy": "public.happy is a view",
    "moods": "public.moods is a materialised view",
    "Ticket Numbers": 'public."Ticket Numbers" is a sequence',
    "large objects": "there is no table “large objects”",
    "": "there is no table “”",
}


def test_names_that_are_no_table_are_refused_clearly(trial: Trial) -> None:
    """Of the database itself: its schema is the backup's."""
    postgres = trial.environment.postgres
    trial.sql("CREATE SCHEMA other; CREATE TABLE other.answers (id int); CREATE TABLE other.lonely (id int)")
    for name, said in {**NAMES, "answers": "is in several schemas: other.answers, public.answers"}.items():
        with pytest.raises(OpsError, match=said):
            match_tables(postgres, trial.database, [name])
    typed = [
        "lonely",
        "by_mood",
        "public.by_mood",
        "Empty Table",
        '"Empty Table"',
        'public."Empty Table"',
        "Über tisch; DROP",
    ]
    found = [pair.wanted.name for pair in match_tables(postgres, trial.database, typed)]
    assert found == ["other.lonely", "public.by_mood", 'public."Empty Table"', 'public."Über tisch; DROP"']
    with pytest.raises(RunbookFailed, match="no table was named"):
        restore(" ")


# A change of the live database, the tables to restore, what is said, and how to take the change back.
REFUSED = {
    "a column added": (
        "ALTER TABLE by_mood ADD x int",
        "by_mood",
        "column x was added since.*into=…. and copy",
        "ALTER TABLE by_mood DROP x",
    ),
    "a column dropped": (
        'ALTER TABLE "Über tisch; DROP" RENAME "SELECT" TO other',
        "Über tisch; DROP",
        "column SELECT was dropped since",
        'ALTER TABLE "Über tisch; DROP" RENAME other TO "SELECT"',
    ),
    "a column of another type": (
        "ALTER TABLE by_mood ALTER n TYPE bigint",
        "by_mood",
        "column n was integer, is bigint",
        "ALTER TABLE by_mood ALTER n TYPE int",
    ),
    "a column generated otherwise": (
        "ALTER TABLE people DROP shout, ADD shout text GENERATED ALWAYS AS (lower(name)) STORED",
        "people",
        "column shout was text generated as upper.*is text generated as lower",
        "ALTER TABLE people DROP shout, ADD shout text GENERATED ALWAYS AS (upper(name)) STORED",
    ),
    "an inheritance": ("SELECT 1", "notes", "public.long_notes inherits from public.notes", "SELECT 1"),
    "a table that is gone": (
        "ALTER TABLE by_mood RENAME TO was_by_mood",
        "by_mood",
        "has no such table: public.by_mood.*create it empty",
        "ALTER TABLE was_by_mood RENAME TO by_mood",
    ),
    "a check that the rows break": (
        "ALTER TABLE by_mood ADD CONSTRAINT small CHECK (n < 10) NOT VALID",
        "by_mood",
        r'refuses rows of the backup: new row for relation "by_mood_\d" violates check constraint "small";',
        "ALTER TABLE by_mood DROP CONSTRAINT small",
    ),
    "a partition that is gone": (
        "ALTER TABLE answers DETACH PARTITION answers_rest",
        "answers",
        "refuses rows of the backup: no partition of relation(?!.*contains)",
        "ALTER TABLE answers ATTACH PARTITION answers_rest DEFAULT",
    ),
    "a trigger that fires always": (
        "ALTER TABLE people ENABLE ALWAYS TRIGGER touch",
        "people",
        "trigger touch of public.people always fires",
        "ALTER TABLE people ENABLE TRIGGER touch",
    ),
    "a rule": (
        "CREATE RULE no AS ON DELETE TO by_mood DO INSTEAD NOTHING",
        "by_mood",
        "rule no of public.by_mood",
        "DROP RULE no ON by_mood",
    ),
    "a deferrable constraint": (
        'ALTER TABLE "Empty Table" ADD CONSTRAINT once UNIQUE ("Key Column") DEFERRABLE',
        "Empty Table",
        "newer than the backup: Empty Table once",
        'ALTER TABLE "Empty Table" DROP CONSTRAINT once',
    ),
    "deletions that nobody can be told": (
        "CREATE PUBLICATION everything FOR ALL TABLES",
        "by_mood",
        "has no replica identity",
        "DROP PUBLICATION everything",
    ),
    "rows that are referenced by new ones": (
        "INSERT INTO people (id, name) VALUES (5000, 'x'), (5001, 'y');"
        "INSERT INTO answers VALUES (5000, '2026-01-25', 'x'), (5001, '2026-01-25', 'x'), (NULL, '2026-01-25', 'x')",
        "people",
        r"answers_person_fkey on public.answers: 2 rows, such as \(5000\), \(5001\).*add public.answers to",
        "DELETE FROM answers",
    ),
    "rows that reference what is gone": (
        "DELETE FROM people WHERE id = 77",
        "answers",
        r"answers_person_fkey on public.answers: 1 rows, such as \(77\).*add public.people to tables",
        "SELECT 1",
    ),
}


def test_what_cannot_be_restored_is_refused_and_nothing_changes(trial: Trial) -> None:
    backup_database.fn(NAME)
    for kind, (change, table, said, back) in REFUSED.items():
        trial.sql(change)
        before, databases = sums(trial), trial.databases()
        with pytest.raises(RunbookFailed, match=said) as caught:
            restore(table)
        assert caught.value.report.sentence().count("Next: ") == 1, kind
        assert (sums(trial), trial.databases()) == (before, databases), kind
        assert find_superseded_tables(trial.environment.postgres) == (), kind
        trial.sql(back)


def test_deletions_that_nobody_can_be_told_are_judged_before_the_plan(trial: Trial) -> None:
    backup_database.fn(NAME)
    said = "public.by_mood_1 is published with its deletions but has no replica identity"
    for publishes in ("FOR TABLE by_mood", "FOR TABLES IN SCHEMA public WITH (publish_via_partition_root)"):
        trial.sql(f"CREATE PUBLICATION part_of_it {publishes}")
        with pytest.raises(RunbookFailed, match=said):
            restore_tables.fn(NAME, ["by_mood"])
        trial.sql("DROP PUBLICATION part_of_it")
    trial.sql(
        "CREATE PUBLICATION part_of_it FOR TABLE by_mood WITH (publish = 'insert'); CREATE PUBLICATION own FOR TABLE people"
    )
    for tables in (["by_mood"], ["people"]):
        assert restore_tables.fn(NAME, tables).status is Status.PLANNED
    trial.sql("ALTER PUBLICATION part_of_it SET (publish = 'delete')")
    trial.sql("ALTER TABLE by_mood_0 REPLICA IDENTITY FULL; ALTER TABLE by_mood_1 REPLICA IDENTITY FULL")
    assert restore_tables.fn(NAME, ["by_mood"]).status is Status.PLANNED


# A table, the rows that a backup holds, those that are live then, and a constraint that only the former keep.
DEFERRED = {
    "unique": ("(x int)", "(1), (2), (NULL), (NULL)", "(1), (1)", "UNIQUE (x)"),
    "unique with NULL": ("(x int)", "(1), (NULL)", "(NULL), (NULL)", "UNIQUE NULLS NOT DISTINCT (x)"),
    "exclusion": ("(x int4range)", "('[1,2)'), ('[2,3)')", "('[1,3)'), ('[2,3)')", "EXCLUDE USING gist (x WITH &&)"),
    "partitioned": ("(x int) PARTITION BY RANGE (x)", "(1), (2)", "(2), (2)", "PRIMARY KEY (x)"),
}


@pytest.mark.parametrize("kind", DEFERRED)
def test_a_deferrable_constraint_is_not_broken_on_the_way_back(trial: Trial, kind: str) -> None:
    columns, first, second, constraint = DEFERRED[kind]
    trial.sql(f'SET ROLE grc_user; CREATE TABLE "odd codes" {columns}')
    if kind == "partitioned":
        trial.sql('CREATE TABLE part PARTITION OF "odd codes" DEFAULT')
    trial.sql(f'INSERT INTO "odd codes" VALUES {first}')
    backup_database.fn(NAME)
    trial.sql(f'DELETE FROM "odd codes"; INSERT INTO "odd codes" VALUES {second}')
    restore("odd codes")
    trial.sql(f'ALTER TABLE "odd codes" ADD CONSTRAINT once {constraint} DEFERRABLE INITIALLY DEFERRED')
    before = sums(trial)
    with pytest.raises(RunbookFailed, match="would violate the deferrable constraint once of"):
        undo_restore_tables.fn(NAME, confirm=NAME)
    assert sums(trial) == before
    assert len(find_superseded_tables(trial.environment.postgres)) == 1
    trial.sql('ALTER TABLE "odd codes" DROP CONSTRAINT once')
    undo_restore_tables.fn(NAME, confirm=NAME)
    trial.sql('DELETE FROM "odd codes"')
    trial.sql(f'ALTER TABLE "odd codes" ADD CONSTRAINT once {constraint} DEFERRABLE')
    first_kept = find_superseded_tables(trial.environment.postgres)[0].stamp
    assert undo_restore_tables.fn(NAME, kept=first_kept, confirm=NAME).status in GOOD, "rows that keep it go back"


def test_a_prepared_transaction_on_the_tables_is_refused_in_the_plan(trial: Trial) -> None:
    """It holds their locks for as long as nobody ends it."""
    backup_database.fn(NAME)
    trial.sql("DELETE FROM answers")
    restore("answers")
    trial.sql("BEGIN; UPDATE people SET t = 'prepared' WHERE id = 1; PREPARE TRANSACTION 'tx-4711'")
    assert restore_tables.fn(NAME, ["answers"]).status is Status.PLANNED, "of another table"
    trial.sql("BEGIN; DELETE FROM answers; PREPARE TRANSACTION 'tx-4712'")
    refused = "prepared transaction tx-4712 has locked rows of public.answers: COMMIT PREPARED"
    with pytest.raises(RunbookFailed, match=refused):
        restore_tables.fn(NAME, ["answers"])
    with pytest.raises(RunbookFailed, match=refused):
        undo_restore_tables.fn(NAME)
    trial.sql("ROLLBACK PREPARED 'tx-4712'")
    trial.sql("ROLLBACK PREPARED 'tx-4711'")
    assert undo_restore_tables.fn(NAME, confirm=NAME).status in GOOD


def test_what_postgresql_refuses_is_one_sentence(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    postgres = trial.environment.postgres
    monkeypatch.setitem(pinned_session.PINNED, "lock_timeout", "100ms")
    with trial.server.connect(trial.database) as client, client.transaction():
        client.execute("LOCK TABLE people")
        with pytest.raises(OpsError, match=r"the lock was not available within 60 s: .*lock timeout"):
            match_tables.work(postgres, trial.database, ["people"])
        with pytest.raises(OpsError, match="the lock was not available"):
            read_counts.work(postgres, trial.database)

    scratch = tables_scratch_name(trial.database)
    trial.server.create_database(scratch)
    trial.sql("CREATE TABLE t (x int); BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'p'", database=scratch)
    with pytest.raises(OpsError, match="PostgreSQL refuses: .*prepared transaction"):
        drop_tables_scratch.work(postgres)
    trial.sql("ROLLBACK PREPARED 'p'", database=scratch)

    with trial.server.connect(scratch), pytest.raises(OpsError, match="a session uses .* cannot be renamed to other"):
        rename_copy.work(postgres, "other", Copy(scratch, 0))
    drop_tables_scratch.work(postgres)
    assert scratch not in trial.databases()


def test_tables_that_reference_each_other_come_back_together(trial: Trial) -> None:
    backup_database.fn(NAME)
    before = sums(trial)
    trial.sql("DELETE FROM answers; DELETE FROM people WHERE id < 1500; SELECT setval('people_id_seq', 10)")
    report = restore("answers", "people")
    assert sums(trial) == before
    assert report.facts["sequences advanced"] == '"public"."people_id_seq"'
    assert trial.sql("SELECT nextval('people_id_seq')") == [(2001,)]
    trial.sql("SELECT setval('people_id_seq', 9000)")
    restore("answers", "people")
    assert trial.sql("SELECT last_value FROM people_id_seq") == [(9000,)], "never back"


def test_rows_that_are_not_the_manifest_s_leave_the_live_ones(trial: Trial) -> None:
    """The manifest of the morning beside the dump of the evening, sealed by somebody who knows how to."""
    backup_database.fn(NAME)
    morning = content_in(newest(trial)).model_dump(mode="json")
    trial.sql("UPDATE by_mood SET n = n + 1 WHERE n = 5")
    backup_database.fn(NAME)
    reseal(newest_path(trial), lambda m: m.update(content=morning))
    trial.sql("DELETE FROM by_mood")
    with pytest.raises(RunbookFailed, match="rows equal to the backup: not equal: public.by_mood"):
        restore("by_mood")
    assert trial.sql("SELECT count(*) FROM by_mood") == [(0,)]
    assert newest(trial).failed, "the next plan takes the one before"
    for path in (newest_path(trial) / "dump").glob("*.dat*"):
        flip(path)
    with pytest.raises(RunbookFailed, match="files of "):
        restore("by_mood", backup=newest(trial).name)


def test_live_rows_that_would_be_others_are_never_committed(trial: Trial) -> None:
    """A generated column whose function was replaced since: the definition is the same, its values are not."""
    trial.sql("CREATE FUNCTION public.twice(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 * 2'")
    trial.sql("CREATE TABLE doubled (n int, d int GENERATED ALWAYS AS (public.twice(n)) STORED)")
    trial.sql("INSERT INTO doubled SELECT g FROM generate_series(1, 10) g")
    backup_database.fn(NAME)
    trial.sql("CREATE OR REPLACE FUNCTION public.twice(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 * 3'")
    trial.sql("DELETE FROM doubled WHERE n > 5")
    with pytest.raises(RunbookFailed, match="public.doubled would have 10 rows that differ from the 10 expected ones"):
        restore("doubled")
    assert trial.sql("SELECT count(*), sum(d) FROM doubled") == [(5, 30)]
    assert find_superseded_tables(trial.environment.postgres) == ()


def test_a_backup_of_chosen_tables_brings_back_those_and_a_script_none(trial: Trial) -> None:
    before = sums(trial)
    chosen = backup_database.fn(NAME, kind="tables", tables=["by_mood", "answers"]).facts["backup"]
    script = backup_database.fn(NAME, kind="sql").facts["backup"]
    trial.sql("DELETE FROM by_mood; DELETE FROM answers WHERE at < '2026-02-01'")
    with pytest.raises(RunbookFailed, match="the rows of public.people are not in this backup"):
        restore("people", backup=chosen)
    with pytest.raises(RunbookFailed, match="is a script, which cannot restore single tables"):
        restore("by_mood", backup=script)
    assert restore("by_mood", "answers", backup=chosen).status in GOOD
    assert sums(trial) == before


class Beside:
    """Sessions of others, at a point of the exchange."""

    def __init__(self, trial: Trial, point: str, tries: dict[str, str]) -> None:
        self.trial, self.point, self.tries = trial, point, tries
        self.seen: dict[str, object] = {}

    def __call__(self, name: str) -> None:
        if name == self.point:
            for what, statement in self.tries.items():
                with self.trial.server.connect(self.trial.database) as other:
                    other.execute("SET lock_timeout = '150ms'")
                    try:
                        cursor = other.execute(statement.encode())
                        self.seen[what] = cursor.fetchone() if cursor.description else "done"
                    except psycopg.errors.LockNotAvailable:
                        self.seen[what] = "waits"


def test_readers_do_not_wait_and_writers_do(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    backup_database.fn(NAME)
    trial.sql("DELETE FROM answers WHERE at < '2026-02-01'; DELETE FROM by_mood")
    tries = {
        "a reader": "SELECT count(*) FROM answers",
        "a reader through a view": "SELECT count(*) FROM happy",
        "a reader of a partition": "SELECT count(*) FROM answers_2026_01",
        "a writer": "INSERT INTO answers VALUES (1, '2026-01-25', 'x')",
        "a writer to a partition": "DELETE FROM answers_rest",
        "a reader that locks rows": "SELECT * FROM answers LIMIT 1 FOR UPDATE",
        "who takes away what is referenced": "DELETE FROM people WHERE id = 2000",
        "a reader of what is referenced": "SELECT count(*) FROM people",
        "a writer elsewhere": "INSERT INTO by_mood VALUES ('ok', 1)",
    }
    beside = Beside(trial, "tables: before commit", tries)
    monkeypatch.setattr(swap, "failpoint", beside)
    report = restore("answers")
    assert beside.seen == {
        "a reader": (222,),
        "a reader through a view": (667,),
        "a reader of a partition": (9,),
        "a writer": "waits",
        "a writer to a partition": "waits",
        "a reader that locks rows": "waits",
        "who takes away what is referenced": "waits",
        "a reader of what is referenced": (2000,),
        "a writer elsewhere": "done",
    }
    assert trial.sql("SELECT count(*) FROM answers") == [(500,)]
    assert float(report.facts["waiting"].split()[3]) > 0.5


def test_whoever_waits_for_the_exchange_sees_the_restored_rows(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting what a restored row references must fail, although the deletion began before that row was there."""
    backup_database.fn(NAME)
    trial.sql("DELETE FROM answers")
    said: dict[str, object] = {}

    def attempt(statement: str) -> None:
        with trial.server.connect(trial.database) as client:
            try:
                cursor = client.execute(statement.encode())
                said[statement] = cursor.fetchall() if cursor.description else "done"
            except psycopg.errors.ForeignKeyViolation as error:
                said[statement] = error.diag.constraint_name

    delete, lock = "DELETE FROM people WHERE id = 77", "SELECT body FROM answers WHERE person = 78 FOR UPDATE"
    threads = [threading.Thread(target=attempt, args=[statement]) for statement in (delete, lock)]

    def beside(name: str) -> None:
        if name == "tables: before commit":
            for thread in threads:
                thread.start()
            until(lambda: len(waiting(trial)) == 2 or said, what="both waiting", seconds=120)

    monkeypatch.setattr(swap, "failpoint", beside)
    restore("answers")
    for thread in threads:
        thread.join(120)
    assert said == {delete: "answers_person_fkey", lock: [("b77",)]}


def waiting(trial: Trial) -> list[Any]:
    return trial.server.sql(
        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'", trial.database
    )


def test_no_acknowledged_write_is_lost_unseen_under_clients(trial: Trial) -> None:
    """What clients write during the exchange is in the table that keeps the old rows, or in the live one after it."""
    backup_database.fn(NAME)
    stop, waited = threading.Event(), list[str]()
    written: list[int] = []

    def write() -> None:
        with trial.server.connect(trial.database) as client:
            while not stop.wait(0.001):
                client.execute("INSERT INTO by_mood VALUES ('sad', %s)", [100_000 + len(written)])
                written.append(100_000 + len(written))

    def read() -> None:
        with trial.server.connect(trial.database) as client:
            client.execute("SET lock_timeout = '1.5s'")
            try:
                while not stop.wait(0.002):
                    assert client.execute("SELECT count(*) FROM by_mood").fetchone()[0] >= 300  # type: ignore[index]
            except psycopg.errors.LockNotAvailable as error:
                waited.append(str(error))

    threads = [threading.Thread(target=work) for work in (write, read, read)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(written) > 50, what="writes", seconds=120)
        restore("by_mood")
        count = len(written)
        until(lambda: len(written) > count + 50, what="writes after it", seconds=120)
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    (kept,) = find_superseded_tables(trial.environment.postgres)
    rows = trial.sql(f"SELECT n FROM {kept.name} UNION ALL SELECT n FROM by_mood")
    assert sorted(n for (n,) in rows if isinstance(n, int) and n >= 100_000) == written
    assert waited == [], "two busy cores, but no lock"


def test_a_writer_that_does_not_end_is_named(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "LOCK_SECONDS", 0.2)
    backup_database.fn(NAME)
    before = sums(trial)
    with trial.server.connect(trial.database, "grc_user") as writer, writer.transaction(force_rollback=True):
        writer.execute("INSERT INTO by_mood VALUES ('ok', 1)")
        with pytest.raises(RunbookFailed, match=rf"process {writer.info.backend_pid} \(grc_user, idle in transaction"):
            restore("by_mood")
    assert sums(trial) == before


@pytest.mark.parametrize(
    "change", ["ALTER TABLE by_mood ADD x int", "DROP TABLE by_mood CASCADE; CREATE TABLE by_mood (mood mood, n int)"]
)
def test_a_table_that_changes_after_it_was_judged_is_left_alone(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    backup_database.fn(NAME)
    monkeypatch.setattr(swap, "failpoint", lambda name: trial.sql(change) if name == "tables: staged" else None)
    with pytest.raises(RunbookFailed, match="is another table than the judged one|was dropped since it was judged"):
        restore("by_mood")
    assert find_superseded_tables(trial.environment.postgres) == ()


@pytest.mark.contrib
def test_subscribers_get_the_live_rows_and_no_table_that_they_do_not_have(trial: Trial) -> None:
    backup_database.fn(NAME)
    trial.sql("CREATE PUBLICATION everything FOR ALL TABLES; DELETE FROM people WHERE id > 1990")
    trial.sql("SELECT pg_create_logical_replication_slot('tables_4711', 'test_decoding')")
    try:
        report = restore("people")
        changes = trial.sql("SELECT data FROM pg_logical_slot_get_changes('tables_4711', NULL, NULL)")
    finally:
        trial.sql("SELECT pg_drop_replication_slot('tables_4711')")
    told = [str(data).split(":")[:2] for (data,) in changes if str(data).startswith("table ")]
    assert {table for table, _ in told} == {"table public.people"}
    assert len(told) == 1990 + 2000
    assert report.facts["publications"].startswith("everything publish")
    (kept,) = find_superseded_tables(trial.environment.postgres)
    assert trial.sql("SELECT relpersistence::text FROM pg_class WHERE oid = %s", kept.oid) == [("p",)]


POINTS = ("after fill_tables", "tables: before commit", "tables: after commit")


def test_killed_anywhere_all_tables_are_old_or_all_are_new_and_the_next_run_ends_well(
    trial: Trial, tmp_path: Path
) -> None:
    backup_database.fn(NAME)
    backed_up, log = sums(trial), tmp_path / "points"
    call = f"{FLOW} dict(environment={NAME!r},tables=['people','answers'],confirm={NAME!r})"
    for point in POINTS:
        trial.sql("DELETE FROM answers WHERE body = 'b7'; UPDATE people SET name = 'X' WHERE id < 10")
        broken = sums(trial)
        assert run(call, OPS_FAILPOINT=point, OPS_FAILPOINT_LOG=str(log)).returncode == -9, point
        until(lambda: not others(trial), what="the end of the dead run's session", seconds=120)
        assert sums(trial) == (backed_up if point == "tables: after commit" else broken), point
        assert restore("people", "answers").status in GOOD, point
        assert sums(trial) == backed_up, point
        assert trial.databases().count(tables_scratch_name(trial.database)) == 0
    assert {*POINTS, "tables: staged", "tables: deleted", "tables: inserted"} <= {*log.read_text().splitlines()}
    assert len({one.stamp for one in find_superseded_tables(trial.environment.postgres)}) == len(POINTS) + 1


def others(trial: Trial) -> list[Any]:
    return trial.server.sql("SELECT pid FROM pg_stat_activity WHERE datname = %s", trial.database)


@pytest.mark.parametrize("point", ["tables: inserted", "tables: after commit"])
def test_a_server_that_dies_in_the_middle(trial: Trial, tmp_path: Path, point: str) -> None:
    backup_database.fn(NAME)
    backed_up = sums(trial)
    trial.sql("DELETE FROM by_mood WHERE mood = 'ok'")
    broken, log = sums(trial), tmp_path / "points"
    child = forked.launch(
        [
            "-c",
            f"{PATIENT}from {FLOW.rpartition('.')[0]} import restore_tables;"
            f"restore_tables.fn({NAME!r}, ['by_mood'], confirm={NAME!r})",
        ],
        {**os.environ, "OPS_FAILPOINT": f"{point}:pause", "OPS_FAILPOINT_LOG": str(log)},
    )
    paused = psutil.Process(child.pid)
    until(lambda: paused.status() == psutil.STATUS_STOPPED or child.poll() is not None, what=point, seconds=600)
    assert point in log.read_text()
    trial.server.stop(signal.SIGQUIT)
    child.send_signal(signal.SIGCONT)
    code = child.wait(600)
    trial.server.start()
    told = json.loads(max(trial.reports.glob("*restore-tables.json")).read_text())
    if point == "tables: after commit":
        assert (code, sums(trial)) == (0, backed_up), child.communicate()[1][-3000:]
        assert any(finding["name"].startswith("vacuum") and finding["status"] == "WARN" for finding in told["findings"])
    else:
        assert (code != 0, sums(trial)) == (True, broken)
        state = next(finding for finding in told["findings"] if finding["name"] == "state of the system")
        assert state["value"].startswith("the live tables are unchanged, unless a table by_mood__old_")
        assert "check for tables named …_old_" in told["findings"][-2]["hint"]
    assert restore("by_mood").status in GOOD
    assert sums(trial) == backed_up


def test_kept_rows_are_discarded_with_a_permit_but_the_newest(trial: Trial) -> None:
    backup_database.fn(NAME)
    for _ in range(2):
        restore_tables.fn(NAME, tables=["by_mood"], confirm=NAME)
    newest, oldest = (old.name for old in find_superseded_tables(trial.environment.postgres))
    plan = discard_superseded.fn(NAME, keep=1)
    assert plan.status is Status.PLANNED
    assert [step.detail for step in plan.plan_steps] == [oldest]
    discard_superseded.fn(NAME, keep=1, confirm=NAME)
    assert [old.name for old in find_superseded_tables(trial.environment.postgres)] == [newest]
    assert trial.sql("SELECT count(*) FROM by_mood") == [(300,)]


def test_what_was_replaced_together_is_put_back_or_discarded_together(trial: Trial) -> None:
    backup_database.fn(NAME)
    restore("people", "answers")
    restore("people")
    kept = find_superseded_tables(trial.environment.postgres)
    both = [old for old in kept if len(old.together) == 2]
    assert {old.table for old in both} == set(both[0].together) == {"public.people", "public.answers"}
    assert discard_superseded.fn(NAME).status is Status.OK, "answers has no newer one, so both stay"
    [plan] = discard_superseded.fn(NAME, keep=0).plan_steps[1:]
    assert plan.detail == ", ".join(old.name for old in both)

    trial.sql(f"DROP TABLE {next(old.name for old in both if old.table == 'public.answers')}")
    with pytest.raises(RunbookFailed, match="are incomplete: the rows of public.answers are missing"):
        undo_restore_tables.fn(NAME, kept=both[0].stamp, confirm=NAME)
    planned = undo_restore_tables.fn(NAME)
    assert planned.pins["kept"] == kept[0].stamp
    discard_superseded.fn(NAME, keep=0, confirm=NAME)
    assert find_superseded_tables(trial.environment.postgres) == ()


def files_of(trial: Trial, table: str) -> list[Path]:
    """The files of the newest backup that hold a table's rows."""
    dump = newest_path(trial) / "dump"
    listed = shell.run([trial.environment.postgres.program("pg_restore"), "--list", dump]).stdout
    numbers = re.findall(rf"^(\d+); .* TABLE DATA public {table} ", listed, re.MULTILINE)
    return [path for number in numbers for path in dump.glob(f"{number}.dat*")]


def test_only_the_files_that_the_tables_need_are_read_and_damage_in_one_of_them_refuses(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_database.fn(NAME)
    before, read = sums(trial), list[str]()
    trial.sql("DELETE FROM answers")
    (needed, *_), (other,) = files_of(trial, r"answers\w*"), files_of(trial, "people")
    flip(other)
    sum_of = manifest.sum_of

    def noted(path: Path) -> manifest.FileSum:
        read.append(path.name)
        return sum_of(path)

    monkeypatch.setattr(manifest, "sum_of", noted)
    report = restore("answers")
    assert report.status in GOOD
    assert sums(trial) == before
    assert other.name not in read
    assert len(read) < len(list((newest_path(trial) / "dump").iterdir()))
    for damaged in (needed, newest_path(trial) / "dump" / "toc.dat"):
        trial.sql("DELETE FROM answers")
        flip(damaged)
        with pytest.raises(RunbookFailed, match="SHA-256 differs"):
            restore("answers")
        assert trial.sql("SELECT count(*) FROM answers") == [(0,)], "nothing was replaced"
        flip(damaged)


def test_a_generated_column_that_is_computed_otherwise_is_accepted_by_name(trial: Trial) -> None:
    """The time and an unqualified table's rate: the backup has the old values, the live table computes new ones."""
    trial.sql(RATED + "CREATE TABLE bought (n int, sum int GENERATED ALWAYS AS (rated(n)) STORED)")
    trial.sql("INSERT INTO bought VALUES (1), (2)")
    backup_database.fn(NAME)
    trial.sql("DELETE FROM bought WHERE n = 1")
    with pytest.raises(RunbookFailed, match=re.escape('accept=["GENERATED COLUMN public.bought.sum"]')):
        restore("bought")
    with pytest.raises(RunbookFailed, match="the backup has no GENERATED COLUMN public.bougt.sum"):
        restore("bought", accept=["GENERATED COLUMN public.bougt.sum"])
    accepted = ["GENERATED COLUMN public.bought.sum"]
    report = restore("bought", accept=accepted)
    assert report.status in GOOD
    assert values(report)["accepted as not restored"] == accepted[0]
    assert trial.sql("SELECT n, sum FROM bought ORDER BY n") == [(1, 2), (2, 4)]
    assert undo_restore_tables.fn(NAME, accept=accepted, confirm=NAME).status in GOOD
    assert trial.sql("SELECT n, sum FROM bought") == [(2, 4)]
