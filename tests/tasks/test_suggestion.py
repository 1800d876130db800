"""Suggested expectations hold in the database that they were made from, and find what is damaged later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blocks.postgres.server import Postgres
from tasks.gx.declared import DeclaredBounds, bounds_in, read_tables, values_in
from tasks.gx.suggestion import SUGGESTED, left_out, suggest, write
from tasks.gx.suites import read_suites
from tasks.integrity import run_expectations
from tests.database.conftest import HARD
from tests.fixtures.servers import PostgresServer

# Behind them a part of the sentence that must be among what is broken.
DAMAGE = {
    "ALTER TABLE users DROP CONSTRAINT users_username_key; UPDATE users SET username = 'u1' WHERE id = 2": "users: no two rows have the same username",
    "ALTER TABLE users ALTER display_name DROP NOT NULL; UPDATE users SET display_name = NULL WHERE id = 7": "users: display_name values to not be null",
    "DELETE FROM interview_sessions WHERE user_id = 4": "interview_messages: every session_id is in public.interview_sessions",
    "ALTER TABLE evaluations DROP CONSTRAINT evaluations_technical_check; UPDATE evaluations SET technical = 101 WHERE id = 1": "evaluations: technical values to be between",
    "UPDATE interview_messages SET tokens = 2000000000 WHERE id = 1": "interview_messages: tokens values to be between",
    "ALTER TABLE interview_messages DROP CONSTRAINT interview_messages_role_check; UPDATE interview_messages SET role = 'robot' WHERE id = 9": "interview_messages: role values to be in set",
    "UPDATE users SET created_at = '1970-01-01' WHERE id = 3": "users: times are plausible",
    "UPDATE audit_events SET occurred_at = occurred_at - interval '10 days'": "audit_events: the newest occurred_at is at most 7 days older",
    "DELETE FROM evaluations WHERE id > 2": "evaluations: table row count to be between",
}


def proposed(postgres: Postgres, directory: Path, **sizes: int) -> Path:
    directory.mkdir()
    for table in read_tables(postgres, postgres.database, **sizes):
        write(directory, table, suggest(table))
    return directory


def test_they_hold_and_find_damage(interview: Postgres, postgres_server: PostgresServer, tmp_path: Path) -> None:
    suites = proposed(interview, tmp_path / "suites")
    assert set(read_suites(suites)) >= {"users", "interview_sessions", "interview_messages", "evaluations"}
    assert run_expectations(interview, interview.database, tmp_path / "sound", suites).failed == ()

    for statement in DAMAGE:
        postgres_server.sql(f"SET session_replication_role = replica; {statement}", database=interview.database)
    failed = run_expectations(interview, interview.database, tmp_path / "damaged", suites).failed

    for sentence in DAMAGE.values():
        assert any(one.startswith(sentence) for one in failed), (
            sentence,
            (suites / "audit_events.json").read_text(),
            [f for f in failed if "audit" in f],
        )


def test_they_hold_in_a_schema_that_is_hard_and_for_tables_too_large_to_read(
    empty: Postgres, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """Odd names, domains, partitions, inheritance, infinities, large numbers, an operator outside of pg_catalog."""
    postgres_server.sql(
        HARD
        + 'CREATE SCHEMA billing; CREATE TABLE billing."Order: {x}" (id bigint PRIMARY KEY, total numeric, due date,'
        ' "at: {y}" timestamptz, ratio float8);'
        "INSERT INTO billing.\"Order: {x}\" VALUES (1, 5000000000.5, 'infinity', now(), 'NaN'), (2, -3, '2099-01-01', NULL, 1);"
        'CREATE TABLE billing.lines (ord bigint REFERENCES billing."Order: {x}", n int, PRIMARY KEY (ord, n));'
        "INSERT INTO billing.lines VALUES (1, 1), (1, 2); ANALYZE",
        database=empty.database,
    )
    suites = proposed(empty, tmp_path / "read")
    found = run_expectations(empty, empty.database, tmp_path / "a", suites)
    assert found.failed == ()
    assert {row.table for row in found.rows} >= {
        "people",
        "answers",
        "Empty Table",
        "billing.Order: {x}",
        "billing.lines",
    }

    large = proposed(empty, tmp_path / "large", scan_bytes=0)
    assert run_expectations(empty, empty.database, tmp_path / "b", large).failed == ()
    (people,) = [one for one in read_tables(empty, empty.database, scan_bytes=0) if one.name == "people"]
    assert people.rows == 2000
    assert "born" in left_out(people)
    assert "share" not in people.numbers


def test_what_somebody_reviewed_is_not_written_over(interview: Postgres, tmp_path: Path) -> None:
    table = next(one for one in read_tables(interview, interview.database) if one.name == "users")
    reviewed = tmp_path / "users.json"
    reviewed.write_text("[]\n")
    assert "unchanged" in write(tmp_path, table, suggest(table))
    assert reviewed.read_text() == "[]\n"
    assert json.loads((tmp_path / f"users.json{SUGGESTED}").read_text()) == suggest(table)
    reviewed.write_text((tmp_path / f"users.json{SUGGESTED}").read_text())
    assert "as suggested" in write(tmp_path, table, suggest(table))
    assert list(read_suites(tmp_path)) == ["users"], "what waits for review is not judged by"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("((score >= 0) AND (score <= 1000))", DeclaredBounds(0, 1000)),
        ("(price > (0)::numeric)", DeclaredBounds(least=0, open_least=True)),
        ("(\"Odd Name\" < '1.5'::double precision)", DeclaredBounds(most=1.5, open_most=True)),
        ("((x >= '-5'::integer) AND (x <= 5))", DeclaredBounds(-5, 5)),
        ("((x >= 0) OR (x <= 5))", None),
        ("(x <> 0)", None),
        ("((x % 2) >= 0)", None),
        ("(abs(x) <= 5)", None),
        ("(length(name) > 3)", None),
        ("((price)::integer >= 0)", None),
        ("((price)::numeric >= 0.5)", DeclaredBounds(least=0.5)),
        ("(ended >= started)", None),
    ],
)
def test_simple_checks_are_understood_and_no_others(expression: str, expected: DeclaredBounds | None) -> None:
    assert bounds_in(expression) == expected


def test_lists_of_checks() -> None:
    assert values_in("(role = ANY (ARRAY['user'::text, 'it''s, so'::text]))") == ("user", "it's, so")
    cast = "((status)::text = ANY ((ARRAY['new'::character varying, 'old'::character varying])::text[]))"
    assert values_in(cast) == ("new", "old")
    assert values_in("((role)::bpchar = ANY (ARRAY['user'::bpchar]))") == (), "blanks at the end would count as none"
    assert values_in("(lower(role) = ANY (ARRAY['user'::text]))") == ()
    assert values_in("(role <> ALL (ARRAY['user'::text]))") == ()
