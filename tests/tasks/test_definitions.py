"""Definitions: what a restore prints otherwise counts as equal, and nothing else does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from blocks.postgres import Postgres
from runbook import shell
from tasks.postgres.casts import canonical
from tasks.postgres.definitions import differences, parse, read_definitions
from tests.servers import PostgresServer

# What the source prints, and what a database prints into which that was restored: PostgreSQL 18.
PRINTED_OTHERWISE = {
    "IN": (
        "CHECK (((v)::text = ANY ((ARRAY['a'::character varying, 'b c'::character varying])::text[])))",
        "CHECK (((v)::text = ANY (ARRAY[('a'::character varying)::text, ('b c'::character varying)::text])))",
    ),
    "brackets and casts that are quoted": (
        """CHECK ((("a(b")::text = ANY ((ARRAY['it''s)'::character varying(3), '::text]'::character varying])::text[])))""",
        """CHECK ((("a(b")::text = ANY (ARRAY[('it''s)'::character varying(3))::text, ('::text]'::character varying)::text])))""",
    ),
    "numbers": (
        "(num = ANY ((ARRAY[(id + 1), (- id), abs(id), ((id)::smallint)::integer, ia[1], NULL::integer])::numeric(5,2)[]))",
        "(num = ANY (ARRAY[((id + 1))::numeric(5,2), ((- id))::numeric(5,2), (abs(id))::numeric(5,2), "
        "(((id)::smallint)::integer)::numeric(5,2), (ia[1])::numeric(5,2), (NULL::integer)::numeric(5,2)]))",
    ),
    "a CASE": (
        "(num = ANY ((ARRAY[\nCASE\n    WHEN m THEN 1\n    ELSE 2\nEND, 3])::double precision[]))",
        "(num = ANY (ARRAY[(\nCASE\n    WHEN m THEN 1\n    ELSE 2\nEND)::double precision, (3)::double precision]))",
    ),
    "arrays in an array": (
        "(tx = ANY ((ARRAY[ARRAY[v, 'q'::character varying], va])::text[]))",
        "(tx = ANY (ARRAY[ARRAY[(v)::text, ('q'::character varying)::text], (va)::text[]]))",
    ),
    "a collation": (
        """(tx = ANY ((ARRAY[(v COLLATE "C"), 'x'::character varying])::text[]))""",
        """(tx = ANY (ARRAY[((v)::text COLLATE "C"), ('x'::character varying)::text]))""",
    ),
    "statistics": (
        "ON id, (v::text = ANY (ARRAY['a'::character varying, v || 'x', id::char(3)::varchar]::text[])) FROM public.t",
        "ON id, (v::text = ANY (ARRAY['a'::character varying::text, (v || 'x')::text, id::char(3)::varchar::text])) FROM public.t",
    ),
    "a constant without a name": ("(SELECT 'x'::text, NULL::integer)", "(SELECT 'x'::text AS text, NULL::integer AS int4)"),
}  # fmt: skip


@pytest.mark.parametrize("texts", PRINTED_OTHERWISE.values(), ids=PRINTED_OTHERWISE.keys())
def test_what_a_restore_prints_otherwise_is_equal(texts: tuple[str, str]) -> None:
    source, restored = texts
    assert source != restored
    assert differences({"x": source}, {"x": restored}) == []
    assert differences({"x": restored}, {"x": source}) == []


NOT_EQUAL = {
    "grouped otherwise": ("CHECK (((a OR b) AND c))", "CHECK ((a OR (b AND c)))"),
    "another order of operations": ("DEFAULT ((1 + 2) * 3)", "DEFAULT (1 + (2 * 3))"),
    "a blank in a text": ("DEFAULT 'a b'::text", "DEFAULT 'ab'::text"),
    "parentheses in a text": ("DEFAULT '(a)'::text", "DEFAULT 'a'::text"),
    "a cast in a text": ("DEFAULT 'a::text'::text", "DEFAULT 'a'::text"),
    "a quoted name": ('CHECK ("a b")', 'CHECK ("ab")'),
    "a function's text": ("AS $$ RETURN 'a b' $$", "AS $$ RETURN 'ab' $$"),
    "a function's blanks": ("AS $x$\nRETURN 1;\n$x$", "AS $x$\nRETURN  1;\n$x$"),
    "an array's cast in a function's text": (
        "AS $$ SELECT (ARRAY['a'::varchar])::text[] $$",
        "AS $$ SELECT ARRAY[('a'::varchar)::text] $$",
    ),
    "a cast that is missing": ("CHECK (((v)::text = 'a'::text))", "CHECK ((v = 'a'::text))"),
    "a cast to another length": ("(v)::character varying(3)", "(v)::character varying(5)"),
    "an array's cast to another type": ("((ARRAY[v, w])::text[])", "(ARRAY[(v)::character varying, (w)::character varying])"),
    "an array's cast at some elements": ("((ARRAY[v, w])::text[])", "(ARRAY[(v)::text, w])"),
    "another element": ("((ARRAY['a'::varchar, 'b'::varchar])::text[])", "(ARRAY[('a'::varchar)::text, ('c'::varchar)::text])"),
    "a cast of the last operand": ("(ARRAY[(a || b)::text])", "(ARRAY[a || b::text])"),
    "a cast of what NOT is applied to": ("(ARRAY[(NOT (a))::text])", "(ARRAY[NOT (a)::text])"),
    "a cast of the last CASE": ("(ARRAY[(CASE END + CASE END)::text])", "(ARRAY[CASE END + CASE END::text])"),
    "a cast of a subscript": ("((ARRAY[v, w])::text[])[1]", "(((ARRAY[v, w])[1])::text)"),
    "an operator in two": ("(a @- b)", "(a @ - b)"),
    "a column's own name": ("(SELECT v AS text)", "(SELECT v)"),
    "another name of a constant": ("(SELECT 'x'::text AS name)", "(SELECT 'x'::text)"),
    "brackets that do not match": ("((a]", "((a)"),
}  # fmt: skip


@pytest.mark.parametrize("texts", NOT_EQUAL.values(), ids=NOT_EQUAL.keys())
def test_nothing_else_is_equal(texts: tuple[str, str]) -> None:
    expected, actual = texts
    assert len(differences({"x": expected}, {"x": actual})) == 1
    assert len(differences({"x": actual}, {"x": expected})) == 1


def test_depth_and_length_cost_nothing() -> None:
    deep = "(" * 5_000 + "a" + " || 'b c')" * 5_000
    assert canonical(deep) != canonical(deep.replace("b c'", "bc'", 1))
    long = "((ARRAY[" + ", ".join(f"'{n}'::character varying" for n in range(20_000)) + "])::text[])"
    assert canonical(long).count("::") == 40_000


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
    assert differences(printed(), printed(key="y")) == []
    for changed in (printed(comment="!"), printed(middle="\n"), printed(middle="\n\x85\n"), printed(middle="\n-- \n")):
        assert len(differences(printed(), changed)) == 1


OBJECTS = """
CREATE DOMAIN code AS varchar(5) CHECK (VALUE IN ('a', 'b'));
CREATE TABLE t (
    id int, v varchar(10) DEFAULT 'a b', w varchar, tx text, c char(3), num numeric(5, 2), f float8, va varchar[], m bool,
    g text GENERATED ALWAYS AS (CASE WHEN v IN ('a', 'b') THEN 'in' ELSE v END) STORED,
    CHECK ((v IN ('a', 'it''s)', 'back\\slash') OR id > 1) AND m), CHECK (v NOT IN ('a', 'b') AND c IN ('a', 'b')),
    CHECK (num = ANY (ARRAY[id + 1, -id, abs(id), id::int2::int, NULL])), CHECK (f = ANY (ARRAY[[1, 2], [id, 4]])),
    CHECK (tx = ANY (ARRAY[ARRAY['a', 'b']::varchar[], va])), CHECK (tx = ANY (ARRAY[v COLLATE "C", 'x'])),
    CHECK (num = ANY (ARRAY[CASE WHEN m THEN 1 ELSE 2 END, 3])), CHECK (va[1] IN ('a', 'b') AND id::varchar IN ('1', '2')));
