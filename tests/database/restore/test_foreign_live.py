"""A dump that says nothing of what should be in it, against the database that is live: nothing of it may be lost."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from flows.database.restore import restore_database
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tests.database.conftest import NAME, Trial, with_expectations
from tests.database.restore.test_foreign import dump, plain
from tests.fixtures.reports import finding as found
from tests.fixtures.servers import ADMIN, ADMIN_PASSWORD

__all__ = ["plain"]  # a fixture

MORE = """
SET ROLE grc_user;
CREATE TABLE plain_notes (id int PRIMARY KEY, person bigint REFERENCES plain_people, author bigint);
CREATE TABLE "Plain; Links" (note int REFERENCES plain_notes, other int REFERENCES plain_notes);
INSERT INTO plain_notes SELECT g, g FROM generate_series(1, 10) g;
"""


def failed(backup: str, into: str = "") -> Report:
    with pytest.raises(RunbookFailed) as error:
        restore_database.fn(NAME, backup=backup, into=into, confirm=NAME)
    return error.value.report


@pytest.mark.parametrize("name", ["rules.dump", "rules.sql"])
def test_one_table_does_not_replace_the_whole_database(trial: Trial, name: str) -> None:
    trial.sql("INSERT INTO rules VALUES (true, true, true, 'x')")
    dump(trial, name, "-t", "rules", user=ADMIN, password=ADMIN_PASSWORD)
    oid = trial.oid()
    report = failed(name)
    what = found(report, "tables in the dump" if name == "rules.dump" else "objects of the live database in the copy")
    assert what.status is Status.CRITICAL
    assert "table public.answers" in what.value
    assert "set into to restore it as another database" in what.hint
    assert trial.oid() == oid
    done = restore_database.fn(NAME, backup=name, into=f"{trial.database}_rules", confirm=NAME)
    assert done.status is Status.WARN
    assert "table public.answers" in done.facts["not in the copy, but live"]
    assert trial.sql("SELECT label FROM rules", database=f"{trial.database}_rules") == [("x",)]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("VIEW plain_names AS SELECT 1 AS one", "view public.plain_names"),
        ("SEQUENCE plain_numbers", "sequence public.plain_numbers"),
        ("FUNCTION plain_one(n int) RETURNS int LANGUAGE sql AS 'SELECT n'", "function public.plain_one(n integer)"),
        ("TYPE plain_mood AS ENUM ('sad', 'ok')", "type public.plain_mood"),
        ("TABLE users (username text NOT NULL)", "table public.users"),
    ],
)
def test_what_is_live_and_not_in_the_dump_is_named(plain: Trial, made: str, said: str) -> None:
    dump(plain, "a.sql")
    plain.sql(f"SET ROLE grc_user; CREATE {made}")
    oid = plain.oid()
    report = failed("a.sql")
    assert found(report, "objects of the live database in the copy").value == f"missing: {said}"
    assert plain.oid() == oid
    if "users" in made:
        assert report.facts["expectations"].startswith("no expectations are configured")
        with_expectations(plain.reports.parent)
        rules = found(failed("a.sql"), "expectations on the copy")
        assert rules.status is Status.CRITICAL
        assert "users: the table exists" in rules.value


def test_a_dump_without_its_last_section_is_not_swapped_in(trial: Trial) -> None:
    """No key, no index, no trigger, and a table that row security no longer guards: each table is there with its rows."""
    dump(trial, "a.dump", "--section=pre-data", "--section=data", user=ADMIN, password=ADMIN_PASSWORD)
    oid = trial.oid()
    report = failed("a.dump")
    assert found(report, "objects of the live database in the copy").status is Status.CRITICAL
    missed = {row[0] for item in report.evidence if item.name == "Live, and not in the copy" for row in item.rows}
    assert missed >= {
        "primary key public.people: people_pkey",
        "foreign key public.answers: answers_person_fkey",
        "index public.people: people_name",
        "trigger public.people: touch",
        "policy public.people: own",
        "row level security public.people",
    }
    assert trial.oid() == oid


def test_a_dump_of_everything_misses_nothing(trial: Trial) -> None:
    """Partitions, inheritance, identity, generated columns, policies: told apart from what is lost."""
    dump(trial, "a.dump", user=ADMIN, password=ADMIN_PASSWORD)
    whole = found(restore_database.fn(NAME, backup="a.dump", confirm=NAME), "objects of the live database in the copy")
    assert whole.status is Status.OK, whole.value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ADD COLUMN plain_more int", "column public.plain_people: plain_more"),
        ("ADD CONSTRAINT plain_rule CHECK (id > -5)", "constraint public.plain_people: plain_rule"),
    ],
)
def test_what_a_table_got_since_is_named(plain: Trial, change: str, said: str) -> None:
    dump(plain, "a.sql")
    plain.sql(f"ALTER TABLE plain_people {change}")
    oid = plain.oid()
    assert found(failed("a.sql"), "objects of the live database in the copy").value == f"missing: {said}"
    assert plain.oid() == oid
    report = restore_database.fn(NAME, backup="a.sql", into=f"{plain.database}_x", confirm=NAME)
    assert said in report.facts["not in the copy, but live"]


def test_rows_that_were_kept_aside_are_not_missed(plain: Trial) -> None:
    """By restore-tables: no dump has them."""
    dump(plain, "a.sql")
    plain.sql("CREATE TABLE plain_people__old_20260215_030000 (id int)")
    oid = plain.oid()
    report = restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    assert found(report, "objects of the live database in the copy").status is Status.OK
    assert plain.oid() != oid, "the copy is live"


def test_expectations_that_judged_nothing_are_not_ok(plain: Trial) -> None:
    dump(plain, "a.sql")
    with_expectations(plain.reports.parent)
    report = restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    rules = found(report, "expectations on the copy")
    assert (rules.status, rules.value) == (Status.WARN, "not measured")


@pytest.mark.parametrize("name", ["a.sql", "a.sql.gz"])
def test_a_dump_without_owners_does_not_shut_the_application_out(plain: Trial, name: str) -> None:
    plain.sql(MORE)
    dump(plain, name, "-O", "-x")
    oid = plain.oid()
    rights = found(failed(name), "rights of grc_user in the copy")
    assert rights.status is Status.CRITICAL
    assert "table public.plain_people: DELETE, INSERT, SELECT, UPDATE, own" in rights.value
    assert "without -O and -x" in rights.hint
    assert plain.oid() == oid
    into = restore_database.fn(NAME, backup=name, into=f"{plain.database}_o", confirm=NAME)
    assert found(into, "rights of grc_user in the copy").status is Status.WARN
    plain.server.drop_database(plain.database)
    gone = found(failed(name), "rights of grc_user in the copy")
    assert (gone.status, gone.expected) == (Status.CRITICAL, "may read every table")
    assert plain.oid() is None


def test_other_owners_are_told(plain: Trial) -> None:
    plain.sql("ALTER TABLE plain_people OWNER TO postgres; GRANT ALL ON plain_people TO grc_user")
    dump(plain, "a.sql", user=ADMIN, password=ADMIN_PASSWORD)
    plain.sql("ALTER TABLE plain_people OWNER TO pg_monitor")
    report = restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    assert "table public.plain_people: postgres instead of pg_monitor" in found(report, "owners in the copy").value


def test_definitions_alone(plain: Trial) -> None:
    """The manual's `schema_DATE.sql`."""
    dump(plain, "schema_20260215.sql", "-s")
    rows = found(failed("schema_20260215.sql"), "rows in the copy")
    assert rows.status is Status.CRITICAL
    report = restore_database.fn(NAME, backup="schema_20260215.sql", into=f"{plain.database}_s", confirm=NAME)
    assert found(report, "rows in the copy").status is Status.WARN
    assert "definitions only" in found(report, "rows in the copy").hint
    assert plain.sql("SELECT count(*) FROM plain_people", database=f"{plain.database}_s") == [(0,)]


