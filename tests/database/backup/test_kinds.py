"""Backups of a part of the database, and as SQL text: verified by restoring, seeded failures found."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from flows.database.backup import backup_database, prune_backups, verify_backup
from flows.database.restore import restore_database
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from tasks.backups import catalogue, manifest
from tasks.backups.manifest import Kind
from tasks.postgres.content.content import content_of
from tasks.postgres.restore.staged_copy import building_name
from tasks.stores.directory import DirectoryStore
from tests.database.conftest import NAME, Trial
from tests.database.restore.test_foreign_text import ODD
from tests.database.restore.test_restore import GOOD, flip, reseal


def newest(trial: Trial, kind: Kind) -> catalogue.Backup:
    store = DirectoryStore(trial.store)
    return catalogue.open_backup(store, catalogue.names(store, kind)[-1])


@pytest.mark.parametrize(("form", "kind"), [("schema", "schema"), ("sql", "sql"), ("sql.gz", "sql")])
def test_a_kind_is_taken_verified_and_pruned_by_itself(trial: Trial, form: str, kind: Kind) -> None:
    backup_database.fn(NAME, kind=form)  # type: ignore[arg-type]
    backup = newest(trial, kind)
    assert catalogue.names(DirectoryStore(trial.store), "postgres") == [], "latest never means a part of the database"
    report = verify_backup.fn(NAME, backup=backup.name)
    assert report.status in GOOD
    assert newest(trial, kind).verified
    assert [name for name in trial.databases() if name.startswith(trial.database)] == [trial.database]
    assert prune_backups.fn(NAME, kind=kind).outcome == "nothing to delete"
    log = Path(trial.environment.logs.backup).read_text()
    assert f"Backup completed - {backup.name}" in log


def test_text_holds_everything_in_the_form_of_the_manual(trial: Trial) -> None:
    trial.sql(ODD)
    backup_database.fn(NAME, kind="sql.gz")
    path = newest(trial, "sql").path / "dump.sql.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    assert "COPY public.people" in text
    assert "PostgreSQL database dump complete" in text
    assert "\n\\! touch x" in text, "a backslash at the start of a line of a function is no command to psql"
    before = content_of(trial.environment.postgres, trial.database)
    trial.sql("DELETE FROM answers; UPDATE people SET name = 'x'")
    report = restore_database.fn(NAME, backup=newest(trial, "sql").name, confirm=NAME)
    assert report.status in GOOD
    assert "proven by content" in report.outcome
    after = content_of(trial.environment.postgres, trial.database)
    assert {name: table.hash for name, table in after.tables.items()} == {
        name: table.hash for name, table in before.tables.items()
    }


@pytest.mark.parametrize("seeded", ["a row", "an index", "a byte"])
def test_a_text_that_was_changed_is_found(trial: Trial, seeded: str) -> None:
    """The first two with valid checksums: only restoring finds them."""
    backup_database.fn(NAME, kind="sql")
    path = newest(trial, "sql").path
    dump = path / "dump.sql"
    if seeded == "a byte":
        flip(dump)
    else:
        text = dump.read_text()
        old = "候補者 7\t" if seeded == "a row" else "CREATE INDEX people_name"
        new = "候補者 8\t" if seeded == "a row" else "--REATE INDEX people_name"
        assert old in text
        dump.write_text(text.replace(old, new, 1))
        sums = {name: found.model_dump() for name, found in manifest.sums_of(path).items()}
        reseal(path, lambda sealed: sealed.update(files=sums))
    what = {"a row": "their content differs", "an index": "INDEX public.people_name.*missing", "a byte": "SHA-256"}
    with pytest.raises(RunbookFailed, match=what[seeded]):
        verify_backup.fn(NAME, backup=path.name)
    assert not newest(trial, "sql").verified


def test_chosen_tables_have_their_rows_and_everybody_s_definitions(trial: Trial) -> None:
    report = backup_database.fn(NAME, kind="tables", tables=["answers", "public.by_mood", "Empty Table"])
    assert report.status in GOOD
    backup = newest(trial, "tables")
    assert set(backup.manifest.content["tables"]) == {
        *("public.answers_2026_01", "public.answers_rest", "public.by_mood", 'public."Empty Table"')
    }
    assert verify_backup.fn(NAME, backup=backup.name).status in GOOD
    with pytest.raises(RunbookFailed, match="some tables.*run restore-tables for chosen tables"):
        restore_database.fn(NAME, backup=backup.name, confirm=NAME)
    report = restore_database.fn(NAME, backup=backup.name, into=f"{trial.database}_part", confirm=NAME)
    assert report.status in GOOD
    assert trial.sql("SELECT count(*) FROM answers", database=f"{trial.database}_part") == [(500,)]
    assert trial.sql("SELECT count(*) FROM people", database=f"{trial.database}_part") == [(0,)]
    reseal(backup.path, lambda sealed: sealed["content"]["tables"]["public.by_mood"].update(rows=299))
    with pytest.raises(RunbookFailed, match="300 rows instead of 299"):
        verify_backup.fn(NAME, backup=backup.name)


# pg_dump leaves these rows out without a word.
NOT_DUMPED = """
CREATE TABLE split (a int) PARTITION BY LIST (a);
CREATE TABLE split_near PARTITION OF split FOR VALUES IN (1);
CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
CREATE FOREIGN TABLE split_far PARTITION OF split FOR VALUES IN (2) SERVER nowhere;
CREATE TABLE unsplit (a int) PARTITION BY LIST (a);
CREATE TABLE owned AS SELECT 1 AS a;
DO $$ BEGIN
    EXECUTE format('ALTER EXTENSION %I ADD TABLE owned', (SELECT extname FROM pg_extension WHERE extname <> 'plpgsql'));
