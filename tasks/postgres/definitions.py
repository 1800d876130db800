"""What a database's objects are, as `pg_dump --schema-only` says it: one text per object.

pg_dump knows every kind of object, its owner, its privileges and its comments; two databases are equal in definition
where it prints the same for both. https://www.postgresql.org/docs/current/app-pgdump.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from blocks.postgres import Postgres
from runbook import shell
from tasks.postgres.equivalence import Judged

LOCK_WAIT = "60s"
_HEADER = re.compile(
    r"^--\n-- Name: (?P<name>.*); Type: (?P<type>[A-Z ]+); Schema: (?P<schema>.*?); Owner: (?P<owner>.*?)"
    r"(?:; Tablespace: .*)?\n--\n",
    re.MULTILINE,
)
# Their texts hold connection strings with passwords.
SECRET_TYPES = ("SUBSCRIPTION", "USER MAPPING")
# pg_restore prints these among the definitions, pg_dump does not.
DATA_TYPES = ("MATERIALIZED VIEW DATA", "SEQUENCE SET", "TABLE DATA", "BLOBS", "BLOB METADATA")
_SESSION_LINES = ("--", "\\unrestrict", "\\restrict", "SET default_t")


def read_definitions(postgres: Postgres, database: str) -> dict[str, str]:
    """Every object's definition in a database that nobody changes: `TABLE public.users (owner app_user)` → SQL.

    Raises:
        CommandFailed: a table is held exclusively for longer than `LOCK_WAIT`, or pg_dump cannot read it otherwise.
    """
    return definitions_seen(postgres, database, f"--lock-wait-timeout={LOCK_WAIT}")


def definitions_seen(postgres: Postgres, database: str, *options: str) -> dict[str, str]:
    """The same, with options that say in which snapshot."""
    argv = [postgres.program("pg_dump"), "--schema-only", "--no-password", *options]
    environment = {**postgres.environment(), "PGDATABASE": database, "PGOPTIONS": "-c lc_messages=C"}
    return parse(shell.run(argv, environment=environment).stdout)


def dumped_definitions(postgres: Postgres, dump: Path) -> dict[str, str]:
    """The same of a dump in directory format: the texts that pg_dump wrote, without asking the server again."""
    return parse(shell.run([postgres.program("pg_restore"), "--schema-only", "--file=-", dump]).stdout)


def parse(printed: str) -> dict[str, str]:
    """Split pg_dump's text by its header comments. Two objects of one header (overloads) are kept together."""
    found: dict[str, str] = {}
    headers = list(_HEADER.finditer(printed))
    ends = [header.start() for header in headers[1:]] + [len(printed)]
    for header, end in zip(headers, ends, strict=False):
        body = printed[header.end() : end]
        if header["type"] in (*SECRET_TYPES, *DATA_TYPES):
            continue
        schema = "" if header["schema"] == "-" else f"{header['schema']}."
        key = f"{header['type']} {schema}{header['name']} (owner {header['owner'] or '-'})"
        found[key] = found.get(key, "") + _without_session_lines(body)
    return found


def _without_session_lines(body: str) -> str:
    """Without what pg_dump's session adds after an object: blank lines, SET lines, the end of the script. Such lines
    inside the object (in a function, in a text) are its own."""
    lines = body.split("\n")
    while lines and (not lines[-1] or lines[-1].startswith(_SESSION_LINES)):
        lines.pop()
    return "\n".join(lines).lstrip("\n") + "\n"


def differences(expected: Mapping[str, str], actual: Mapping[str, str], judged: Judged) -> list[str]:
    """How two databases' definitions differ, as sentences. Texts that PostgreSQL understands alike count as equal."""
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
