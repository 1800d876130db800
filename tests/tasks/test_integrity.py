"""Expectations: sound data passes, each kind of corruption is found, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.wait import until
from tasks.gx import constraints
from tasks.gx.declared import Reference
from tasks.gx.suggestion import reference_rule, unique_rule
from tasks.gx.suites import ROWS, read_suites
from tasks.integrity import render_docs, run_expectations, tables_in
from tasks.migrations.alembic import upgrade
from tasks.postgres.content.changes import changed, read_states
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer
from tests.tasks.conftest import SUITES, application_at

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
    found = run_expectations(interview, interview.database, tmp_path / "evidence", SUITES)

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
    until(
        lambda: postgres_server.sql(statement, interview.database) == [(0,)],
        seconds=120,
        what="the end of its sessions, which would block the swap's rename",
    )
    output = capfd.readouterr()
    assert "Calculating" not in output.err, "no progress bars"


@pytest.mark.parametrize(("statement", "expectation"), CORRUPT.values(), ids=CORRUPT.keys())
def test_corruption_is_found(
    interview: Postgres, postgres_server: PostgresServer, tmp_path: Path, statement: str, expectation: str
) -> None:
    postgres_server.sql(statement, database=interview.database)

    for built in (False, True):  # a constraint that is not there proves nothing
        found = run_expectations(interview, interview.database, tmp_path, SUITES, built=built)

        assert any(expectation in sentence for sentence in found.failed), found.failed
        assert found.not_applicable == ()


def test_what_a_constraint_proves_in_a_restored_database_is_not_counted_again(
    interview: Postgres, tmp_path: Path
) -> None:
    counted = run_expectations(interview, interview.database, tmp_path, SUITES)
    built = run_expectations(interview, interview.database, tmp_path, SUITES, built=True)

    proven = {row[:2] for row in built.rows if row.observed == constraints.HOLDS}
    assert {row[:3] for row in built.rows} == {row[:3] for row in counted.rows}, "the same rules, with the same answers"
    assert proven >= {
        ("users", "username values to be unique"),
        ("interview_messages", "every message has an id of its own"),
        ("interview_messages", "content values to not be null"),
        ("interview_messages", "role values to be in set (value_set ['user', 'assistant', 'system'])"),
        ("evaluations", "technical values to be between (min 0, max 100)"),
    }
    assert proven.isdisjoint(
        {
            ("users", "table row count to be between (min 1)"),
            ("audit_events", "every audit event has an id of its own"),  # its key has the time, too
            ("interview_messages", "tokens values to be between (min 0, max 10000000)"),  # CHECK (tokens >= 0)
        }
    )
    assert built.docs is not None


def test_only_a_constraint_that_covers_every_row_proves_a_rule(
    empty: Postgres, postgres_server: PostgresServer
) -> None:
    """Not one that was added without a check of the rows, for some rows, for an expression, or with other rows below."""
    postgres_server.sql(
        "CREATE TABLE public.whole (id int PRIMARY KEY, amount int NOT NULL CHECK (amount > 0), kind text CHECK (kind IN ('a', 'b')));"
        "CREATE TABLE public.partly (id int, amount int, name text, kind text, owner int);"
        "CREATE UNIQUE INDEX ON public.partly (id) WHERE id > 10; CREATE UNIQUE INDEX ON public.partly (lower(name));"
        "ALTER TABLE public.partly ADD CHECK (amount BETWEEN 1 AND 5) NOT VALID, ADD CHECK (kind IN ('a', 'b')) NOT VALID,"
        " ADD FOREIGN KEY (owner) REFERENCES public.whole NOT VALID;"
        "CREATE TABLE public.parent (id int PRIMARY KEY); CREATE TABLE public.child () INHERITS (public.parent);",
        database=empty.database,
    )
    if int(str(postgres_server.sql("SHOW server_version_num")[0][0])) >= 180000:
        postgres_server.sql("ALTER TABLE public.partly ADD NOT NULL amount NOT VALID", database=empty.database)
    missing, unique = "expect_column_values_to_not_be_null", "expect_column_values_to_be_unique"
    between, member = "expect_column_values_to_be_between", "expect_column_values_to_be_in_set"

    def one(kind: str, **kwargs: object) -> dict[str, object]:
        return {"type": kind, "kwargs": kwargs}

    proven = {
        "whole": [
            one(unique, column="id"),
            one(missing, column="amount"),
            one(between, column="amount", min_value=0),
            one(member, column="kind", value_set=["b", "c", "a"]),
            unique_rule(("id",)),
        ]
    }
    owner = Reference(("owner",), "public", "whole", ("id",), (("pg_catalog", "="),))
    judged = {
        "whole": [
            one(between, column="amount", min_value=0, max_value=9),
            one(between, column="amount", min_value=0, strict_min=True),
            one(member, column="kind", value_set=["a"]),
            one(member, column="kind", value_set=[["a"], {"b": 1}]),
            one(missing, column="kind"),
            one(missing, column="amount", mostly=0.5),
            one("expect_table_row_count_to_be_between", min_value=1),
        ],
        "partly": [
            *(one(unique, column=column) for column in ("id", "name")),
            one(missing, column="amount"),
            one(between, column="amount", min_value=0),
            one(member, column="kind", value_set=["a", "b"]),
            reference_rule(owner),
        ],
        "parent": [one(unique, column="id"), one(missing, column="id")],
    }
    suites = {name: [*proven.get(name, []), *some] for name, some in judged.items()}
    with empty.connect(empty.database) as connection:
        assert constraints.split(connection, suites) == (judged, proven)
        execute(connection, "ALTER TABLE public.partly VALIDATE CONSTRAINT partly_owner_fkey")
        assert constraints.split(connection, {"partly": [reference_rule(owner)]})[0] == {}


def write_suite(directory: Path, name: str, *expectations: dict[str, object]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(expectations))
    return directory


def query(text: str, description: str) -> dict[str, object]:
    return {"type": ROWS, "description": description, "kwargs": {"unexpected_rows_query": text}}


def test_what_this_database_lacks_does_not_apply_unless_its_backup_has_it(
    empty: Postgres, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """An older revision; a table of the same name in another schema; a suite of another schema's table."""
    upgrade.work(empty, application_at(), empty.database, "0001")
    postgres_server.sql(
        "INSERT INTO users (username, display_name, password_hash) VALUES ('u', 'U', '!');"
        "ALTER TABLE users DROP COLUMN is_active; CREATE SCHEMA billing; CREATE TABLE billing.evaluations (id int);"
        'CREATE TABLE billing."Odd; 表" (x int, at timestamptz);'
        "INSERT INTO billing.\"Odd; 表\" VALUES (5, now() - interval '30 days')",
        database=empty.database,
    )
    suites = Path(shutil.copytree(SUITES, tmp_path / "suites"))
    between = {"column": "x", "min_value": 6}
    write_suite(
        suites,
        "billing.Odd; 表",
        {"type": "expect_column_values_to_be_between", "kwargs": between},
        {"type": "expect_column_values_to_be_between", "kwargs": {**between, "no_such_word": 1}},
        query("SELECT max(at) FROM {batch} HAVING max(at) < {taken} - interval '1 day'", "rows are fresh"),
    )

    found = run_expectations(empty, empty.database, tmp_path / "a", suites)

    assert "evaluations: there is no table public.evaluations" in found.not_applicable
    assert any(sentence.startswith("users: is_active") for sentence in found.not_applicable)
    assert [sentence.partition(":")[0] for sentence in found.failed] == ["billing.Odd; 表"] * 3
    assert any("could not be judged" in sentence and "no_such_word" in sentence for sentence in found.failed)
    assert any("rows are fresh" in sentence for sentence in found.failed)

    backup = tables_in(["public.evaluations", 'billing."Odd; 表"', "large objects"])
    then = datetime.now(UTC) - timedelta(days=30)
    found = run_expectations(empty, empty.database, tmp_path / "b", suites, contained=backup, taken=then)

    assert "evaluations: the table exists: it is missing, and the backup contains it" in found.failed
    assert not any("rows are fresh" in sentence for sentence in found.failed), "they were, when the backup was taken"


