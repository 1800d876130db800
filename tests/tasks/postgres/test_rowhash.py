"""The hash of rows: equal texts have equal hashes, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blocks.postgres.server import Postgres
from tasks.postgres.content.content import content_of
from tasks.postgres.content.sums import TableSum
from tests.fixtures.servers import PostgresServer

# Two tables each whose rows differ in one way that a careless hash would miss.
DIFFERENT = {
    "NULL and the empty text": ("t text", "(NULL)", "('')"),
    "which column is NULL": ("a int, b int", "(NULL, 1)", "(1, NULL)"),
    "where a column ends": ("a text, b text", "('ab', 'c')", "('a', 'bc')"),
    "values of one type in each other's column": ("a text, b text", "('x', 'y')", "('y', 'x')"),
    "values that changed their rows": ("a int, b int", "(1, 10), (2, 20)", "(1, 20), (2, 10)"),
    "scale of a numeric": ("n numeric", "(1.0)", "(1.00)"),
    "an interval's units": ("i interval", "('1 mon')", "('30 days')"),
    "case of an enum's text": ("a text", "('ok')", "('OK')"),
    "a NULL among an array's items": ("a text[]", "(ARRAY['a', NULL])", "(ARRAY['a', 'NULL'])"),
    "a composite of NULLs and NULL": ("c pair", "(ROW(NULL, NULL)::pair)", "(NULL)"),
    "key order of json": ("j json", """('{"a": 1, "b": 2}')""", """('{"b": 2, "a": 1}')"""),
    "the last bit of a double": ("d float8", "(0.1)", "(0.1 + 1e-17 + 1e-17)"),
    "what an opaque cast to text hides": ("s shy", "(ROW(1)::shy)", "(ROW(2)::shy)"),
    "a row twice": ("a int", "(1)", "(1), (1)"),
}
TYPES = """
CREATE TYPE pair AS (a int, b int);
CREATE TYPE shy AS (n int);
CREATE FUNCTION hide(shy) RETURNS text IMMUTABLE LANGUAGE sql RETURN 'nothing to see';
CREATE CAST (shy AS text) WITH FUNCTION hide(shy);
"""


@pytest.fixture
def postgres(postgres_server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[Postgres]:
    name = f"rows_{abs(hash(request.node.name)) % 10**8}"
    postgres_server.create_database(name)
    postgres_server.sql(TYPES, database=name)
    yield postgres_server.block(name)
    postgres_server.drop_database(name)


def sum_of(postgres: Postgres, table: str) -> TableSum:
    return content_of(postgres, postgres.database).tables[f"public.{table}"]


@pytest.mark.parametrize(("columns", "one", "other"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_rows_that_differ_have_other_hashes(
    postgres: Postgres, postgres_server: PostgresServer, columns: str, one: str, other: str
) -> None:
    for table, values in (("one", one), ("same", one), ("other", other)):
        statement = f"CREATE TABLE {table} ({columns}); INSERT INTO {table} VALUES {values}"
        postgres_server.sql(statement, database=postgres.database)

    assert sum_of(postgres, "one").hash == sum_of(postgres, "same").hash
    assert sum_of(postgres, "one").hash != sum_of(postgres, "other").hash


def test_neither_the_order_of_rows_nor_that_of_columns_matters(
    postgres: Postgres, postgres_server: PostgresServer
) -> None:
    postgres_server.sql(
        "CREATE TABLE one (a int, \"B b\" text, gone int); INSERT INTO one VALUES (1, 'x', 0), (2, NULL, 0);"
        "ALTER TABLE one DROP COLUMN gone;"
        "CREATE TABLE other (\"B b\" text, a int); INSERT INTO other VALUES (NULL, 2), ('x', 1)",
        database=postgres.database,
    )

    assert sum_of(postgres, "one").hash == sum_of(postgres, "other").hash


def test_tables_without_columns_and_with_as_many_as_there_can_be(
    postgres: Postgres, postgres_server: PostgresServer
) -> None:
    columns = ", ".join(f"c{number} smallint" for number in range(1600))
    postgres_server.sql(
        f"CREATE TABLE bare (); INSERT INTO bare DEFAULT VALUES; CREATE TABLE wide ({columns});"
        "INSERT INTO wide (c1599) VALUES (1)",
        database=postgres.database,
    )

    assert sum_of(postgres, "bare").rows == 1
    assert sum_of(postgres, "wide").rows == 1