CREATE INDEX ON t ((v IN ('a', 'b'))) WHERE num = ANY (ARRAY[1, 2]);
CREATE STATISTICS s ON (v IN ('a', 'b')), (num = ANY (ARRAY[id + 1, id, (m IS NULL)::int])) FROM t;
CREATE VIEW vw AS SELECT v FROM t WHERE v IN ('a', 'b') AND (m OR NOT (tx IN ('q', 'r') AND id IN (1, 2)));
CREATE VIEW unnamed AS WITH q(a, b, c) AS (SELECT 'x'::varchar, 1, 'z' UNION SELECT 'y', 2, NULL) SELECT *, (SELECT 'f') FROM q;
CREATE FUNCTION f() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT v FROM t WHERE v IN ('a', 'b') AND v <> (SELECT 'x'); END;
CREATE FUNCTION tg() RETURNS trigger LANGUAGE plpgsql AS $$
-- a comment

BEGIN IF NEW.v IN ('a', 'b') THEN RETURN NEW; END IF; RETURN OLD; END $$;
CREATE TRIGGER tr BEFORE UPDATE ON t FOR EACH ROW WHEN (NEW.v IN ('a', 'b')) EXECUTE FUNCTION tg();
CREATE POLICY p ON t USING (v IN ('a', 'b'));
CREATE RULE r AS ON UPDATE TO t WHERE NEW.v IN ('a', 'b') DO ALSO NOTHING;
COMMENT ON TABLE t IS 'two

paragraphs';
"""


@pytest.fixture
def rounds(postgres_server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[list[Postgres]]:
    """Three empty databases."""
    names = [f"rounds_{n}" for n in range(3)]
    for name in names:
        postgres_server.create_database(name)
    yield [postgres_server.block(name) for name in names]
    for name in names:
        postgres_server.drop_database(name)


def test_after_one_and_after_two_restores_definitions_are_equal(
    rounds: list[Postgres], postgres_server: PostgresServer
) -> None:
    postgres_server.sql(OBJECTS, database="rounds_0")
    found = [read_definitions(rounds[0], "rounds_0")]
    for source, target in ((0, 1), (1, 2)):
        environment = {**os.environ, **rounds[0].environment()}
        dump = [rounds[0].program("pg_dump"), "--schema-only", f"--dbname=rounds_{source}"]
        printed = shell.run(dump, environment=environment).stdout
        statements = "\n".join(line for line in printed.split("\n") if not line.startswith("\\"))
        postgres_server.sql(statements, database=f"rounds_{target}")
        found.append(read_definitions(rounds[0], f"rounds_{target}"))
    first, second, third = found
    assert [key.split()[0] for key in first if first[key] != second[key]] == [
        *("DOMAIN", "TABLE", "FUNCTION", "VIEW", "VIEW", "INDEX", "STATISTICS", "RULE", "TRIGGER", "POLICY")
    ]
    assert differences(first, second) == []
    assert differences(first, third) == []
    assert second == third