def test_a_query_that_cannot_run_is_a_finding_that_says_why(interview: Postgres, tmp_path: Path) -> None:
    wrong = query("SELECT id FROM {batch} WHERE no_such_column = 1", "")
    suites = write_suite(tmp_path / "suites", "users", wrong)

    found = run_expectations(interview, interview.database, tmp_path / "evidence", suites)

    assert len(found.failed) == 1
    assert "could not be judged" in found.failed[0]
    assert "no_such_column" in found.failed[0]


def test_expectations_cannot_write(interview: Postgres, postgres_server: PostgresServer, tmp_path: Path) -> None:
    writing = query("SELECT nextval('public.candidate_number_seq') FROM {batch}", "")
    suites = write_suite(tmp_path / "suites", "users", writing)

    found = run_expectations(interview, interview.database, tmp_path / "evidence", suites)

    assert "read-only" in found.failed[0]


def test_the_suites_are_readable_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert set(read_suites(SUITES)) >= {"users", "interview_sessions", "interview_messages", "evaluations"}
    write_suite(tmp_path, "users", {"type": "expect_column_values_to_be_uniqe", "kwargs": {}})
    unknown = r"users\.json: entry 1 has the unknown type.*uniqe.*did you mean expect_column_values_to_be_unique"
    with pytest.raises(OpsError, match=unknown):
        read_suites(tmp_path)
    write_suite(tmp_path, "users", {"type": "expect"})
    with pytest.raises(OpsError, match=r"users\.json is not a suite"):
        read_suites(tmp_path)
    with pytest.raises(OpsError, match="no suite"):
        read_suites(tmp_path / "nowhere")


