"""A migration command of another tool on a copy: the live database refuses one that ignores the copy's address."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from blocks.places import Application
from blocks.postgres.server import Postgres, execute
from runbook.wait import until
from tasks.migrations.command import MigrationFailed, run_command
from tasks.migrations.live import guarding
from tests.fixtures.servers import PostgresServer

# Django's order: each migration and its record in one transaction, or in none (atomic = False).
TOOL = """
import os, sys, psycopg
address, atomic, *statements = sys.argv[1:]
dsn = os.environ["DATABASE_URL"] if address == "given" else open(address).read()
print("Operations to perform:")
with psycopg.connect(dsn, autocommit=atomic != "atomic") as connection:
    for statement in statements:
        print("  Applying", statement, flush=True)
        connection.execute(statement)
print("done")
"""
RECORD = "INSERT INTO django_migrations (app, name) VALUES ('members', '0002')"
ADD = "CREATE TABLE hobbies (id int PRIMARY KEY, user_id int REFERENCES users)"
RENAME = "UPDATE users SET display_name = upper(display_name)"
STATE = """
SELECT (SELECT count(*) FROM pg_class WHERE relname = 'hobbies'), (SELECT count(*) FROM django_migrations),
       (SELECT count(*) FROM users WHERE display_name = 'renamed'), (SELECT count(*) FROM users)
"""


@pytest.fixture
def copy(interview: Postgres, postgres_server: PostgresServer) -> Iterator[str]:
    """A staged copy of a Django application's database."""
    made = "SET ROLE grc_user; CREATE TABLE django_migrations (id serial PRIMARY KEY, app text, name text)"
    postgres_server.sql(made, database=interview.database)
    name = f"{interview.database}_restoring"
    postgres_server.copy_database(name, interview.database)
    yield name
    postgres_server.drop_database(name)


def migrate(live: Postgres, copy: str, directory: Path, address: str, atomic: str, *statements: str) -> str:
    """Run the tool; returns the live database's state afterwards, and what it printed."""
    (directory / "settings").write_text(live.url(live.database))
    (directory / "tool.py").write_text(TOOL)
    application = Application(migrate_command=[sys.executable, "tool.py", address, atomic, *statements])
    done = run_command.work(live, application, copy, directory)
    assert done.output.splitlines()[-1] == "done"
    return done.live


def state(postgres: Postgres, database: str) -> list[tuple[object, ...]]:
    with postgres.connect(database) as connection:
        return execute(connection, STATE)


def test_a_command_that_uses_its_address_migrates_the_copy_alone(
    interview: Postgres, copy: str, tmp_path: Path
) -> None:
    before = state(interview, interview.database)
    said = migrate(interview, copy, tmp_path, "given", "atomic", ADD, RECORD)
    assert state(interview, copy) == [(1, 1, 0, 20)]
    assert state(interview, interview.database) == before == [(0, 0, 0, 20)]
    assert said == f"{interview.database} is unchanged: the same schema, and no row was written"


@pytest.mark.parametrize(
    ("atomic", "statements"),
    [
        ("atomic", (ADD, RECORD)),
        ("single", (ADD, RECORD)),
        ("single", ("CREATE INDEX CONCURRENTLY hobby ON users (display_name)", RECORD)),
        ("single", ("ALTER TABLE users ADD COLUMN nickname text", RECORD)),
        ("atomic", ("UPDATE users SET display_name = 'renamed'", RECORD)),
    ],
)
def test_the_live_database_refuses_a_command_with_its_own_configuration(
    interview: Postgres, copy: str, tmp_path: Path, atomic: str, statements: tuple[str, ...]
) -> None:
    """It migrated the live database, and the report said that nothing live was touched."""
    with pytest.raises(MigrationFailed, match="connected to the live database instead of") as error:
        migrate(interview, copy, tmp_path, "settings", atomic, *statements)
    assert state(interview, interview.database) == [(0, 0, 0, 20)]
    assert "1 session that tried to change it was ended" in error.value.message
    assert "Operations to perform:" in error.value.output
    assert "terminating connection due to administrator command" in error.value.output
    assert "DATABASE_URL" in error.value.hint


