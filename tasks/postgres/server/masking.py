"""What may stand in a report of what clients send and of what the server quotes: no password, nobody's data."""

from __future__ import annotations

import re

import psycopg
from psycopg import errors

from blocks.postgres.server import first_line

MASK = "'…'"
# Names stay; comments go; texts of every notation are masked, also where the end is cut off.
# https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-CONSTANTS
_PARTS = re.compile(
    r"""
    (?P<name> "(?:""|[^"])*" )
    | (?P<comment> --[^\n]* | /\*.*?(?:\*/|$) )
    | \b[eE]'(?:\\.|''|[^'\\])*(?:'|\\?$)
    | (?:\b(?:[bBxXnN]|[uU]&))?'(?:''|[^'])*(?:'|$)
    | (?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?(?:\$(?P=tag)\$|$)
    """,
    re.VERBOSE | re.DOTALL,
)


def masked(statement: str) -> str:
    """A statement in one line, with `'…'` for every text in it: `ALTER ROLE x PASSWORD '…'`."""
    text = _PARTS.sub(lambda found: found["name"] or (" " if found["comment"] else MASK), statement)
    return " ".join(text.split())


def described(error: psycopg.Error) -> str:
    """What the server refused and by which rule, without its DETAIL (“Failing row contains …”) and without the values
    that it quotes."""
    text = error.diag.message_primary or first_line(error)
    if isinstance(error, errors.DataError):
        text = re.sub(r'".*"', "“…”", text, flags=re.DOTALL)
    named = {"table": error.diag.table_name, "column": error.diag.column_name, "constraint": error.diag.constraint_name}
    told = ", ".join(f"{what} {name}" for what, name in named.items() if name and name not in text)
    return f"{text} ({told})" if told else text