def test_types_of_a_database_s_own_are_judged_whatever_the_server_s_settings(
    interview: Postgres, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """Domains, enums and composites of any schema are no types that SQLAlchemy knows, and with quote_all_identifiers
    even `text` is none."""
    name = interview.database
    postgres_server.sql(
        "CREATE SCHEMA kinds; CREATE DOMAIN kinds.outcome AS text; CREATE TYPE kinds.way AS ENUM ('in', 'out');"
        "CREATE TYPE kinds.pair AS (a int, b text);"
        "CREATE TABLE kinds.events (result kinds.outcome, way kinds.way, pair kinds.pair, place point, note text);"
        "INSERT INTO kinds.events VALUES ('success', 'in', (1, 'x'), '(1,2)', 'n'), ('odd', 'out', NULL, NULL, NULL)",
        database=name,
    )
    suites = write_suite(
        tmp_path / "suites",
        "kinds.events",
        {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "result", "value_set": ["success"]}},
        {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "way", "value_set": ["in", "out"]}},
        {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "way"}},
        {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "note"}},
        query("SELECT 1 FROM {batch} WHERE way NOT IN ('in', 'out')", "every way is known"),
    )
    postgres_server.sql(f'ALTER DATABASE "{name}" SET quote_all_identifiers = on')
    try:
        found = run_expectations(interview, name, tmp_path / "evidence", suites)
        assert [(row.ok, row.observed) for row in found.rows] == [
            (False, "1 of 2 rows: odd"),
            (True, "as expected"),
            (True, "as expected"),
            (False, "1 of 2 rows: None"),
            (True, "as expected"),
        ]
        whole = run_expectations(interview, name, tmp_path / "evidence", SUITES)
        assert whole.failed == ()
    finally:
        postgres_server.sql(f'ALTER DATABASE "{name}" RESET quote_all_identifiers')
        postgres_server.sql("DROP SCHEMA kinds CASCADE", database=name)


def test_only_what_has_changed_is_judged_again_and_docs_are_rendered_later(
    interview: Postgres, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    name, suites = interview.database, set(read_suites(SUITES))
    first = run_expectations(interview, name, tmp_path / "evidence", SUITES, render=False)
    assert (first.ok, first.docs) == (True, None)
    directory = tmp_path / "evidence" / "expectations-1"
    assert not (directory / "index.html").exists()
    assert render_docs(directory) == directory / "index.html"
    assert render_docs(directory) is None, "it was rendered"

    before = read_states(interview, name)
    nothing = run_expectations(interview, name, tmp_path / "evidence", SUITES, since=before)
    assert (nothing.rows, set(nothing.unchanged)) == ((), suites)

    sound = "UPDATE audit_events SET resource = 'x' WHERE id = 1"
    postgres_server.sql(sound, database=name)
    until(lambda: changed(before, read_states(interview, name)), what="the count of that write", seconds=60)
    again = run_expectations(interview, name, tmp_path / "evidence", SUITES, since=before)
    assert again.ok
    assert set(again.unchanged) == {"alembic_version", "users"}, "queries of the other suites read other tables"

    before = read_states(interview, name)
    postgres_server.sql("TRUNCATE alembic_version", database=name)
    broken = run_expectations(interview, name, tmp_path / "evidence", SUITES, since=before, render=False)
    assert [one.partition(":")[0] for one in broken.failed] == ["alembic_version"]
    assert broken.docs, "the run may end with it"
