"""Definitions: what a restore prints differently counts as equal, and nothing else does. PostgreSQL judges."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psycopg
import pytest

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import OpsError
from tasks.postgres.content import equivalence
from tasks.postgres.content.comparison import compare
from tasks.postgres.content.content import DatabaseContent, content_of
from tasks.postgres.content.definitions import differences, parse, read_definitions
from tasks.postgres.content.equivalence import JudgedDefinition, compare_definitions
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.tables.find import FoundTable, known_in, resolve, table_of
from tasks.postgres.tables.pairs import settle_generated, unequal_columns
from tests.fixtures.postgres.definition_classes import BEFORE, CHANGES
from tests.fixtures.postgres.definitions import MUTATIONS, OBJECTS
from tests.fixtures.servers import PostgresServer

PRINTED = """--
-- Name: f(); Type: FUNCTION; Schema: public; Owner: me
--

CREATE FUNCTION public.f() RETURNS text
    AS $$

-- a comment{comment}
SET default_tablespace = 'x';
SELECT 'a{middle}b' $$;


ALTER FUNCTION public.f() OWNER TO me;

SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: t; Type: TABLE; Schema: public; Owner: me
--

CREATE TABLE public.t ();


--
-- PostgreSQL database dump complete
--

\\unrestrict {key}
"""


def test_what_belongs_to_the_session_is_left_out_and_what_belongs_to_the_object_is_not() -> None:
    def printed(comment: str = "", middle: str = "\n\n", key: str = "x") -> dict[str, str]:
        return parse(PRINTED.replace("{comment}", comment).replace("{middle}", middle).replace("{key}", key))

    function, table = "FUNCTION public.f() (owner me)", "TABLE public.t (owner me)"
    assert printed()[table] == "CREATE TABLE public.t ();\n"
    assert printed()[function].endswith("OWNER TO me;\n")
    assert "SET default_tablespace = 'x';" in printed()[function]
    assert differences(printed(), printed(key="y"), JudgedDefinition()) == []
    for changed in (printed(comment="!"), printed(middle="\n"), printed(middle="\n\x85\n"), printed(middle="\n-- \n")):
        assert len(differences(printed(), changed, JudgedDefinition())) == 1


@dataclass(frozen=True)
class Rounds:
    """A database (0), its restored copy (1), a restored copy of that (2), and their definitions."""

    server: PostgresServer
    postgres: Postgres
    names: tuple[str, str, str]
    texts: tuple[dict[str, str], dict[str, str], dict[str, str]]

    def judged(self, expected: dict[str, str], copy: int = 1) -> list[str]:
        """How the copy differs from the expected definitions."""
        found = {key: text for key, text in self.texts[copy].items() if key in expected}
        return differences(expected, found, compare_definitions.work(self.postgres, self.names[copy], expected, found))

    def judged_text(self, key: str, text: str) -> list[str]:
        return self.judged({key: text})


# What a copy may have to endure while it is judged: settings and event triggers of its own.
HOSTILE = """
ALTER DATABASE rounds_1 SET default_transaction_read_only = on;
ALTER DATABASE rounds_1 SET transform_null_equals = on;
ALTER DATABASE rounds_1 SET timezone = 'Asia/Tokyo';
ALTER DATABASE rounds_1 SET DateStyle = 'German';
"""
EVENT_TRIGGER = """
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no definitions here'; END $$;
CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse();
ALTER EVENT TRIGGER refuse ENABLE ALWAYS;
"""


@pytest.fixture(scope="module")
def rounds(postgres_server: PostgresServer) -> Iterator[Rounds]:
    names = ("rounds_0", "rounds_1", "rounds_2")
    for name in names:
        postgres_server.create_database(name)
    postgres = postgres_server.block(names[0])
    postgres_server.sql(OBJECTS + EVENT_TRIGGER, database=names[0])
    texts = [read_definitions(postgres, names[0])]
    for source, target in itertools.pairwise(names):
        environment = {**os.environ, **postgres.environment()}
        dump = [postgres.program("pg_dump"), "--schema-only", f"--dbname={source}"]
        printed = shell.run(dump, environment=environment).stdout
        statements = "\n".join(line for line in printed.split("\n") if not line.startswith("\\"))
        postgres_server.sql(statements, database=target)
        texts.append(read_definitions(postgres, target))
    for statement in HOSTILE.strip().splitlines():
        postgres_server.sql(statement)
    first, second, third = texts
    yield Rounds(postgres_server, postgres, names, (first, second, third))
    for name in names:
        postgres_server.drop_database(name)


KINDS = {
    *("DOMAIN", "TABLE", "FUNCTION", "PROCEDURE", "VIEW", "MATERIALIZED", "INDEX", "CONSTRAINT", "CHECK", "STATISTICS"),
    *("RULE", "TRIGGER", "POLICY", "PUBLICATION", "DEFAULT"),
}


def test_after_one_and_after_two_restores_definitions_are_equal(rounds: Rounds) -> None:
    first, second, third = rounds.texts
    differing = [key for key in first if first[key] != second[key]]
    assert {key.split()[0] for key in differing} == KINDS, "the kinds that hold an expression"
    assert len(differing) >= 30
    assert rounds.judged(first) == []
    assert rounds.judged(first, copy=2) == []
    assert rounds.judged(second, copy=2) == []
    assert second == third, "nothing changes after the first restore"


def test_each_of_a_hundred_changes_is_found(rounds: Rounds) -> None:
    """Each change at its first place in every third definition that it can be made to; in one call, as a restore does."""
    first, second, _ = rounds.texts
    changed = {
        f"{key} {number}": (re.sub(pattern, new, first[key], count=1), second[key])
        for number, (pattern, new) in enumerate(MUTATIONS)
        for key in [key for key in first if re.search(pattern, first[key]) and not key.startswith("COMMENT")][::3]
    }
    assert {int(key.rpartition(" ")[2]) for key in changed} == {*range(len(MUTATIONS))}
    assert all(text != first[key.rpartition(" ")[0]] for key, (text, _) in changed.items())
    assert len(changed) >= 120
    expected = {key: text for key, (text, _) in changed.items()}
    copy = {key: text for key, (_, text) in changed.items()}
    judged = compare_definitions.work(rounds.postgres, rounds.names[1], expected, copy)
    assert judged.equal == frozenset()
    said = differences(expected, copy, judged)
    assert len(said) == len(changed)
    assert any("PostgreSQL cannot create the backup's text: syntax error" in one for one in said)


# Definitions that would run code or reach further than their kind, of an altered manifest. Numbers that a sequence
# gives out are not rolled back.
INTRUDERS = {
    "a materialised view with rows": (
        "MATERIALIZED VIEW public.mv",
        "CREATE MATERIALIZED VIEW public.mv AS SELECT nextval('public.t_n_seq') AS id, 1 AS s;",
    ),
    "a table of a query": ("TABLE public.plain", "CREATE TABLE public.plain (k) AS SELECT nextval('public.t_n_seq');"),
    "a bound that is computed": (
        "TABLE ATTACH public.parts_1",
        "ALTER TABLE ONLY public.parts ATTACH PARTITION public.parts_1 FOR VALUES FROM (nextval('public.t_n_seq'), NULL) TO (3, NULL);",
    ),
    "a partition": (
        "TABLE public.plain",
        "CREATE TABLE public.plain PARTITION /* */ OF public.parts FOR VALUES FROM (nextval('public.t_n_seq'), NULL) TO (3, NULL);",
    ),
    "a function of a library": (
        "FUNCTION public.r(integer)",
        "CREATE FUNCTION public.r(i integer) RETURNS boolean\n    LANGUAGE c\n    AS '/nowhere/lib.so', 'r';",
    ),
    "two statements": (
        "VIEW public.over",
        "CREATE VIEW public.over AS SELECT 1 AS v; SELECT nextval('public.t_n_seq');",
    ),
    "another statement": ("VIEW public.over", "DO $$ BEGIN PERFORM nextval('public.t_n_seq'); END $$;"),
    "another object": ("VIEW public.over", "CREATE VIEW public.vw AS\n SELECT v\n   FROM public.t;"),
}


def test_nothing_runs_and_nothing_stays_when_a_text_is_judged(rounds: Rounds) -> None:
    server, name, texts = rounds.server, rounds.names[1], rounds.texts[1]
    keys = {kind: next(key for key in texts if key.startswith(f"{kind} (")) for kind, _ in INTRUDERS.values()}
    numbers = "SELECT last_value, is_called FROM public.t_n_seq"
    before = server.sql(numbers, database=name)
    for what, (kind, text) in INTRUDERS.items():
        owner = texts[keys[kind]].partition("\n\n\n")[2]
        assert len(rounds.judged_text(keys[kind], text + ("\n\n\n" + owner if owner else "\n"))) == 1, what
    assert server.sql(numbers, database=name) == before
    assert read_definitions(rounds.postgres, name) != {}
    left = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'interview%'"
    assert server.sql(left, database=name) == []
    assert server.sql("SELECT evtenabled FROM pg_event_trigger", database=name) == [("A",)]


def test_a_lock_of_somebody_else_is_reported(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(equivalence._SETTINGS, "lock_timeout", "100ms")
    with psycopg.connect(rounds.postgres.url(rounds.names[1], as_application=False)) as other:
        other.execute("LOCK TABLE t IN ACCESS SHARE MODE")
        with pytest.raises(OpsError, match="the lock was not available"):
            rounds.judged(rounds.texts[0])


def test_a_generated_column_is_judged_by_its_expression(rounds: Rounds) -> None:
    """For restores of single tables and for salvage: both databases' texts, judged in one of them."""
    source, copy = (one_table(rounds, database) for database in rounds.names[:2])
    assert unequal_columns(copy, source) != []
    assert unequal_columns(copy, settle_generated(rounds.postgres, rounds.names[1], copy, source)) == []
    columns = [replace(one, generated=one.generated.replace("'in'", "'out'")) for one in source.columns]
    changed = settle_generated(rounds.postgres, rounds.names[1], copy, replace(source, columns=tuple(columns)))
    assert [text.split()[1] for text in unequal_columns(copy, changed)] == ["g"]


