"""Masking of statements and errors for reports: no password and no personal data may appear in them."""

from __future__ import annotations

import re

import psycopg
from psycopg import errors

from blocks.postgres.server import first_line

MASK = "'…'"
# Names stay, comments are removed, literals of every notation are masked, also truncated ones.
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
    """A statement in one line, with `'…'` for every literal: `ALTER ROLE x PASSWORD '…'`."""
    text = _PARTS.sub(lambda found: found["name"] or (" " if found["comment"] else MASK), statement)
    return " ".join(text.split())


def described(error: psycopg.Error) -> str:
    """The server's error and the violated constraint, without DETAIL (“Failing row contains …”) and quoted values."""
    text = error.diag.message_primary or first_line(error)
    if isinstance(error, errors.DataError):
        text = re.sub(r'".*"', "“…”", text, flags=re.DOTALL)
    named = {"table": error.diag.table_name, "column": error.diag.column_name, "constraint": error.diag.constraint_name}
    names = ", ".join(f"{what} {name}" for what, name in named.items() if name and name not in text)
    return f"{text} ({names})" if names else text
