"""Dumps that the manual's own commands leave: they restore, unproven; what is cut off or broken restores nothing."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from flows.database.restore import restore_database
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.gx.declared import Reference
from tasks.gx.suggestion import reference_rule
from tests.database.conftest import NAME, Trial, with_expectations
from tests.fixtures.servers import ROLE, ROLE_PASSWORD

SEED = """
SET ROLE grc_user;
CREATE TABLE plain_people (id bigserial PRIMARY KEY, name text NOT NULL);
INSERT INTO plain_people (name) SELECT 'person ' || g FROM generate_series(1, 1000) g;
CREATE INDEX plain_people_name ON plain_people (name);
"""


@pytest.fixture
def plain(trial: Trial) -> Trial:
    """A database that its own role may dump, as the manual does it."""
    trial.server.drop_database(trial.database)
    trial.server.create_database(trial.database)
    trial.sql(SEED)
    return trial


def dump(trial: Trial, name: str, *options: str, user: str = ROLE, password: str = ROLE_PASSWORD) -> Path:
    """§1.2, literally: pg_dump as grc_user."""
    trial.store.mkdir(parents=True, exist_ok=True)
    path = trial.store / name
    form = ["-F", "c", "-b", "-f", str(path)] if name.endswith(".dump") else []
    argv = [str(trial.server.programs / "pg_dump"), "-h", "127.0.0.1", "-p", str(trial.server.port), "-U", user]
    done = subprocess.run(
        [*argv, "-d", trial.database, *form, *options], env={"PGPASSWORD": password}, capture_output=True, check=True
    )
    if name.endswith(".sql"):
        path.write_bytes(done.stdout)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(done.stdout))
    return path


@pytest.mark.parametrize("name", ["backup_20260215.dump", "backup_20260215.sql", "backup_20260215.sql.gz"])
def test_it_restores_and_is_said_to_be_unproven(plain: Trial, name: str) -> None:
    path = dump(plain, name)
    plain.sql("DELETE FROM plain_people")
    plan = restore_database.fn(NAME, backup=name)
    assert plan.status is Status.PLANNED
    assert plain.sql("SELECT count(*) FROM plain_people") == [(0,)]
    report = restore_database.fn(NAME, backup=str(path), confirm=NAME)
    assert report.status is Status.WARN
    assert "not proven: there is no manifest" in report.outcome
    assert any(found.name == "no manifest" and found.status is Status.WARN for found in report.findings)
    assert plain.sql("SELECT count(*), max(id) FROM plain_people") == [(1000, 1000)]
    assert plain.sql("SELECT nextval('plain_people_id_seq')") == [(1001,)]
    owner = plain.sql("SELECT datdba::regrole::text FROM pg_database WHERE datname = %s", plain.database)
    assert owner == [("grc_user",)]
    assert not list(plain.store.glob(".verified/*"))


def test_into_another_database(plain: Trial) -> None:
    dump(plain, "backup_20260215.dump")
    report = restore_database.fn(NAME, backup="backup_20260215.dump", into=f"{plain.database}_new", confirm=NAME)
    assert report.status is Status.WARN
    assert plain.sql("SELECT count(*) FROM plain_people", database=f"{plain.database}_new") == [(1000,)]
    assert plain.databases().count(plain.database) == 1
    assert len([name for name in plain.databases() if name.startswith(plain.database)]) == 2, "nothing is left over"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_row(path: Path) -> None:
    path.write_text(path.read_text().replace("7\tperson 7\n", "seven\tperson 7\n"))


def empty(path: Path) -> None:
    text = path.read_text()
    start = text.index("1\tperson 1\n")
    path.write_text(text[:start] + text[text.index("\\.\n", start) :])


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("a.dump", cut, "cannot be read|does not|pg_restore failed|could not read"),
        ("a.sql", cut, "end of the dump: missing"),
        ("a.sql.gz", cut, "cannot be uncompressed"),
        ("a.sql", break_row, "does not restore.*invalid input syntax for type bigint"),
        ("a.sql", empty, "rows in the copy: 0"),
        ("a.dump", lambda path: path.write_text("no dump"), "not a dump in pg_dump's custom format"),
        ("a.dump", lambda path: path.unlink(), "cannot be read: No such file"),
    ],
)
def test_what_is_broken_restores_nothing(plain: Trial, name: str, harm: object, said: str) -> None:
    path, oid = dump(plain, name), plain.oid()
    harm(path)  # type: ignore[operator]
    with pytest.raises(RunbookFailed, match=said):
        restore_database.fn(NAME, backup=name, confirm=NAME)
    assert plain.oid() == oid
    assert plain.sql("SELECT count(*) FROM plain_people") == [(1000,)]


def test_data_that_breaks_the_application_s_rules_does_not_replace_a_database_that_is_live(plain: Trial) -> None:
    """Where none is live it goes live, unless that is forbidden."""
    with_expectations(plain.reports.parent)
    plain.sql(
        "CREATE TABLE users (username text); ALTER TABLE users OWNER TO grc_user; INSERT INTO users VALUES (NULL)"
    )
    dump(plain, "a.sql")
    oid = plain.oid()
    with pytest.raises(RunbookFailed, match="username values to not be null"):
        restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    assert plain.oid() == oid
    plain.server.drop_database(plain.database)
    with pytest.raises(RunbookFailed, match="username values to not be null"):
        restore_database.fn(NAME, backup="a.sql", strict=True, confirm=NAME)
    assert plain.oid() is None
    with pytest.raises(RunbookFailed, match="is restored from a.sql.*username values to not be null"):
        restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    assert plain.sql("SELECT count(*) FROM users") == [(1,)]
    made = "SELECT datistemplate, datconnlimit, pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
    assert plain.sql(made) == [(False, -1, "grc_user")]


def test_rows_that_came_in_with_the_triggers_switched_off_are_found(plain: Trial, tmp_path: Path) -> None:
    """As `pg_dump --data-only --disable-triggers` writes them: the foreign key counts as valid, and was not checked."""
    plain.sql(
        "CREATE TABLE owners (id int PRIMARY KEY); CREATE TABLE pets (owner int REFERENCES owners);"
        "ALTER TABLE owners OWNER TO grc_user; ALTER TABLE pets OWNER TO grc_user;"
        "INSERT INTO owners VALUES (1); INSERT INTO pets VALUES (1)"
    )
    path = dump(plain, "orphans.sql")
    with path.open("a") as file:
        file.write("ALTER TABLE public.pets DISABLE TRIGGER ALL;\nINSERT INTO public.pets VALUES (99);\n")
        file.write("ALTER TABLE public.pets ENABLE TRIGGER ALL;\n")
    suites = tmp_path / "suites"
    suites.mkdir()
    owner = Reference(("owner",), "public", "owners", ("id",), (("pg_catalog", "="),))
    (suites / "pets.json").write_text(json.dumps([reference_rule(owner)]))
    with_expectations(plain.reports.parent, suites)
    oid = plain.oid()
    with pytest.raises(RunbookFailed, match="every owner is in public.owners"):
        restore_database.fn(NAME, backup=path.name, confirm=NAME)
    assert plain.oid() == oid