def test_rows_that_nothing_refused_are_not_called_unchanged(interview: Postgres, copy: str, tmp_path: Path) -> None:
    """Without a transaction the tool wrote them before it recorded anything."""
    with pytest.raises(MigrationFailed) as error:
        migrate(interview, copy, tmp_path, "settings", "single", "UPDATE users SET display_name = 'renamed'")
    assert state(interview, interview.database) == [(0, 0, 20, 20)]
    assert f"did not connect to {copy}" in error.value.message
    assert "rows were written to it (at most 20 rows, by the migration or by others)" in error.value.message
    assert error.value.live
    assert not error.value.live.is_unchanged


def test_a_command_with_nothing_to_do_on_the_live_database_is_found(
    interview: Postgres, copy: str, tmp_path: Path
) -> None:
    with pytest.raises(MigrationFailed, match=f"did not connect to {copy}; {interview.database} is unchanged"):
        migrate(interview, copy, tmp_path, "settings", "atomic", "SELECT count(*) FROM django_migrations")


def test_the_application_goes_on_meanwhile(interview: Postgres, copy: str) -> None:
    with guarding(interview) as live, interview.connect(interview.database, as_application=True) as application:
        execute(application, "UPDATE users SET display_name = 'renamed' WHERE id = 1")
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            execute(application, "CREATE TABLE hobbies (id int)")
    assert live.ended == 1
    assert not live.is_unchanged
    assert state(interview, interview.database) == [(0, 0, 1, 20)]
    with interview.connect(interview.database, as_application=True) as application:
        execute(application, "CREATE TABLE hobbies (id int)")


def test_a_session_of_the_application_that_was_ended_does_not_fail_the_migration(
    interview: Postgres, copy: str, tmp_path: Path
) -> None:
    """With stop_services=at_swap it still runs, and may make a temporary table."""
    statement = "SELECT pg_sleep(0.3)"
    with ThreadPoolExecutor(1) as pool:
        migrating = pool.submit(migrate, interview, copy, tmp_path, "given", "atomic", ADD, statement, RECORD)
        until(lambda: is_guarded(interview), what="the guard", seconds=30, every_seconds=0.01)
        with (
            interview.connect(interview.database, as_application=True) as application,
            pytest.raises(psycopg.OperationalError, match="terminating connection"),
        ):
            execute(application, "CREATE TEMPORARY TABLE basket (id int)")
        assert "1 session that tried to change it was ended" in migrating.result()
    assert state(interview, copy) == [(1, 1, 0, 20)]


def is_guarded(postgres: Postgres) -> bool:
    held = "SELECT 1 FROM pg_locks WHERE relation = 'pg_class'::regclass AND mode = 'ShareLock' AND granted"
    with postgres.connect(postgres.database) as connection:
        return bool(execute(connection, held))


def test_a_program_that_is_not_there_is_named(interview: Postgres, copy: str, tmp_path: Path) -> None:
    application = Application(migrate_command=["no-such-tool", "up"])
    with pytest.raises(MigrationFailed, match=f"no-such-tool.*; {interview.database} is unchanged"):
        run_command.work(interview, application, copy, tmp_path)


def test_a_database_that_does_not_exist_needs_no_guard(interview: Postgres) -> None:
    missing = interview.model_copy(update={"database": "dropped"})
    with guarding(missing) as live:
        pass
    assert live.is_unchanged


def test_the_output_of_both_streams_is_kept(interview: Postgres, copy: str, tmp_path: Path) -> None:
    """Node prints its version last: the cause was lost."""
    script = (
        "import sys; print('Loading…'); sys.exit('Error: connect ECONNREFUSED 127.0.0.1:6379\\n  at x\\nNode.js v22')"
    )
    application = Application(migrate_command=[sys.executable, "-c", script])
    with pytest.raises(MigrationFailed, match="failed: python.* exited 1: Error: connect ECONNREFUSED") as error:
        run_command.work(interview, application, copy, tmp_path)
    assert error.value.output.splitlines() == [
        *("Loading…", "Error: connect ECONNREFUSED 127.0.0.1:6379", "  at x", "Node.js v22")
    ]