END $$
"""


@pytest.mark.parametrize(
    ("form", "tables", "said"),
    [
        ("tables", [], "no table was named"),
        ("tables", ["peeple"], "there is no table “peeple”.*did you mean people"),
        ("tables", ["people", "split"], r"lack the rows of public\.split_far \(a foreign table\)"),
        ("tables", ["people", "unsplit"], "unsplit has no partitions"),
        ("tables", ["people", "owned"], r"lack the rows of public\.owned \(an extension's\)"),
        ("full", ["people"], "tables are named for a backup of the kind full"),
        ("fool", [], "kind is “fool”"),
    ],
)
def test_what_cannot_be_meant_is_refused(trial: Trial, form: str, tables: list[str], said: str) -> None:
    trial.sql(NOT_DUMPED)
    with pytest.raises(RunbookFailed, match=said):
        backup_database.fn(NAME, kind=form, tables=tables)  # type: ignore[arg-type]
    assert not trial.store.exists() or not list(trial.store.iterdir())


def test_into_makes_another_database_and_leaves_the_live_one(trial: Trial) -> None:
    backup_database.fn(NAME)
    oid, other = trial.oid(), f"{trial.database}_new"
    plan = restore_database.fn(NAME, into=other)
    assert plan.status is Status.PLANNED
    assert other not in trial.databases()
    trial.sql("DELETE FROM answers")
    report = restore_database.fn(NAME, into=other, confirm=NAME)
    assert report.status in GOOD
    assert trial.oid() == oid
    assert trial.sql("SELECT count(*) FROM answers") == [(0,)]
    assert trial.sql("SELECT count(*) FROM answers", database=other) == [(500,)]
    assert trial.sql("SELECT datdba::regrole::text FROM pg_database WHERE datname = %s", other) == [("grc_user",)]
    with pytest.raises(RunbookFailed, match="already exists.*choose a name that no database has"):
        restore_database.fn(NAME, into=other, confirm=NAME)
    for reserved in (f"{trial.database}__new", "postgres", " "):
        with pytest.raises((RunbookFailed, OpsError), match="already exists|reserved|cannot name"):
            restore_database.fn(NAME, into=reserved, confirm=NAME)


@pytest.mark.parametrize(
    "ending", ["__new", "__new_0123abcd", "__verify", "__tables", "__rehearsal", "__old_20260215_030000"]
)
def test_names_that_runs_drop_are_not_given(trial: Trial, ending: str) -> None:
    """Whatever they begin with: another environment's run may make and drop just that."""
    with pytest.raises(RunbookFailed, match="is reserved.*choose a name that no database has and that is not reserved"):
        restore_database.fn(NAME, into=f"{trial.database}x{ending}", confirm=NAME)


def test_a_database_beside_the_new_name_is_left_alone(trial: Trial) -> None:
    backup_database.fn(NAME)
    other, stranger = f"{trial.database}_a", f"{trial.database}_a__new"
    trial.server.create_database(stranger)
    trial.sql("CREATE TABLE precious (id int)", database=stranger)
    assert restore_database.fn(NAME, into=other, confirm=NAME).status in GOOD
    assert trial.sql("SELECT count(*) FROM precious", database=stranger) == [(0,)]
    assert sorted(name for name in trial.databases() if name.startswith(trial.database)) == [
        *(trial.database, other, stranger)
    ]


def test_what_a_killed_run_left_is_planned_and_dropped(trial: Trial) -> None:
    backup_database.fn(NAME)
    other = f"{trial.database}_a"
    left = building_name(trial.database, other)
    trial.server.create_database(left)
    plan = restore_database.fn(NAME, into=other)
    assert ("drop", f"{left}: the leftover of an interrupted run") in [
        (one.step, one.detail) for one in plan.plan_steps
    ]
    assert left in trial.databases()
    assert restore_database.fn(NAME, into=other, confirm=NAME).status in GOOD
    assert left not in trial.databases()


@pytest.mark.parametrize("trial", ["trial_within__new"], indirect=True)
def test_a_live_database_whose_name_ends_as_ours_is_never_built_over(trial: Trial) -> None:
    backup_database.fn(NAME)
    oid = trial.oid()
    with pytest.raises(RunbookFailed, match="trial_within is reserved"):
        restore_database.fn(NAME, into="trial_within", confirm=NAME)
    assert trial.oid() == oid


def test_the_live_name_is_refused_where_it_is_gone(trial: Trial) -> None:
    backup_database.fn(NAME)
    trial.server.drop_database(trial.database)
    with pytest.raises(RunbookFailed, match="is the live database. Next: leave into empty"):
        restore_database.fn(NAME, into=trial.database)
    assert restore_database.fn(NAME, confirm=NAME).status in GOOD