def test_a_foreign_key_to_a_table_that_is_not_in_the_dump_is_left_out(plain: Trial) -> None:
    """The manual's `sessions_backup.dump`."""
    plain.sql(MORE)
    dump(plain, "notes_backup.dump", "-t", "plain_notes", "-t", '"Plain; Links"')
    assert (
        found(failed("notes_backup.dump"), "foreign keys to tables that are not in the dump").status is Status.CRITICAL
    )
    report = restore_database.fn(NAME, backup="notes_backup.dump", into=f"{plain.database}_n", confirm=NAME)
    keys = found(report, "foreign keys to tables that are not in the dump")
    assert (keys.status, keys.value) == (Status.WARN, "left out: public plain_notes plain_notes_person_fkey grc_user")
    assert plain.sql("SELECT count(*) FROM plain_notes", database=f"{plain.database}_n") == [(10,)]
    kept = plain.sql("SELECT count(*) FROM pg_constraint WHERE contype = 'f'", database=f"{plain.database}_n")
    assert kept == [(2,)], "those within the dump are kept"


@pytest.mark.parametrize("name", ["people_backup.dump", "people_backup.sql"])
def test_a_type_that_is_not_in_the_dump_is_named(trial: Trial, name: str) -> None:
    dump(trial, name, "-t", "people", user=ADMIN, password=ADMIN_PASSWORD)
    with pytest.raises(RunbookFailed, match=r'type "public\.(mood|percent)" does not exist') as error:
        restore_database.fn(NAME, backup=name, into=f"{trial.database}_p", confirm=NAME)
    assert "take a dump of the whole database (without -t and -n)" in error.value.message
    assert "backup before" not in error.value.message


def test_a_directory_restores_by_its_path(plain: Trial) -> None:
    path = plain.store / "dump_20260215"
    dump(plain, path.name, "-F", "d", "-f", str(path))
    plain.sql("DELETE FROM plain_people")
    report = restore_database.fn(NAME, backup=str(path), confirm=NAME)
    assert "not proven" in report.outcome
    assert plain.sql("SELECT count(*) FROM plain_people") == [(1000,)]


def test_what_is_not_supported_is_said(plain: Trial, tmp_path: Path) -> None:
    dump(plain, "a.tar", "-F", "t", "-f", str(plain.store / "a.tar"))
    assert tarfile.is_tarfile(plain.store / "a.tar")
    with pytest.raises(RunbookFailed, match="tar format, which is not supported.*custom format.*directory.*SQL text"):
        restore_database.fn(NAME, backup="a.tar")
    with pytest.raises(RunbookFailed, match=r"has no toc\.dat"):
        restore_database.fn(NAME, backup=str(tmp_path))
    backup_database.fn(NAME)
    ours = next(plain.store.glob("backup_*"))
    with pytest.raises(RunbookFailed, match=f"is a backup of this project.*backup={ours.name}"):
        restore_database.fn(NAME, backup=str(ours))
