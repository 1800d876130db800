"""Expectations: sound data passes, each kind of corruption is found, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blocks.postgres import Postgres
from runbook.errors import OpsError
from runbook.wait import until
from tasks.gx.suites import SUITES, read_suites
from tasks.integrity import run_expectations
from tasks.migrations.alembic import upgrade
from tests.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer
from tests.tasks.conftest import application_at, permit_for

# Corruption as a server would keep it: constraints are out of the way, as they are when pages or code are bad.
OFF = "SET session_replication_role = replica;"
CORRUPT = {
    "a user without a session's rows": (OFF + "DELETE FROM users WHERE id = 3", "every session belongs to a user"),
    "a lost session": (
        OFF + "DELETE FROM interview_sessions WHERE user_id = 4",
        "every message belongs to a session that exists",
    ),
    "a key twice": (
        "ALTER TABLE users DROP CONSTRAINT users_username_key; UPDATE users SET username = 'u1' WHERE id = 2",
        "username values to be unique",
    ),
    "a message's key twice": (
        "ALTER TABLE interview_messages DROP CONSTRAINT interview_messages_pkey;"
        "UPDATE interview_messages SET id = 1 WHERE id = 2",
        "every message has an id of its own",
    ),
    "no users at all": (OFF + "DELETE FROM users", "table row count to be between"),
    "a null in a column": (
        "ALTER TABLE interview_messages ALTER content DROP NOT NULL; UPDATE interview_messages SET content = NULL WHERE id = 7",
        "content values to not be null",
    ),
    "a role that is none": (
        "ALTER TABLE interview_messages DROP CONSTRAINT interview_messages_role_check;"
        "UPDATE interview_messages SET role = 'robot' WHERE id = 1",
        "role values to be in set",
    ),
    "a score off the scale": (
        "ALTER TABLE evaluations DROP CONSTRAINT evaluations_technical_check; UPDATE evaluations SET technical = 500 WHERE id = 1",
        "technical values to be between",
    ),
    "a time in the future": (
        "UPDATE interview_messages SET created_at = '2099-01-01' WHERE id = 1",
        "its time is plausible",
    ),
    "two revisions": ("INSERT INTO alembic_version VALUES ('0001')", "table row count to be between"),
}


def test_sound_data_passes_and_leaves_docs_but_neither_session_nor_secret(
    interview: Postgres, postgres_server: PostgresServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run_expectations(interview, interview.database, tmp_path / "evidence")

    assert found.failed == ()
    assert found.ok
    assert len(found.rows) >= 30
    assert found.docs is not None
    assert found.docs.is_file()
    assert list(tmp_path.glob("*.json")) == []
    for path in (tmp_path / "evidence").rglob("*"):
        if path.is_file():
            text = path.read_bytes().decode(errors="replace")
            assert ADMIN_PASSWORD not in text
            assert ROLE_PASSWORD not in text
    statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
    # Its sessions are closed; the server takes a moment to see the last one off.
    until(lambda: postgres_server.sql(statement, interview.database) == [(0,)], seconds=120,
          what="the end of its sessions, which would block the swap's rename")  # fmt: skip
    output = capfd.readouterr()
    assert "Calculating" not in output.err, "no progress bars"


@pytest.mark.parametrize(("statement", "expectation"), CORRUPT.values(), ids=CORRUPT.keys())
def test_corruption_is_found(
    interview: Postgres, postgres_server: PostgresServer, tmp_path: Path, statement: str, expectation: str
) -> None:
    postgres_server.sql(statement, database=interview.database)

    found = run_expectations(interview, interview.database, tmp_path)

    assert any(expectation in sentence for sentence in found.failed), found.failed
    assert found.missing == ()
    assert found.broken == found.failed


def test_a_table_that_this_revision_lacks_is_a_finding_and_a_strangers_one_none(
    empty: Postgres, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    upgrade.work(permit_for(empty), empty, application_at(), empty.database, "0001")
    postgres_server.sql(
        "INSERT INTO users (username, display_name, password_hash) VALUES ('u', 'U', '!');"
        "ALTER TABLE users DROP COLUMN is_active;"
        'CREATE SCHEMA stranger; CREATE TABLE stranger.evaluations (id int); CREATE TABLE public."Odd Table" (x int)',
        database=empty.database,
    )

    found = run_expectations(empty, empty.database, tmp_path)

    assert "evaluations: the table exists: it does not, at this revision" in found.missing
    assert any(sentence.startswith("users: is_active") for sentence in found.missing)
    assert found.broken == ()
    assert set(found.failed) == set(found.missing)


def test_a_query_that_cannot_run_is_a_finding_that_says_why(interview: Postgres, tmp_path: Path) -> None:
    suites = tmp_path / "suites"
    suites.mkdir()
    query = {"unexpected_rows_query": "SELECT id FROM {batch} WHERE no_such_column = 1"}
    suite = [{"type": "expect_query_to_return_no_rows", "kwargs": query}]
    (suites / "users.json").write_text(json.dumps(suite))

    found = run_expectations(interview, interview.database, tmp_path / "evidence", suites)

    assert len(found.failed) == 1
    assert "could not be judged" in found.failed[0]
    assert "no_such_column" in found.failed[0]


def test_expectations_cannot_write(interview: Postgres, postgres_server: PostgresServer, tmp_path: Path) -> None:
    suites = tmp_path / "suites"
    suites.mkdir()
    query = {"unexpected_rows_query": "SELECT nextval('public.candidate_number_seq') FROM {batch}"}
    (suites / "users.json").write_text(json.dumps([{"type": "expect_query_to_return_no_rows", "kwargs": query}]))

    found = run_expectations(interview, interview.database, tmp_path / "evidence", suites)

    assert "read-only" in found.failed[0]


def test_the_suites_are_readable_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert set(read_suites(SUITES)) >= {"users", "interview_sessions", "interview_messages", "evaluations"}
    (tmp_path / "users.json").write_text('[{"type": "expect"}]')
    with pytest.raises(OpsError, match=r"users\.json is not a suite"):
        read_suites(tmp_path)
    with pytest.raises(OpsError, match="no suite"):
        read_suites(tmp_path / "nowhere")
