"""A dump as text is SQL and rows, and no command to psql: what is hidden in one is found, what pg_dump writes is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.database.restore import restore_database
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from tasks.postgres.dump import plain as plain_module
from tasks.postgres.dump.plain import PlainPart, lines_of, restricts, run_plain
from tests.database.conftest import NAME, Trial
from tests.database.restore.test_foreign import dump, plain

__all__ = ["plain"]  # a fixture
TRAILER = "--\n-- PostgreSQL database dump complete\n"

COMMANDS = {
    "connect": "\\connect {live}\nDELETE FROM plain_people;",
    "shell": "\\! touch {mark}",
    "include": "\\i {include}",
    "copy": "\\copy plain_people (name) FROM PROGRAM 'touch {mark}; echo x'",
    "output": "\\o | touch {mark}",
    "behind a statement": "SELECT 1 \\! touch {mark}",
    "in the middle of one": "SELECT 1,\n  \\! touch {mark}\n  2;",
    "gexec": "SELECT 'DELETE FROM plain_people' \\gexec",
    "indented": "   \\! touch {mark}",
    "behind a closed text": "SELECT 'it''s', $a$ $$ ' $a$, \"x\"\"\" \\! touch {mark}",
    "behind a comment": "/* /* nested */ ' */ \\! touch {mark}",
    "behind a carriage return": "-- a comment\r\\! touch {mark}",
    "in a text that escapes": "SELECT E'\\'' \\! touch {mark}\n--'",
    "in one that goes on": "SELECT E'a'\n'\\'' \\! touch {mark}\n--'",
    "in one that is doubled": "SELECT E'a''\\'' \\! touch {mark}\n--'",
    "unrestricted": "\\unrestrict {word}\n\\! touch {mark}",
    "behind a dollar in a name": "SELECT 1 AS a$b$c;\n\\! touch {mark}",
    "in rows that are none": "CREATE FUNCTION f() RETURNS int BEGIN;\nCOPY t FROM stdin;\n\\! touch {mark}\n\\.",
    "in rows behind a parenthesis": "SELECT (1;\nCOPY plain_people FROM stdin;\n\\! touch {mark}\n\\.",
    "in other rows": "copy plain_people (name) from stdin;\n'\n\\.\n\\! touch {mark}\n--'",
    "of the server": "COPY plain_people (name) FROM PROGRAM 'touch {mark}; echo x';",
    "behind a NUL": "SELECT '\0\n';\n\\! touch {mark}\n--'",
}


@pytest.mark.parametrize(("what", "into"), [*((what, "_new") for what in COMMANDS), ("connect", ""), ("shell", "")])
def test_no_command_reaches_psql(plain: Trial, what: str, into: str, tmp_path: Path) -> None:
    path, mark, include, oid = dump(plain, "a.sql"), tmp_path / "mark", tmp_path / "include", plain.oid()
    include.write_text("DELETE FROM plain_people;")
    text = path.read_text()
    word = next((line.split()[1] for line in text.splitlines() if line.startswith("\\restrict ")), "x")
    seeded = COMMANDS[what].format(live=plain.database, mark=mark, include=include, word=word)
    assert TRAILER in text
    path.write_text(text.replace(TRAILER, f"{seeded}\n{TRAILER}"))
    target = f"{plain.database}{into}" if into else ""
    with pytest.raises(
        RunbookFailed, match=r"a\.sql: line \d+ (is a|contains a|is not a COPY of pg_dump).*Nothing was run"
    ):
        restore_database.fn(NAME, backup="a.sql", into=target, confirm=NAME)
    assert plain.oid() == oid
    assert plain.sql("SELECT count(*) FROM plain_people") == [(1000,)]
    assert not mark.exists()
    assert [name for name in plain.databases() if name.startswith(plain.database)] == [plain.database]


def test_psql_itself_refuses_what_would_be_overlooked(
    plain: Trial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that is too old to do so is told of."""
    if not restricts(plain.environment.postgres):
        dump(plain, "good.sql")
        report = restore_database.fn(NAME, backup="good.sql")
        assert any(found.name == "psql" and found.status is Status.WARN for found in report.findings)
        return
    path, mark = tmp_path / "a.sql", tmp_path / "mark"
    path.write_text(f"DELETE FROM plain_people;\n\\! touch {mark}\n")
    unread = [(PlainPart.SQL, line) for line in path.read_bytes().splitlines(keepends=True)]
    monkeypatch.setattr(plain_module, "lines_of", lambda _: iter(unread))
    with pytest.raises(OpsError, match="restrict"):
        run_plain(plain.environment.postgres, path, plain.database, {}, "")
    assert not mark.exists()
    assert plain.sql("SELECT count(*) FROM plain_people") == [(1000,)], "what came before it is undone"


def test_rows_are_rows_whatever_they_look_like(tmp_path: Path) -> None:
    """A row of 64 KiB is read in pieces: a piece that looks like the end of the rows is none."""
    path = tmp_path / "a.sql"
    rows = [b"x" * 65535 + b"\\\\.\n", b"\\! touch\n", b"COPY x FROM stdin;\n", b"'\n", b"\\.\n"]
    path.write_bytes(b"COPY public.t (a) FROM stdin;\n" + b"".join(rows) + b"SELECT 1;\n\\unrestrict abc\n")
    found = list(lines_of(path))
    assert b"".join(line for part, line in found if part is PlainPart.ROWS) == b"".join(rows)
    assert [line for part, line in found if part is PlainPart.SQL] == [
        b"COPY public.t (a) FROM stdin;\n",
        b"SELECT 1;\n",
    ]


ODD = r"""
SET ROLE grc_user;
CREATE FUNCTION slashes() RETURNS text LANGUAGE sql AS $$ SELECT '
\! touch x
\connect postgres
COPY people FROM stdin;
\.
' $$;
CREATE FUNCTION quoted() RETURNS text LANGUAGE sql AS 'SELECT $a$
\unrestrict x
it''s; $b$ $a$';
CREATE FUNCTION counted(n int) RETURNS int LANGUAGE sql
BEGIN ATOMIC
    SELECT CASE WHEN n > 0 THEN 1 ELSE 2 END;
    SELECT 3;
END;
CREATE TABLE "back\slash; $$ -- /*" ("a
\b" text DEFAULT E'\\ ''\n\\connect x', "begin" text);
INSERT INTO "back\slash; $$ -- /*" VALUES (repeat('x', 65535) || '\.', E'\n\\.\n\\! touch'), ('''', '"'), ('\.', '$$');
COMMENT ON TABLE "back\slash; $$ -- /*" IS E'a comment\n\\! touch; -- /* $$ "';
RESET ROLE;
"""


@pytest.mark.parametrize("options", [(), ("--inserts",), ("--column-inserts", "--quote-all-identifiers")])
def test_what_pg_dump_writes_is_no_false_alarm(plain: Trial, options: tuple[str, ...]) -> None:
    plain.sql(ODD)
    path = dump(plain, "a.sql", *options)
    assert sum(line.startswith("\\") for line in path.read_text().splitlines()) > 5
    before = plain.sql("SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM \"back\\slash; $$ -- /*\" t")
    body = plain.sql("SELECT slashes(), quoted(), counted(1)")
    oid = plain.oid()
    report = restore_database.fn(NAME, backup="a.sql", confirm=NAME)
    assert "not proven" in report.outcome
    assert plain.oid() != oid
    assert plain.sql("SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM \"back\\slash; $$ -- /*\" t") == before
    assert plain.sql("SELECT slashes(), quoted(), counted(1)") == body