def one_table(rounds: Rounds, database: str) -> FoundTable:
    with pinned(rounds.postgres, database) as connection:
        (known,) = resolve(["public.t"], known_in(connection))
        return table_of(connection, known)


SUBSCRIPTION = "CREATE SUBSCRIPTION {subscription} CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false, slot_name = NONE)"


def test_a_change_of_each_class_of_objects_is_found_or_named_as_not_compared(postgres_server: PostgresServer) -> None:
    """Everything that pg_dump prints, or that a restore could leave out: once each, in one comparison."""
    base, changed = "classes_0", "classes_1"
    wanted = [row[:3] for row in CHANGES if row[3] <= int(str(postgres_server.sql("SHOW server_version_num")[0][0]))]
    for name in (base, changed):
        postgres_server.create_database(name)
    try:
        for database in (base, changed):
            with postgres_server.connect(database) as connection:
                for statement in (BEFORE, *(made for _, made, _ in wanted), SUBSCRIPTION):
                    connection.execute(
                        statement.format(subscription=database).encode() if "{s" in statement else statement.encode()
                    )
        postgres = postgres_server.block(base)
        before = content_of(postgres, base)
        with postgres_server.connect(changed) as connection:
            assert _found(postgres, before, content_of(postgres, changed)) == "", "nothing was changed yet"
            for _, _, change in wanted:
                connection.execute(change.replace("{subscription}", changed).encode())
        said = _found(postgres, before, content_of(postgres, changed))
        named = "\n".join((said, *before.not_compared))
        names = [name.replace("{subscription}", base) for name, _, _ in wanted]
        assert [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", named)] == []
    finally:
        for database in (base, changed):
            for (name,) in postgres_server.sql("SELECT subname FROM pg_subscription WHERE subname = %s", database):
                postgres_server.sql(f"DROP SUBSCRIPTION {name}", database=database)
            postgres_server.drop_database(database)


def _found(postgres: Postgres, expected: DatabaseContent, actual: DatabaseContent) -> str:
    texts = compare_definitions.work(postgres, "classes_1", expected.definitions, actual.definitions)
    return "\n".join(compare(expected, actual, texts).differences)
