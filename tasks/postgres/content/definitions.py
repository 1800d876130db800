"""The definitions of a database's objects, as `pg_dump --schema-only` prints them: one text per object.

pg_dump covers every kind of object with its owner, privileges and comments. Two databases have equal definitions if it
prints the same for both. https://www.postgresql.org/docs/current/app-pgdump.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from blocks.postgres.server import Postgres
from tasks.postgres.content.equivalence import JudgedDefinition
from tasks.postgres.content.pinned_session import read_names
from tasks.postgres.content.quiet import copy_options
from tasks.postgres.dump.printed import codec, printed

LOCK_WAIT = "60s"
_HEADER = re.compile(
    r"--\n-- Name: (?P<name>.*); Type: (?P<type>[A-Z ]+); Schema: (?P<schema>.*?); Owner: (?P<owner>.*?)"
    r"(?:; Tablespace: .*)?\n--\n"
)
# A header inside one of these is part of the object: a function's text, a comment, a name.
_QUOTED = re.compile(
    r"'[^']*'|\"[^\"]*\"|\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$|^--[^\n]*", re.DOTALL | re.MULTILINE
)
# Their texts contain connection strings with passwords.
SECRET_TYPES = ("SUBSCRIPTION", "USER MAPPING")
# pg_restore prints these among the definitions, pg_dump does not.
DATA_TYPES = ("MATERIALIZED VIEW DATA", "SEQUENCE SET", "TABLE DATA", "BLOBS", "BLOB METADATA")
REPLACED = "\ufffd"
_ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")
_SESSION_LINES = ("--", "\\unrestrict", "\\restrict", "SET default_t")


def read_definitions(postgres: Postgres, database: str) -> dict[str, str]:
    """Every object's definition in a database without other users: `TABLE public.users (owner app_user)` → SQL.

    Raises:
        CommandFailed: a table is locked for longer than `LOCK_WAIT`, or pg_dump failed otherwise.
    """
    return definitions_seen(postgres, database, f"--lock-wait-timeout={LOCK_WAIT}", settings=copy_options(postgres))


def definitions_seen(postgres: Postgres, database: str, *options: str, settings: str = "") -> dict[str, str]:
    """Every object's definition, with options such as a snapshot, and settings of the session (as PGOPTIONS)."""
    with postgres.connect(database, options=settings) as connection:
        encoding, of_ascii = connection.info.parameter_status("server_encoding"), read_names(connection)
    argv = [postgres.program("pg_dump"), "--schema-only", "--no-password", f"--encoding={encoding}", *options]
    environment = {**postgres.environment(options=f"-c lc_messages=C {settings}"), "PGDATABASE": database}
    return parse(printed(postgres, argv, environment, of_ascii=of_ascii))


def dumped_definitions(postgres: Postgres, dump: Path, of_ascii: str = "utf-8") -> dict[str, str]:
    """Every object's definition in a dump in directory format. `of_ascii`: the encoding of names in a SQL_ASCII
    database."""
    return parse(printed(postgres, [postgres.program("pg_restore"), "--schema-only", dump], of_ascii=of_ascii))


def parse(text: str) -> dict[str, str]:
    """Split pg_dump's text by its header comments. Two objects of one header (overloads) are kept together."""
    found: dict[str, str] = {}
    headers = list(_headers(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    for header, end in zip(headers, ends, strict=False):
        body = text[header.end() : end]
        if header["type"] in (*SECRET_TYPES, *DATA_TYPES):
            continue
        schema = "" if header["schema"] == "-" else f"{header['schema']}."
        key = f"{header['type']} {schema}{header['name']} (owner {header['owner'] or '-'})"
        found[key] = found.get(key, "") + _without_session_lines(body)
    return found


def _headers(printed: str) -> Iterator[re.Match[str]]:
    """The headers between objects."""
    at = 0
    while found := _QUOTED.search(printed, at):
        header = _HEADER.match(printed, found.start())
        if header:
            yield header
        at = (header or found).end()


def _without_session_lines(body: str) -> str:
    """Remove the lines that pg_dump adds after an object: blank lines, SET lines, the end of the script.

    Such lines inside the object (in a function, in a text) stay.
    """
    lines = body.split("\n")
    while lines and (not lines[-1] or lines[-1].startswith(_SESSION_LINES)):
        lines.pop()
    return "\n".join(lines).lstrip("\n") + "\n"


def as_once_stored(actual: Mapping[str, str], expected: Mapping[str, str], encoding: str) -> dict[str, str]:
    """Definitions in the form of older manifests, if the expected ones have it: U+FFFD for each byte that is not valid
    UTF-8."""
    if not any(REPLACED in part for item in expected.items() for part in item):
        return dict(actual)

    def stored(text: str) -> str:
        content = text.encode(codec(encoding), "backslashreplace")
        return _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), content).decode(errors="replace")

    return {stored(key): stored(text) for key, text in actual.items()}


def differences(expected: Mapping[str, str], actual: Mapping[str, str], judged: JudgedDefinition) -> list[str]:
    """The differences of two databases' definitions, as sentences. Texts that PostgreSQL parses alike are equal."""
    problems = [f"{key}: missing" for key in expected if key not in actual]
    problems += [f"{key}: not in the backup" for key in actual if key not in expected]
    for key, text in expected.items():
        other = actual.get(key, text)
        if text != other and key not in judged.equal:
            why = f" ({judged.refused[key]})" if key in judged.refused else ""
            problems.append(f"{key}: differs: {first_difference(text, other)}{why}")
    return problems


def first_difference(expected: str, actual: str) -> str:
    """The first line that differs, expected → found."""
    ours, theirs = expected.splitlines(), actual.splitlines()
    for left, right in zip([*ours, ""], [*theirs, ""], strict=False):
        if left != right:
            return f"“{left.strip()}” → “{right.strip()}”"
    return "more lines"
